"""The folder of a federation's keys: an authority, the server's certificate, and a key for every node.

What is there is kept; what is missing is made, also where an earlier call was cut off between two files.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fl_server.certificates import (
    authority_certificate,
    certificate_hosts,
    host_name,
    is_signed_by,
    new_key,
    node_private,
    node_public,
    pem,
    read_certificate,
    read_key,
    read_node_key,
    server_certificate,
)
from vblora.errors import ConfigError, RunError

__all__ = ["CONNECTION", "Keys", "check_node_keys", "check_server_keys", "make_keys", "write_connection"]

CONNECTION = "fedvb"  # what the connection is called in Flower's config
CONFIG = "config.toml"  # of Flower's commands, in their home
OWN_HOSTS = ("localhost", "127.0.0.1", "::1")  # the server's own processes call it by these
PORT = 8000
MOST_NODES = 10_000


@dataclass(frozen=True)
class Keys:
    """What lies in a folder of keys.

    Attributes:
        folder: of all files.
        made: names of those that were written now.
        nodes: numbers of the nodes that have a key.
        hosts: that the server's certificate is good for.
    """

    folder: Path
    made: tuple[str, ...]
    nodes: tuple[int, ...]
    hosts: tuple[str, ...]


def make_keys(folder: Path, nodes: int, hosts: Sequence[str] = (), port: int | None = None) -> Keys:
    """Make what is missing in a folder: ca.key, ca.crt, server.key, server.pem, node-1 to node-N, their .pub,
    and `flwr/config.toml`, a home for Flower's commands that knows the server by its first host.

    ca.key is needed for a new server certificate alone; it may lie elsewhere otherwise.

    Args:
        folder: the private parts of it are readable by their owner alone.
        nodes: how many there are to be in all; a later call with more adds the new ones.
        hosts: names and addresses that nodes call the server by; none keeps those that are there, or takes
            this machine's own. Its own are always among them: a run's ServerApp calls it so.
        port: of the server; None keeps what is there, or takes 8000.

    Raises:
        ConfigError: no node, too many, or a host that is neither a name nor an address.
        RunError: a part is missing that cannot be made, or a certificate is for other hosts.
    """
    if not 1 <= nodes <= MOST_NODES:
        raise ConfigError(f"--nodes is {nodes}, expected 1 to {MOST_NODES}")
    hosts = [str(host_name(host).value) for host in hosts]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made: list[str] = []
    good_for = _server(folder, hosts, made)
    for number in range(1, nodes + 1):
        _node(folder, number, made)
    _connection(folder, hosts, port, made)
    return Keys(folder, tuple(made), tuple(range(1, nodes + 1)), good_for)


def write_connection(home: Path, host: str, port: int, authority: Path | None) -> bool:
    """Tell Flower's commands where the server is, in a home of theirs; whether that was new.

    Args:
        home: what `FLWR_HOME` is to be.
        host, port: of the server.
        authority: the certificate that vouches for it; None is a server without TLS.
    """
    file = home / CONFIG
    shown = f"[{host}]" if ":" in host else host
    trust = "insecure = true" if authority is None else f'root-certificates = "{authority.absolute()}"'
    content = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
    content += f'address = "{shown}:{port}"\n{trust}\n'
    if file.exists() and file.read_text() == content:
        return False
    _write(file, content.encode(), [], private=False)
    return True


def check_server_keys(folder: Path) -> datetime:
    """See that a server can be started with a folder of keys.

    Returns:
        When its certificate ends.

    Raises:
        RunError: a file is missing or damaged, they do not belong together, or the certificate has ended.
    """
    authority = read_certificate(*_content(folder / "ca.crt"))
    certificate = read_certificate(*_content(folder / "server.pem"))
    key = read_key(*_content(folder / "server.key"))
    if certificate.public_key() != key.public_key():
        raise RunError(
            f"{folder}: server.key is not the key of server.pem; remove both and call fedvb keys again"
        )
    if not is_signed_by(certificate, authority):
        raise RunError(f"{folder}: ca.crt is not the authority that signed server.pem; bring the right one")
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise RunError(
            f"{folder}: server.pem ended on {certificate.not_valid_after_utc:%Y-%m-%d}; remove it and call "
            "fedvb keys again, with ca.key"
        )
    return certificate.not_valid_after_utc


def check_node_keys(key: Path, authority: Path) -> None:
    """See that a node can be started with its private key and the authority's certificate.

    Raises:
        RunError: one of them is missing, or not what it is named as.
    """
    read_node_key(*_content(key))
    read_certificate(*_content(authority))


# --- Making --------------------------------------------------------------------------


def _server(folder: Path, hosts: Sequence[str], made: list[str]) -> tuple[str, ...]:
    """The server's certificate, of an authority that is made with it; gives the hosts it is good for."""
    file, key_file = folder / "server.pem", folder / "server.key"
    if file.exists():
        for part in (key_file, folder / "ca.crt"):
            if not part.exists():
                raise RunError(
                    f"{folder}: has server.pem but no {part.name}; restore it, or remove server.pem"
                )
        certificate = read_certificate(*_content(file))
        good_for = certificate_hosts(certificate)
        if missing := [host for host in hosts if host not in good_for]:
            raise RunError(
                f"{file}: is for other hosts than {', '.join(missing)}; remove server.pem to have it made "
                "anew, by the same authority"
            )
        return good_for
    authority_key_file, authority_file = folder / "ca.key", folder / "ca.crt"
    if authority_file.exists() and not authority_key_file.exists():
        raise RunError(f"{folder}: a new server.pem needs ca.key; bring it back, or choose another --out")
    if not authority_key_file.exists():
        _write(authority_key_file, pem(new_key()), made)
    authority_key = read_key(*_content(authority_key_file))
    if not authority_file.exists():
        _write(authority_file, pem(authority_certificate(authority_key)), made, private=False)
    authority = read_certificate(*_content(authority_file))
    if authority.public_key() != authority_key.public_key():
        raise RunError(f"{folder}: ca.key is not the key of ca.crt; bring the right one for a new server.pem")
    if not key_file.exists():
        _write(key_file, pem(new_key()), made)
    certificate = server_certificate(
        read_key(*_content(key_file)),
        tuple(dict.fromkeys([*hosts, *OWN_HOSTS])),
        authority_key,
        authority,
    )
    _write(file, pem(certificate), made, private=False)
    return certificate_hosts(certificate)


