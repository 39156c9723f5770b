"""A data set as it is trained on: parallel columns of text, label, completion and group."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fl_client import docstrings
from fl_client.chats import Chat, answers, opening, read_chat
from fl_client.columns import Roles, Task, find_roles
from fl_client.raw import Frame, suffix_of
from fl_client.sources import read_source
from vblora.errors import ConfigError, DataError

__all__ = ["Corpus", "Table", "load_corpus"]

CARVED_SHARE, MOST_CARVED = 10, 2000  # one row in ten is held out where the data has no part to evaluate on
SPLIT = 0  # seed of that part: what is held out belongs to the data, not to a run
MODULE = "module"  # the group of docstrings: their test part has other modules than train


@dataclass(frozen=True)
class Table:
    """Parallel columns, one entry an example.

    text: the text to classify or to learn; with completions, the prompt.
    label: label names (classification).
    completion: what follows the prompt (causal-lm).
    group: what a partition keeps together or goes by.
    chat: the messages that stand before each completion, where there are any; `text` then joins them.
    """

    text: list[str]
    label: list[str] | None = None
    completion: list[str] | None = None
    group: list[str] | None = None
    chat: list[Chat] | None = None

    def __post_init__(self) -> None:
        lengths = {
            len(column)
            for column in (self.text, self.label, self.completion, self.group, self.chat)
            if column is not None
        }
        if len(lengths) > 1:
            raise DataError(f"table: columns of {sorted(lengths)} entries, expected equal lengths")

    def __len__(self) -> int:
        return len(self.text)

    def take(self, indices: Iterable[int]) -> Table:
        """The rows at these positions, in this order."""
        places = [int(place) for place in indices]

        def pick(column: list[Any] | None) -> list[Any] | None:
            return None if column is None else [column[place] for place in places]

        others = map(pick, (self.label, self.completion, self.group, self.chat))
        return Table([self.text[place] for place in places], *others)


@dataclass(frozen=True)
class Corpus:
    """What a run trains and evaluates on.

    labels: sorted names, by number where all are whole numbers; () for causal-lm.
    versions: where the text depends on what is installed, of what; else {}.
    """

    name: str
    train: Table
    test: Table
    labels: tuple[str, ...]
    versions: dict[str, str]


def load_corpus(
    data: str,
    task: str,
    *,
    text_column: str = "",
    label_column: str = "",
    group_column: str = "",
    eval_split: str = "",
    labels: tuple[str, ...] = (),
    max_examples: int = 0,
    seed: int = 0,
    cache_dir: Path | None = None,
) -> Corpus:
    """Read a data set and find what it is made of.

    Rows whose text, label, completion or messages are missing or blank are dropped. A column of messages
    gives a row for each of the assistant's answers, with all that stands before as its prompt. A plain .txt
    file is cut at blank lines; where paragraphs begin with "SPEAKER:", `group_column="speaker"` groups by it.

    Args:
        data: "docstrings" (the embedded data set), a local file (csv, tsv, json, jsonl, parquet, txt; .gz
            too), a folder with train*, dev*, valid* or test* files, or a hub id OWNER/NAME or
            OWNER/NAME:CONFIG.
        task: "classification", "causal-lm", or "auto" (see `columns.find_roles`, as for the column names).
        text_column: text or prompt; found by its usual names if "". "a+b" joins two columns by a blank line.
        label_column: label, or completion for causal-lm; found by its usual names if "".
        group_column: column of `Table.group`; "" for none (docstrings: the module).
        eval_split: "dev", "test", "dev+test", or "": dev where there is one, else test, else a tenth (2,000
            rows at most) carved off train, the same for every seed, equal texts kept on one side. "train"
            leaves what "" evaluates aside and carves a tenth off the rest by the seed: to choose settings on
            (of docstrings whole modules, as the test part has others than train).
        labels: names of all classes, where the data need not hold every one; () takes those of the data.
        max_examples: training rows, a seeded random subset in the original order; 0 for all.
        seed: of what is capped, and carved for "train"; for docstrings, of which modules are read.
        cache_dir: see `docstrings.load` and `sources.read_source`; None for their own defaults.

    Raises:
        ConfigError: an unknown task or `eval_split`, or a negative `max_examples`.
        DataError: nothing there, unreadable, empty, a column that is missing, one label only, test labels
            that train does not have, labels that are not among `labels`, or a label column that nobody has
            named with more values than half its rows.
    """
    if max_examples < 0:
        raise ConfigError(f"max_examples is {max_examples}, expected 0 (all) or more")
    versions: dict[str, str] = {}
    if data == "docstrings":
        train_frames, test_frames, versions = _docstring_frames(eval_split, max_examples, seed, cache_dir)
        group_column = group_column or MODULE
    else:
        train_frames, test_frames = read_source(data, eval_split, cache_dir)
    kind, roles = find_roles(
        list(train_frames[0].columns),
        task,
        train_frames[0].where,
        text_column=text_column,
        label_column=label_column,
        group_column=group_column,
    )
    train = _read_table(train_frames, roles)
    if test_frames:
        grouped = all(roles.group in frame.columns for frame in test_frames)
        test = _read_table(test_frames, roles if grouped else replace(roles, group=""))
    else:
        train, test = _carve(train, SPLIT, data)
    if eval_split == "train":
        train, test = _carve(train, seed, data, by_group=data == "docstrings" and group_column == MODULE)
    where = f"{data}: label column {roles.label!r}"
    found = _labels(train, test, kind, labels, where, guessed=not label_column)
    if 0 < max_examples < len(train):
        chosen = np.random.default_rng(seed).choice(len(train), max_examples, replace=False)
        train = train.take(np.sort(chosen))
    path = Path(data).expanduser()
    return Corpus((path.exists() and path.name.split(".")[0]) or data, train, test, found, versions)


def _docstring_frames(
    eval_split: str, max_examples: int, seed: int, cache_dir: Path | None
) -> tuple[list[Frame], list[Frame], dict[str, str]]:
    if eval_split not in ("", "test", "train"):
        raise DataError(f"docstrings: no split {eval_split!r} to evaluate on; found train, test")
    read = docstrings.load(max_examples, seed, cache_dir)
    frames = [
        Frame(
            "docstrings",
            {name: [getattr(row, name) for row in part] for name in ("text", "library", "module")},
        )
        for part in (read.train, read.test)
    ]
    return frames[:1], frames[1:], read.versions


def _read_table(frames: Sequence[Frame], roles: Roles) -> Table:
    """The rows of all frames whose text, label and completion are there."""
    if roles.chat:
        return _read_chats(frames, roles)
    rows = [row for frame in frames for row in _rows(frame, roles) if all(part.strip() for part in row[:3])]
    if not rows:
        names = ", ".join(map(repr, roles.named))
        raise DataError(f"{frames[0].where}: found no row with text in all of {names}")
    text, label, completion, group = (list(column) for column in zip(*rows, strict=True))
    return Table(
        text,
        label if roles.label else None,
        completion if roles.completion else None,
        group if roles.group else None,
    )


def _read_chats(frames: Sequence[Frame], roles: Roles) -> Table:
    """A row for every answer of every conversation."""
    rows = []
    for frame in frames:
        _require_columns(frame, roles)
        cells = frame.columns[roles.chat][:]
        groups = _strings(frame, roles.group) if roles.group else [""] * len(cells)
        for cell, group in zip(cells, groups, strict=True):
            if _missing(cell):
                continue
            chat = read_chat(cell, f"{frame.where}: column {roles.chat!r}")
            rows += [(before, answer, group) for before, answer in answers(chat)]
    if not rows:
        raise DataError(f"{frames[0].where}: column {roles.chat!r} holds no answer of an assistant")
    chats, completions = [chat for chat, _, _ in rows], [answer for _, answer, _ in rows]
    text = ["\n\n".join(content for _, content in chat) for chat in chats]
    of_group = [group for _, _, group in rows] if roles.group else None
    return Table(text, None, completions, of_group, chats)


def _missing(cell: Any) -> bool:
    """Whether a cell of messages is empty or blank."""
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())


def _require_columns(frame: Frame, roles: Roles) -> None:
    missing = [name for name in roles.named if name not in frame.columns]
    if missing:
        found = ", ".join(map(repr, frame.columns))
        raise DataError(f"{frame.where}: no column {missing[0]!r}, which train has; found {found}")


def _rows(frame: Frame, roles: Roles) -> Iterator[tuple[str, str, str, str]]:
    """(text, label, completion, group) of each row; a role that no column plays repeats the text."""
    _require_columns(frame, roles)
    parts = zip(*(_strings(frame, name) for name in roles.text), strict=True)
    text = ["\n\n".join(part for part in row if part.strip()) for row in parts]
    label = [name.strip() for name in _strings(frame, roles.label)] if roles.label else text
    completion = _strings(frame, roles.completion) if roles.completion else text
    group = _strings(frame, roles.group) if roles.group else text
    return zip(text, label, completion, group, strict=True)


def _strings(frame: Frame, name: str) -> list[str]:
    """A column as text: "" for what is missing, "1" for 1.0 (a column of whole numbers with gaps is stored
    as floats)."""

    def text(value: Any) -> str:
        if value is None or value != value:
            return ""
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        if isinstance(value, (list, tuple, dict, bytes)):
            raise DataError(
                f"{frame.where}: column {name!r} holds {type(value).__name__} values, expected text"
            )
        return str(value)

    return [text(value) for value in frame.columns[name][:]]


def _carve(table: Table, seed: int, where: str, *, by_group: bool = False) -> tuple[Table, Table]:
    """Hold out a tenth of the rows, at least one and about 2,000 at most.

    Equal texts go to one side (a prompt with several references must not be on both), as do the answers of
    one conversation or whole groups, and a row whose label would be missing from train stays there.
    """
    keys = table.text if table.chat is None else [opening(chat) for chat in table.chat]
    keys = table.group if by_group and table.group is not None else keys
    place = {text: number for number, text in enumerate(dict.fromkeys(keys))}
    which = np.array([place[text] for text in keys])
    order = np.random.default_rng(seed).permutation(len(place))
    goal = min(max(1, len(table) // CARVED_SHARE), MOST_CARVED)
    held_texts = np.searchsorted(np.cumsum(np.bincount(which)[order]), goal) + 1
    held = np.isin(which, order[:held_texts])
    if table.label is not None:
        label = np.asarray(table.label)
        held &= np.isin(label, label[~held])
    if not held.any() or held.all():
        cut = " (a .txt file is cut into rows at blank lines)" if suffix_of(Path(where)) == ".txt" else ""
        raise DataError(
            f"{where}: {len(table)} rows are too few to hold some out (equal texts stay on one side); "
            f"add rows{cut} or a test file"
        )
    return table.take(np.flatnonzero(~held)), table.take(np.flatnonzero(held))


def _labels(
    train: Table, test: Table, task: Task, known: tuple[str, ...], where: str, *, guessed: bool
) -> tuple[str, ...]:
    """All label names in order; none for causal-lm."""
    if task == "causal-lm" or train.label is None or test.label is None:
        if known:
            raise DataError(f"{where}: --labels are given, but {task} has none; leave them out")
        return ()
    names = set(known or train.label)
    if len(names) < 2:
        raise DataError(
            f"{where} holds one value only, {min(names)!r}; expected at least two classes, or --labels with "
            "all that the other sites hold"
        )
    if (
        guessed and not known and 2 * len(names) > len(train)
    ):  # summaries, say: no text becomes a label's name
        raise DataError(
            f"{where} holds {len(names)} values in {len(train)} rows, hardly classes; if they are, name it "
            "with --label-column, or all of them with --labels"
        )
    if known and (unknown := set(train.label) - names):
        raise DataError(
            f"{where} has {len(unknown)} values that are not among the {len(names)} of --labels "
            f"({_listed(unknown)}); add them for every site, or mend the data"
        )
    if unseen := set(test.label) - names:
        raise DataError(
            f"{where} has {len(unseen)} values in the evaluated part that "
            f"{'--labels do' if known else 'train does'} not have ({_listed(unseen)}); "
            "name another column with --label-column, or other files with --eval-split"
        )
    whole = all(re.fullmatch(r"-?\d+", name) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name) if whole else (0, name)))


def _listed(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names)[:5])) + (" ..." if len(names) > 5 else "")
