"""What `fedvb inspect` prints."""

from __future__ import annotations

from pathlib import Path

from tests.simulations.conftest import Run, read_history
from tests.vblora.make_golden import make_blobs


def test_a_message_by_its_sections(fedvb: Run, tmp_path: Path):
    for name, blob in make_blobs().items():
        (tmp_path / name).write_bytes(blob)
        shown = fedvb("inspect", tmp_path / name)
        assert (shown.code, shown.err) == (0, "")
        assert f"{len(blob):,}" in shown.out
        assert "bank" in shown.out
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
