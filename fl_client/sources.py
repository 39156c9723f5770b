"""Where raw columns come from: local files and hub data sets, both read through Hugging Face `datasets`."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import huggingface_hub

from fl_client.raw import FORMATS, Frame, columns_of, quiet, read_file, root_cause, suffix_of
from vblora.errors import ConfigError, DataError

__all__ = ["read_source"]

EVAL_NAMES = {"dev": "dev", "validation": "dev", "valid": "dev", "val": "dev", "test": "test"}
# Followed by no letter, but for "set" and "data": "trainset", "test_labeled", no "tester" or "device".
SPLIT_NAME = re.compile(
    r"(?:(train(?:ing)?)|(dev(?:elopment)?|valid(?:ation)?|val)|(test(?:ing)?))(?:set|data)?(?![^\W\d_])"
)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def read_source(
    data: str, eval_split: str = "", cache_dir: Path | None = None
) -> tuple[list[Frame], list[Frame]]:
    """Read the training and the evaluation part of a local file, a local folder or a hub data set.

    A folder is split by file names (train*, dev* or val*, test*). Where nothing is called train, the dev
    part is trained on and the test part evaluated (E2E), and a lone part is trained on.

    Args:
        data: path, or hub id `OWNER/NAME`, `OWNER/NAME:CONFIG`.
        eval_split: "dev", "test", "dev+test", or "" or "train": dev where there is one, else test, else none.
        cache_dir: where `datasets` keeps what it downloads from the hub (its own default if None). Local
            files leave nothing behind: private text stays where it is.

    Returns:
        Frames of the training part (at least one) and of the evaluation part (none where it has to be carved
        off).

    Raises:
        ConfigError: an unknown `eval_split`.
        DataError: nothing there, or nothing that can be read.
    """
    wanted = _wanted_splits(eval_split)
    path = Path(data).expanduser()
    if path.exists():
        files = {"train": [path]} if path.is_file() else _files_by_split(path)
        train, held_out = _choose(data, list(files), wanted)
        return (
            [read_file(file) for file in files[train]],
            [read_file(file) for split in held_out for file in files[split]],
        )
    if path.is_absolute() or data.startswith((".", "~")) or suffix_of(path) or not HUB_ID.fullmatch(data):
        raise DataError(f"{data}: no such file or folder")
    hub = _read_hub(data, cache_dir)
    train, held_out = _choose(data, list(hub), wanted)
    return hub[train], [frame for split in held_out for frame in hub[split]]


def _wanted_splits(eval_split: str) -> tuple[str, ...]:
    names = [name.strip() for name in eval_split.split("+")] if eval_split not in ("", "train") else []
    if any(name not in EVAL_NAMES for name in names):
        raise ConfigError(f"eval-split is {eval_split!r}, expected 'dev', 'test', 'dev+test', 'train' or ''")
    return tuple(dict.fromkeys(EVAL_NAMES[name] for name in names))


def _choose(data: str, splits: Sequence[str], wanted: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Which split to train on and which to evaluate, of "train", "dev", "test" and others as named."""
    listed = ", ".join(splits)
    if "train" in splits:
        train = "train"
    elif set(splits) == {"dev", "test"}:
        train = "dev"
    elif len(splits) == 1:
        train = splits[0]
    else:
        raise DataError(f"{data}: found no training part among {listed}; name one train*")
    rest = [split for split in splits if split != train]
    absent = [split for split in wanted if split not in rest]
    if absent:
        raise DataError(f"{data}: no split {absent[0]!r} to evaluate on; found {listed}, trained on {train}")
    return train, wanted or next(((split,) for split in ("dev", "test") if split in rest), ())


def _split_of(name: str) -> str:
    """How the name of a file or of a hub split begins: train, dev (or validation), test; else the name."""
    match = SPLIT_NAME.match(name.lower())
    return name if match is None else ("train", "dev", "test")[(match.lastindex or 1) - 1]


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The readable files of a folder by split, in order of name; every split in one format."""
    readable = sorted(path for path in folder.iterdir() if path.is_file() and suffix_of(path))
    splits: dict[str, list[Path]] = {}
    for path in readable:
        if (split := _split_of(path.name)) in ("train", "dev", "test"):
            splits.setdefault(split, []).append(path)
    if not splits and len(readable) == 1:
        return {"train": readable}
    if not splits:
        names = ", ".join(path.name for path in readable[:8]) or "nothing readable"
        endings = " ".join(FORMATS)
        raise DataError(
            f"{folder}: found {names}; expected files named train*, dev* or test* ({endings}, .gz)"
        )
    for files in splits.values():
        formats = {"".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix for path in files}
        if len(formats) > 1:  # probably the same rows twice
            raise DataError(
                f"{folder}: found {files[0].name} beside {files[-1].name}; keep one format, or name a file"
            )
    return splits


def _read_hub(data: str, cache_dir: Path | None) -> dict[str, list[Frame]]:
    name, _, config = data.partition(":")
    with quiet(), _offline_if_unreachable():
        try:
            loaded = datasets.load_dataset(name, config or None, cache_dir=cache_dir and str(cache_dir))
        except Exception as error:  # the hub, the network and builders raise anything
            raise DataError(
                f"{data}: neither a local file or folder nor a hub data set within reach: {root_cause(error)}"
            ) from error
    splits: dict[str, list[Frame]] = {}
    for split, part in loaded.items():
        splits.setdefault(_split_of(split), []).append(Frame(f"{data} ({split})", columns_of(part)))
    return splits


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Without a network, ask only the local hub cache: the hub client would retry for 23 s first."""
    host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname or ""
    try:
        if not getproxies():  # a proxy resolves names for us
            socket.getaddrinfo(host, None)
        reachable = True
    except OSError:
        reachable = False
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not reachable:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
