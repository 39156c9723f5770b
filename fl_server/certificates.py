"""Keys and certificates as objects: made, read and compared with `cryptography`. Files are `keys.py`'s."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vblora.errors import ConfigError, RunError

__all__ = [
    "Certificate",
    "Key",
    "authority_certificate",
    "certificate_hosts",
    "host_name",
    "is_signed_by",
    "new_key",
    "node_private",
    "node_public",
    "pem",
    "read_certificate",
    "read_key",
    "read_node_key",
    "server_certificate",
]

Key = ec.EllipticCurvePrivateKey
Certificate = x509.Certificate

LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
HOST_NAME = re.compile(
    rf"(?=.{{1,253}}$)(?!.*(^|\.)\d+$)({LABEL}\.)*{LABEL}"
)  # a number last: a broken address
DAYS_CA, DAYS_SERVER = 3650, 825


def new_key() -> Key:
    """A key on the curve that Flower's nodes use."""
    return ec.generate_private_key(ec.SECP384R1())


def authority_certificate(key: Key) -> Certificate:
    """Of an authority, signed by itself."""
    name = _name("fed-vblora authority")
    builder = (
        _builder(name, name, key, DAYS_CA)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
    )
    return builder.sign(key, hashes.SHA384())


def server_certificate(key: Key, hosts: Sequence[str], issuer_key: Key, issuer: Certificate) -> Certificate:
    """Of a server under all its names, signed by an authority."""
    builder = (
        _builder(_name("fed-vblora server"), issuer.subject, key, DAYS_SERVER)
        .add_extension(x509.SubjectAlternativeName([host_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    return builder.sign(issuer_key, hashes.SHA384())


def certificate_hosts(certificate: Certificate) -> tuple[str, ...]:
    """The names and addresses that a certificate is good for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in found)


def is_signed_by(certificate: Certificate, issuer: Certificate) -> bool:
    """Whether an authority vouches for a certificate."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def host_name(host: str) -> x509.GeneralName:
    """A name or an address as a certificate holds it; a name with letters beyond ASCII in IDNA's form.

    Raises:
        ConfigError: it is neither, so no client could call the server by it.
    """
    with suppress(ValueError):
        return x509.IPAddress(ip_address(host))
    with suppress(UnicodeError):  # a label is empty, too long, or of letters that no name has
        name = host.encode("idna").decode("ascii")
        if HOST_NAME.fullmatch(name):
            return x509.DNSName(name)
    raise ConfigError(
        f"--host is {host!r:.80}, expected a name or an address of the server, such as fed.example.org or "
        "10.0.0.5, without a scheme, a port or brackets"
    )


# --- As bytes ------------------------------------------------------------------------


def pem(item: Key | Certificate) -> bytes:
    """A private key or a certificate in PEM, as TLS libraries read it."""
    if isinstance(item, x509.Certificate):
        return item.public_bytes(Encoding.PEM)
    return item.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def node_private(key: Key) -> bytes:
    """A node's private key in OpenSSH's form, as Flower reads it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def node_public(key: Key, comment: str) -> bytes:
    """The line that lets a node in."""
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return public + f" {comment}\n".encode()


def read_key(content: bytes, where: str) -> Key:
    """A private key in PEM.

    Raises:
        RunError: it is none.
    """
    try:
        key = load_pem_private_key(content, None)
    except (ValueError, TypeError) as error:
        raise RunError(f"{where}: not a private key in PEM ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RunError(
            f"{where}: a {type(key).__name__}, expected one on an elliptic curve, as fedvb keys makes"
        )
    return key


def read_node_key(content: bytes, where: str) -> Key:
    """A node's private key in OpenSSH's form.

    Raises:
        RunError: it is none.
    """
    try:
        key = load_ssh_private_key(content, None)
    except (ValueError, TypeError) as error:
        raise RunError(f"{where}: not a private key as fedvb keys makes for nodes ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RunError(
            f"{where}: a {type(key).__name__}, expected one on an elliptic curve, as fedvb keys makes"
        )
    return key


def read_certificate(content: bytes, where: str) -> Certificate:
    """A certificate in PEM.

    Raises:
        RunError: it is none.
    """
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise RunError(f"{where}: not a certificate in PEM ({error})") from error


def _builder(subject: x509.Name, issuer: x509.Name, key: Key, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
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
