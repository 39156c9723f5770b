"""What a message holds, section by section, as it stands in its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from vblora.errors import RunError, WireError
from vblora.frame import Encoding, Header, Kind, read_blob, section_bytes

__all__ = ["Contents", "contents", "contents_table"]

ENCODINGS = {
    Encoding.FLOAT32: "float32",
    Encoding.BFLOAT16: "bfloat16",
    Encoding.STEPS: "entropy-coded steps",
    Encoding.GRID: "entropy-coded difference from the base",
    Encoding.SELECTION: "entropy-coded difference from the base",
}


@dataclass(frozen=True)
class Contents:
    """One message.

    Attributes:
        path: file it was read from.
        header: its fixed part.
        rows: (section, encoding, shape, numbers it stands for, bytes); the frame last.
        total: bytes in all.
    """

    path: Path
    header: Header
    rows: tuple[tuple[str, str, str, int, int], ...]
    total: int


def contents(path: Path) -> Contents:
    """Read a message, or the newest that clients of a run (or a trainer's site) have sent.

    Raises:
        RunError: there is nothing to read.
        WireError: it is not a message of this format, or damaged.
    """
    file = _newest(path) if path.is_dir() else path
    try:
        blob = file.read_bytes()
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror})") from error
    try:
        header, sections = read_blob(blob)
    except WireError as error:
        raise WireError(f"{file}: {error}") from error
    rows = [
        (
            section.name,
            ENCODINGS[section.encoding],
            " × ".join(map(str, section.shape)),
            section.count,
            len(section.payload),
        )
        for section in sections
    ]
    frame = ("frame", "header, names, checksum", "", 0, section_bytes(blob)["frame"])
    return Contents(file, header, (*rows, frame), len(blob))


def contents_table(found: Contents) -> Table:
    """The message as a table with a title."""
    table = Table(title="\n".join(_title(found)), title_justify="left", show_footer=True)
    table.add_column("section", footer="in all")
    table.add_column("how")
    table.add_column("shape", justify="right")
    table.add_column("numbers", justify="right", footer=f"{sum(row[3] for row in found.rows):,}")
    table.add_column("bytes", justify="right", footer=f"{found.total:,}")
    for name, how, shape, count, size in found.rows:
        table.add_row(name, how, shape, f"{count:,}" if count else "", f"{size:,}")
    return table


def _title(found: Contents) -> Iterator[str]:
    header = found.header
    yield str(found.path)
    base = "whole" if header.base_version is None else f"against version {header.base_version}"
    if header.kind is Kind.UPDATE:
        yield f"update of a client from version {header.version}, {header.examples} texts, {base}"
    else:
        yield f"state of version {header.version}, {base}"
    yield f"adapter {header.fingerprint.hex()[:12]}, reference {header.digest.hex()[:12]}"


def _newest(folder: Path) -> Path:
    sent = sorted(folder.rglob("sent/*.blob"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if not sent:
        raise RunError(f"{folder}: no message here, expected a blob, a run directory or a trainer's state")
    return sent[-1]