def _node(folder: Path, number: int, made: list[str]) -> None:
    """A node's two halves; nothing where the public one is here alone: the private one is at its site."""
    file = folder / f"node-{number}"
    public = folder / f"{file.name}.pub"
    if not public.exists():
        if not file.exists():
            _write(file, node_private(new_key()), made)
        _write(public, node_public(read_node_key(*_content(file)), file.name), made, private=False)


def _connection(folder: Path, hosts: Sequence[str], port: int | None, made: list[str]) -> None:
    """Flower's home: where its commands find the server. Written anew where it says something else."""
    known = _known_address(folder / "flwr" / CONFIG)
    host = next(iter(hosts), known[0])
    if write_connection(folder / "flwr", host, port or known[1], folder / "ca.crt"):
        made.append(CONFIG)


def _known_address(file: Path) -> tuple[str, int]:
    """Host and port in Flower's config, as they were written by an earlier call."""
    try:
        address = tomllib.loads(file.read_text())["superlink"][CONNECTION]["address"]
        host, _, port = address.rpartition(":")
        return host.strip("[]"), int(port)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return OWN_HOSTS[0], PORT


def _content(path: Path) -> tuple[bytes, str]:
    """A file and its name, for messages.

    Raises:
        RunError: it cannot be read.
    """
    try:
        return path.read_bytes(), str(path)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read ({error.strerror}); expected what fedvb keys makes"
        ) from error


def _write(path: Path, content: bytes, made: list[str], *, private: bool = True) -> None:
    """Write a file whole, with its rights from the first moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # rights 600
    try:
        with os.fdopen(handle, "wb") as file:
            if not private:
                os.fchmod(file.fileno(), 0o644)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    made.append(path.name)
