"""The keys of a federation, as OpenSSL and ssh would read them."""

from __future__ import annotations

import ssl
import tomllib
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.verification import PolicyBuilder, Store

from fl_server.keys import make_keys
from vblora.errors import ConfigError, RunError

HOSTS = ["fed.example.org", "10.0.0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("made") / "keys"
    make_keys(made, 2, HOSTS, 8443)
    return made


@pytest.mark.parametrize("host", HOSTS)
def test_the_server_is_vouched_for_under_all_its_names(folder: Path, host: str):
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    name: x509.GeneralName = x509.DNSName(host)
    if host[0].isdecimal():
        name = x509.IPAddress(ip_address(host))
    verifier = PolicyBuilder().store(Store([authority])).build_server_verifier(name)
    assert [item.subject for item in verifier.verify(server, [])] == [server.subject, authority.subject]


def test_tls_takes_certificate_and_key(folder: Path):
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / "server.pem", folder / "server.key")


def test_the_halves_of_a_nodes_key_belong_together(folder: Path):
    publics = set()
    for number in (1, 2):
        private = load_ssh_private_key((folder / f"node-{number}").read_bytes(), None)
        public = load_ssh_public_key((folder / f"node-{number}.pub").read_bytes())
        form = Encoding.OpenSSH, PublicFormat.OpenSSH
        assert private.public_key().public_bytes(*form) == public.public_bytes(*form)
        publics.add(public.public_bytes(*form))
    assert len(publics) == 2


def test_private_parts_are_private(folder: Path):
    rights = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    private = {name for name, mode in rights.items() if mode == 0o600}
    assert private == {"ca.key", "server.key", "node-1", "node-2"}
    assert folder.stat().st_mode & 0o077 == 0


def test_flowers_commands_find_the_server(folder: Path):
    config = tomllib.loads((folder / "flwr" / "config.toml").read_text())
    connection = config["superlink"]["fedvb"]
    assert config["superlink"]["default"] == "fedvb"
    assert connection["address"] == "fed.example.org:8443"
    assert Path(connection["root-certificates"]).is_file()


def test_a_later_call_adds_nodes_and_keeps_the_rest(tmp_path: Path):
    assert len(make_keys(tmp_path, 1, HOSTS).made) == 7
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert make_keys(tmp_path, 2, HOSTS).made == ("node-2", "node-2.pub")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_what_cannot_be_made_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="--nodes is 0"):
        make_keys(tmp_path, 0, HOSTS)
    make_keys(tmp_path, 1, HOSTS)
    with pytest.raises(RunError, match=r"for other hosts than other\.example\.org"):
        make_keys(tmp_path, 1, [*HOSTS, "other.example.org"])
    (tmp_path / "ca.key").unlink()
    with pytest.raises(RunError, match=r"ca\.key and ca\.crt go together"):
        make_keys(tmp_path, 1, HOSTS)
