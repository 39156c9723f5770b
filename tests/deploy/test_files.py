"""The examples in deploy/: every command in them is one that `fedvb` takes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from simulations.cli import app
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"


def commands(path: Path) -> list[list[str]]:
    text = path.read_text()
    if path.suffix == ".service":
        lines = re.findall(r"^ExecStart=/opt/fedvb/bin/fedvb (.*)$", text, re.MULTILINE)
        return [shlex.split(line.replace("$FEDVB_OPTIONS", "--labels no,yes")) for line in lines]
    services = yaml.safe_load(text)["services"].values()
    filled = [
        re.sub(r"\$\{FEDVB_OPTIONS[^}]*\}", "--labels no,yes", service["command"]) for service in services
    ]
    return [shlex.split(re.sub(r"\$\{[^}]*\}", "1", command)) for command in filled]


@pytest.mark.parametrize(
    "path", sorted([*DEPLOY.glob("*/*.service"), *DEPLOY.glob("*/*.yaml")]), ids=lambda path: path.name
)
def test_commands_are_taken(path: Path):
    group = typer.main.get_command(app)
    found = commands(path)
    assert found
    for name, *arguments in found:
        command = group.commands[name]  # type: ignore[attr-defined]
        command.make_context(name, arguments)  # raises where an option is unknown or missing


def test_folders_of_the_compose_files_are_where_they_are_called():
    """Compose would take them from deploy/compose."""
    told = [path.read_text() for path in (ROOT / "docs" / "deploy.md", *DEPLOY.glob("compose/*.yaml"))]
    calls = re.findall(r"docker compose .*", "\n".join(told))
    assert len(calls) >= len(told)
    assert all(call.startswith("docker compose --project-directory . ") for call in calls)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_units(tmp_path: Path):
    """As they are, but for the program: it is not installed here."""
    units = [tmp_path / path.name for path in DEPLOY.glob("systemd/*.service")]
    for unit in units:
        text = (DEPLOY / "systemd" / unit.name).read_text()
        unit.write_text(text.replace("/opt/fedvb/bin/fedvb", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, units)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("[Service]", "[Service]\nRestrat=always"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert "'Restrat'" in done.stderr, "it would have told"


def test_the_app_that_travels_holds_all_that_the_apps_import(tmp_path: Path):
    packages = ("vblora", "fl_client", "fl_server")
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["fab-include"]
    assert [path for path in told if path.endswith("/**")] == [f"/{name}/**" for name in packages]
    code = (
        "import sys; sys.modules['simulations'] = None; import fl_client.app, fl_server.app; "
        "import fl_client.serve, fl_client.opening; print(fl_client.app.__file__)"
    )
    for name in packages:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path))


def test_a_node_cannot_reach_the_texts():
    site = (DEPLOY / "systemd" / "fedvb-site.service").read_text()
    (hidden,) = re.findall(r"^InaccessiblePaths=(.*)$", site, re.MULTILINE)
    guide = (ROOT / "docs" / "deploy.md").read_text()
    data = re.findall(r"fedvb trainer .*--data (\S+)", guide)
    assert data
    assert all(any(path.startswith(part.lstrip("-") + "/") for part in hidden.split()) for path in data)
    volumes = yaml.safe_load((DEPLOY / "compose" / "site.yaml").read_text())["services"]["site"]["volumes"]
    assert not {"./data", "./model", "trainer"} & {volume.partition(":")[0] for volume in volumes}
