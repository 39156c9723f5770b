"""Keys of a federation: an authority, the server's certificate, and a key for every node.

Made with `cryptography`, in the forms that Flower reads: PEM for TLS, OpenSSH for the nodes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vblora.errors import ConfigError, RunError

__all__ = ["CONNECTION", "Keys", "make_keys"]

CONNECTION = "fedvb"  # what the connection is called in Flower's config.toml
DAYS_CA, DAYS_SERVER = 3650, 825
MOST_NODES = 10_000


@dataclass(frozen=True)
class Keys:
    """What lies in a folder of keys.

    Attributes:
        folder: of all files.
        made: names of those that were made now; what was there is kept.
        nodes: numbers of the nodes that have a key.
        hosts: that the server's certificate is good for.
    """

    folder: Path
    made: tuple[str, ...]
    nodes: tuple[int, ...]
    hosts: tuple[str, ...]


def make_keys(folder: Path, nodes: int, hosts: Sequence[str], port: int = 8000) -> Keys:
    """Make what is missing in a folder: ca.key, ca.crt, server.key, server.pem, node-1 to node-N, their .pub,
    and `flwr/config.toml`, a home for Flower's commands that knows the server by its first host.

    Args:
        folder: the private parts of it are readable by their owner alone.
        nodes: how many there are to be in all; a later call with more adds the new ones.
        hosts: names and addresses that nodes call the server by.
        port: of the server.

    Raises:
        ConfigError: no node, too many, or no host.
        RunError: the folder holds a part of an authority, or a certificate for other hosts.
    """
    if not 1 <= nodes <= MOST_NODES:
        raise ConfigError(f"--nodes is {nodes}, expected 1 to {MOST_NODES}")
    if not hosts or not all(host.strip() for host in hosts):
        raise ConfigError("--host: no name or address of the server given")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made: list[str] = []
    authority = _authority(folder, made)
    _server(folder, authority, tuple(hosts), made)
    for number in range(1, nodes + 1):
        _node(folder, number, made)
    config = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{_address(hosts[0])}:'
        f'{port}"\nroot-certificates = "{(folder / "ca.crt").absolute()}"\n'
    )
    _write(folder / "flwr" / "config.toml", config.encode(), made, private=False)
    return Keys(folder, tuple(made), tuple(range(1, nodes + 1)), tuple(hosts))


def _authority(folder: Path, made: list[str]) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key_file, file = folder / "ca.key", folder / "ca.crt"
    if key_file.exists() != file.exists():
        raise RunError(
            f"{folder}: ca.key and ca.crt go together, found one; restore it, or choose another --out"
        )
    if file.exists():
        key = load_pem_private_key(key_file.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key, x509.load_pem_x509_certificate(file.read_bytes())
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("fed-vblora authority")
    builder = (
        _builder(name, name, key.public_key(), DAYS_CA)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
    )
    certificate = builder.sign(key, hashes.SHA384())
    _write(key_file, _pem(key), made)
    _write(file, certificate.public_bytes(Encoding.PEM), made, private=False)
    return key, certificate


def _server(
    folder: Path,
    authority: tuple[ec.EllipticCurvePrivateKey, x509.Certificate],
    hosts: tuple[str, ...],
    made: list[str],
) -> None:
    file = folder / "server.pem"
    names = x509.SubjectAlternativeName([_host(host) for host in hosts])
    if file.exists():
        there = x509.load_pem_x509_certificate(file.read_bytes())
        found = there.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if missing := [str(name.value) for name in names if name not in list(found)]:
            raise RunError(
                f"{file}: is for other hosts than {', '.join(missing)}; remove server.pem and server.key to "
                "have them made anew, by the same authority"
            )
        return
    issuer_key, issuer = authority
    key = ec.generate_private_key(ec.SECP384R1())
    builder = (
        _builder(_name("fed-vblora server"), issuer.subject, key.public_key(), DAYS_SERVER)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    certificate = builder.sign(issuer_key, hashes.SHA384())
    _write(folder / "server.key", _pem(key), made)
    _write(file, certificate.public_bytes(Encoding.PEM), made, private=False)


def _node(folder: Path, number: int, made: list[str]) -> None:
    file = folder / f"node-{number}"
    if file.exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    _write(file, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), made)
    _write(folder / f"node-{number}.pub", public + f" {file.name}\n".encode(), made, private=False)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _address(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, made: list[str], *, private: bool = True) -> None:
    """Write a new file, with its rights from the first moment; one that is there stays."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644), "wb") as file:
        file.write(content)
    made.append(path.name)
