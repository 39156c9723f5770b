"""One local file as raw columns, read through the builders of Hugging Face `datasets`."""

from __future__ import annotations

import csv
import gzip
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.utils import logging as datasets_logging
from huggingface_hub.utils import logging as hub_logging

from vblora.errors import DataError

__all__ = ["FORMATS", "Frame", "columns_of", "quiet", "read_file", "root_cause", "suffix_of"]

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
FIRST_ROWS = 100  # looked at before pandas is asked, which tells of fields too many in all but the first
SPEAKER = re.compile(r"([^\n:]{1,60}):[ \t]*(?:\n|$)")  # a first line such as "First Citizen:"


@dataclass(frozen=True)
class Frame:
    """Raw columns of equal length and where they come from; a column is read when it is sliced."""

    where: str
    columns: Mapping[str, Sequence[Any]]


def suffix_of(path: Path) -> str:
    """The suffix that tells the format, without .gz; "" if it is not one that we read."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), "")


def read_file(path: Path) -> Frame:
    """Read a csv, tsv, json, jsonl, parquet or txt file, plain or with .gz. Nothing of it stays in any cache.

    Raises:
        DataError: empty, of no such format, or not what its name says.
    """
    suffix = suffix_of(path)
    if not suffix:
        raise DataError(
            f"{path}: cannot tell the format by its name; expected {' '.join(FORMATS)}, or these with .gz"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    with tempfile.TemporaryDirectory(prefix="fedvb-") as scratch, quiet():
        try:
            loaded = datasets.load_dataset(
                FORMATS[suffix],
                data_files={"train": [str(path.resolve())]},
                cache_dir=scratch,
                keep_in_memory=True,  # outlives the scratch folder
                **_options(path, suffix),
            )["train"]
        except DataError:
            raise
        except Exception as error:  # each builder and parser raises its own
            cause = root_cause(error)
            if "corresponds to no data" in cause:  # how `datasets` says that there are no rows
                raise DataError(f"{path}: the file has no rows") from error
            raise DataError(f"{path}: cannot be read as {suffix[1:]}: {cause}") from error
    columns = columns_of(loaded)
    return Frame(
        str(path), _paragraphs(columns["text"][0].removeprefix("\ufeff")) if suffix == ".txt" else columns
    )


def _options(path: Path, suffix: str) -> dict[str, Any]:
    """What the builder of this format must be told so that text arrives as it was written."""
    if suffix == ".txt":
        return {"sample_by": "document"}
    if suffix not in (".csv", ".tsv"):
        return {}
    separator = "\t" if suffix == ".tsv" else ","
    quoting: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if suffix == ".tsv" and not _quoted(path) else {}
    names = _header(path, separator, quoting)
    # Every column as text: a label "01" stays "01", and a sentence "null" or "NA" stays a sentence.
    features = datasets.Features({name: datasets.Value("string") for name in names})
    # No column is an index: pandas would take the first for one where rows have more fields than the header.
    told = {"column_names": names, "header": 0, "index_col": False, "keep_default_na": False}
    return {"sep": separator, "features": features, **told, **quoting}


def _header(path: Path, separator: str, quoting: Mapping[str, Any]) -> list[str]:
    """Names of the columns; the first rows must have no more fields.

    Raises:
        DataError: one has.
    """
    with _open(path) as lines:
        rows = csv.reader(lines, delimiter=separator, **quoting)
        header = next((row for row in rows if row), [])
        with suppress(csv.Error):  # of a field that is too long for this reader alone
            for row in islice(rows, FIRST_ROWS):
                if len(row) <= len(header):
                    continue
                raise DataError(
                    f"{path}: line {rows.line_num} has {len(row)} fields, expected {len(header)} as in the "
                    f"header; a field with {separator!r} in it needs quotes, and no {separator!r} ends a row"
                )
    return [name.strip() or f"Unnamed: {place}" for place, name in enumerate(header)]


def _quoted(path: Path) -> bool:
    """Whether quotes in a TSV enclose fields, as spreadsheets write them, or are bare text, as in GLUE.

    They enclose if some field is wrapped whole in quotes and none has a quote that does not fit. Fields with
    line breaks do not fit in their lines: they count if the file is whole with them.

    Raises:
        DataError: a line is cut short by a quote that opens or closes in it, and the file is not.
    """
    wrapped = re.compile(r'"(?:[^"]|"")*"')
    seen, bare, width = False, False, 0
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if width and '"' not in line:
                continue
            fields = line.rstrip("\r\n").split("\t")
            width = width or len(fields)
            unfit = [field for field in fields if '"' in field and not wrapped.fullmatch(field)]
            seen, bare = seen or '"' in line, bare or bool(unfit)
            cut = any(field.startswith('"') or field.endswith('"') for field in unfit)
            if cut and len(fields) < width:
                if _whole(path):
                    return True
                raise DataError(
                    f"{path}: line {number} has {len(fields)} fields, expected {width} as in the header, and "
                    "a quote without its pair: a line break in a field? close the quote, or save as .jsonl"
                )
    return seen and not bare


def _whole(path: Path) -> bool:
    """Whether all rows of a TSV are as long as its header where quotes enclose fields."""
    with _open(path) as lines:
        try:
            return len({len(row) for row in csv.reader(lines, delimiter="\t", strict=True) if row}) == 1
        except csv.Error:
            return False


@contextmanager
def _open(path: Path) -> Iterator[Iterator[str]]:
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
        yield lines


def _paragraphs(document: str) -> dict[str, list[str | None]]:
    """Plain text cut at blank lines; a column `speaker` where paragraphs begin as in a play ("SPEAKER:")."""
    text = [part.strip("\n") for part in re.split(r"\n[ \t]*(?:\n[ \t]*)+", document) if part.strip()]
    speakers: list[str | None] = []
    for part in text:
        match = SPEAKER.match(part)
        speakers.append(match[1].strip() if match else speakers[-1] if speakers else None)
    return {"text": [*text]} | ({"speaker": speakers} if any(speakers) else {})


def columns_of(loaded: datasets.Dataset) -> dict[str, Sequence[Any]]:
    """The columns of a data set; class numbers become class names, and -1 (hidden) becomes None."""
    columns: dict[str, Sequence[Any]] = {name: loaded[name] for name in loaded.column_names}
    for name, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):
            columns[name] = [
                None if value is None or value < 0 else feature.names[value] for value in loaded[name][:]
            ]
    return columns


def root_cause(error: BaseException) -> str:
    """The first line of the error at the bottom: `datasets` wraps parser errors in words that help nobody."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no log lines from `datasets` and the hub: our one line says it."""
    bars = datasets.are_progress_bars_disabled()
    levels = datasets_logging.get_verbosity(), hub_logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if not bars:
            datasets.enable_progress_bars()
