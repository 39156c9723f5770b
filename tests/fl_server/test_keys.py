"""The keys of a federation, as OpenSSL and ssh would read them."""

from __future__ import annotations

import ssl
import tomllib
from datetime import UTC, datetime
from ipaddress import ip_address
from itertools import count
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.verification import PolicyBuilder, Store

from fl_server import certificates, keys
from fl_server.certificates import certificate_hosts
from fl_server.keys import check_node_keys, check_server_keys, make_keys
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


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_the_servers_own_processes_can_call_it(folder: Path, host: str):
    """A run's ServerApp connects to the loopback, whatever name the nodes use."""
    server = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    assert host in certificate_hosts(server)


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


def test_nodes_are_added_without_the_authoritys_key_and_without_naming_the_hosts(tmp_path: Path):
    made = make_keys(tmp_path, 1, HOSTS, 8443)
    (tmp_path / "ca.key").unlink()  # as docs/deploy.md tells: it lies in a safe
    more = make_keys(tmp_path, 2)
    assert (more.made, more.hosts) == (("node-2", "node-2.pub"), made.hosts)
    assert "fed.example.org:8443" in (tmp_path / "flwr" / "config.toml").read_text()


def test_a_node_whose_private_key_is_at_its_site_gets_no_other(tmp_path: Path):
    make_keys(tmp_path, 2, HOSTS)
    (tmp_path / "node-1").unlink()
    assert make_keys(tmp_path, 3).made == ("node-3", "node-3.pub")
    assert not (tmp_path / "node-1").exists()


def test_another_authoritys_key_signs_nothing(tmp_path: Path):
    make_keys(tmp_path / "a", 1, HOSTS)
    make_keys(tmp_path / "b", 1, HOSTS)
    (tmp_path / "a" / "server.pem").unlink()
    (tmp_path / "b" / "ca.key").replace(tmp_path / "a" / "ca.key")
    with pytest.raises(RunError, match=r"a: ca\.key is not the key of ca\.crt; bring the right one"):
        make_keys(tmp_path / "a", 1)
    assert not (tmp_path / "a" / "server.pem").exists()


def test_another_port_is_written_to_flowers_home(tmp_path: Path):
    make_keys(tmp_path, 1, HOSTS, 8443)
    assert make_keys(tmp_path, 1, port=9000).made == ("config.toml",)
    assert '"fed.example.org:9000"' in (tmp_path / "flwr" / "config.toml").read_text()


@pytest.mark.parametrize("written", range(7))
def test_cut_off_between_two_files(tmp_path: Path, written: int, monkeypatch: pytest.MonkeyPatch):
    write, files = keys._write, count()

    def until(path: Path, content: bytes, made: list[str], *, private: bool = True) -> None:
        if next(files) == written:
            raise KeyboardInterrupt
        write(path, content, made, private=private)

    monkeypatch.setattr(keys, "_write", until)
    with pytest.raises(KeyboardInterrupt):
        make_keys(tmp_path, 1, HOSTS)
    monkeypatch.undo()
    assert len(make_keys(tmp_path, 1, HOSTS).made) == 7 - written
    check_server_keys(tmp_path)
    check_node_keys(tmp_path / "node-1", tmp_path / "ca.crt")
    private = load_ssh_private_key((tmp_path / "node-1").read_bytes(), None)
    public = load_ssh_public_key((tmp_path / "node-1.pub").read_bytes())
    form = Encoding.OpenSSH, PublicFormat.OpenSSH
    assert private.public_key().public_bytes(*form) == public.public_bytes(*form)
    assert not list(tmp_path.glob(".*"))


def test_a_name_beyond_ascii_is_written_as_clients_look_it_up(tmp_path: Path):
    made = make_keys(tmp_path, 1, ["m\u00fcller.example", "node_1", "2001:DB8::5"])
    assert made.hosts[:3] == ("xn--mller-kva.example", "node_1", "2001:db8::5")
    assert "xn--mller-kva.example:8000" in (tmp_path / "flwr" / "config.toml").read_text()
    assert make_keys(tmp_path, 1, ["m\u00fcller.example", "2001:db8:0::5"]).made == ()


