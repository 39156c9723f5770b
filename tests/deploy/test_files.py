"""The examples in deploy/: every command in them is one that `fedvb` takes."""

from __future__ import annotations

import re
import shlex
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
    return [shlex.split(re.sub(r"\$\{[^}]*\}", "1", service["command"])) for service in services]


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
