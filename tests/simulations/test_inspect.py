"""What `fedvb inspect` prints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.simulations.conftest import Run, read_history
from tests.vblora.make_golden import GOLDEN_BLOBS, read_golden
from vblora.frame import section_bytes


@pytest.mark.parametrize("name", GOLDEN_BLOBS)
def test_a_message_by_its_sections(name: str, fedvb: Run, tmp_path: Path):
    """Each with its bytes and the numbers it stands for; in all as many as the file has."""
    blob, _ = read_golden(name)
    (tmp_path / name).write_bytes(blob)
    shown = fedvb("inspect", tmp_path / name)
    assert (shown.code, shown.err) == (0, "")
    rows = {line.split("│")[1].strip(): line.split("│") for line in shown.out.splitlines() if "│" in line}
    for section, size in section_bytes(blob).items():
        assert int(rows[section][5].replace(",", "")) == size
    assert int(rows["in all"][5].replace(",", "")) == len(blob)
    for section, shape in GOLDEN_BLOBS[name][0].dense_shapes.items():
        assert int(rows[section][4].replace(",", "")) == math.prod(shape)
    if name == "update-default":
        assert "update of a client from version 2, 77 texts, against version 2" in shown.out


def test_the_last_message_of_a_run(fedvb: Run, finished: Path):
    shown = fedvb("inspect", finished)
    assert (shown.code, shown.err) == (0, "")
    assert "update of a client from version 2" in shown.out
    assert len(read_history(finished)) == 4


def test_what_is_no_message(fedvb: Run, tmp_path: Path):
    (tmp_path / "noise").write_bytes(b"n" * 200)
    for path, fault in (
        ("noise", "this is not a fed-vblora blob"),
        ("none", "cannot be read"),
        (".", "no message here"),
    ):
        shown = fedvb("inspect", tmp_path / path)
        assert shown.code == 2
        assert fault in shown.err
        assert shown.err.count("\n") == 1