@pytest.mark.parametrize(
    "host",
    [
        *(
            "",
            " ",
            "fed.example.org:8000",
            "https://fed.example.org",
            "fed.example.org/",
            "[::1]",
            "10.0.0.256",
        ),
        *("a b", "-a", "a..b", "a.example\n", "*.example.org", "x" * 64, ".".join(["x" * 60] * 5)),
    ],
)
def test_what_no_client_can_call_the_server_by_is_refused(tmp_path: Path, host: str):
    with pytest.raises(ConfigError, match=r"--host is .*, expected a name or an address of the server"):
        make_keys(tmp_path / "keys", 1, [host])
    assert not (tmp_path / "keys").exists()


def test_what_cannot_be_made_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="--nodes is 0"):
        make_keys(tmp_path, 0, HOSTS)
    make_keys(tmp_path, 1, HOSTS)
    with pytest.raises(RunError, match=r"for other hosts than other\.example\.org"):
        make_keys(tmp_path, 1, [*HOSTS, "other.example.org"])
    (tmp_path / "ca.key").unlink()
    (tmp_path / "server.pem").unlink()
    with pytest.raises(RunError, match=r"a new server\.pem needs ca\.key"):
        make_keys(tmp_path, 1, HOSTS)


def test_what_a_server_cannot_be_started_with_is_named(tmp_path: Path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    for place in (mine, other):
        make_keys(place, 1, HOSTS)
    left = check_server_keys(mine) - datetime.now(UTC)
    assert 820 < left.days < 826
    kept = {name: (mine / name).read_bytes() for name in ("ca.crt", "server.key", "server.pem")}
    cases = [
        ("server.key", (other / "server.key").read_bytes(), "server.key is not the key of server.pem"),
        ("ca.crt", (other / "ca.crt").read_bytes(), "ca.crt is not the authority that signed server.pem"),
        ("server.pem", b"", "server.pem: not a certificate in PEM"),
        ("server.key", kept["server.pem"], "server.key: not a private key in PEM"),
        ("server.pem", _ended(mine), "server.pem ended on 2020-01-02"),
        ("ca.crt", None, r"ca.crt: cannot be read \(No such file or directory\)"),
    ]
    for name, content, reason in cases:
        if content is None:
            (mine / name).unlink()
        else:
            (mine / name).write_bytes(content)
        with pytest.raises(RunError, match=reason):
            check_server_keys(mine)
        (mine / name).write_bytes(kept[name])
    check_server_keys(mine)


def test_what_a_node_cannot_be_started_with_is_named(tmp_path: Path):
    make_keys(tmp_path, 1, HOSTS)
    check_node_keys(tmp_path / "node-1", tmp_path / "ca.crt")
    with pytest.raises(RunError, match=r"node-1\.pub: not a private key"):
        check_node_keys(tmp_path / "node-1.pub", tmp_path / "ca.crt")
    with pytest.raises(RunError, match="node-1: not a certificate"):
        check_node_keys(tmp_path / "node-1", tmp_path / "node-1")
    with pytest.raises(RunError, match=r"Is a directory"):
        check_node_keys(tmp_path, tmp_path / "ca.crt")


def _ended(folder: Path) -> bytes:
    """The server's certificate as it might have been made long ago."""
    key = certificates.read_key((folder / "server.key").read_bytes(), "")
    issuer_key = certificates.read_key((folder / "ca.key").read_bytes(), "")
    issuer = certificates.read_certificate((folder / "ca.crt").read_bytes(), "")
    builder = (
        x509.CertificateBuilder()
        .subject_name(issuer.subject)
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2020, 1, 2, tzinfo=UTC))
    )
    return certificates.pem(builder.sign(issuer_key, hashes.SHA384()))
