"""The embedded data set: docstrings of the standard library and of installed ones, to classify by library.

Real text that every machine already holds: the first paragraphs (30 to 400 characters) of module, class and
function docstrings, read from source files with `ast`; no library is imported. Texts are distinct across
everything, and one that two libraries share is dropped. Training and test use disjoint modules (files),
split by a stable hash.

Nothing is masked. Some texts name their library ("Return a Tensor ...", "array_like"), most do not: it is
topic classification, easy above chance and far from solved, and whatever gives a library away does so for
every adapter that is compared.

A module gives twelve at most, so that no label rests on a handful of modules (some hold 130).

The same versions, seed and size give the same examples on every machine; `versions` says which versions were
read.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

from vblora.errors import DataError
from vblora.files import write_atomic

__all__ = ["Docstrings", "Example", "collect", "first_paragraphs", "installed", "load"]

# Label, import name, distribution. pyproject's extra `demo` installs them all; those missing are left out.
LIBRARIES = (
    ("matplotlib", "matplotlib", "matplotlib"),
    ("networkx", "networkx", "networkx"),
    ("numpy", "numpy", "numpy"),
    ("pandas", "pandas", "pandas"),
    ("scikit-learn", "sklearn", "scikit-learn"),
    ("scipy", "scipy", "scipy"),
    ("sympy", "sympy", "sympy"),
    ("torch", "torch", "torch"),
    ("transformers", "transformers", "transformers"),
)
STANDARD_LIBRARY = "python"
FORMAT = 1  # of the cache, and of every rule below: raise it when one changes
SHORTEST, LONGEST = 30, 400
TEST_PERCENT = 15
MOST_IN_MODULE = 12  # of one module, so that no label rests on a handful of them
LEAST_TEST, MOST_TEST = 200, 2000

TESTS = {"test", "tests", "testing", "idle_test", "conftest"}
VENDORED = {"_vendor", "vendor", "vendored", "_vendored", "externals", "extern", "_extern", "third_party"}
FOREIGN = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
GENERATED = re.compile(rb"auto-?\s?generated|automatically\s+generated|do\s+not\s+edit", re.IGNORECASE)
LARGEST = 1_000_000  # bytes; a longer source file was not written by hand

Documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Example:
    """One first paragraph, the library it comes from (the label), and its module (the group)."""

    text: str
    library: str
    module: str


@dataclass(frozen=True)
class Docstrings:
    """Training and test examples in the order they were read, and the versions they were read from."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]
    versions: dict[str, str]


def load(max_examples: int = 0, seed: int = 0, cache_dir: Path | None = None) -> Docstrings:
    """Read the data set, from the cache where it is there and whole.

    Args:
        max_examples: training examples to stop at (0: all, some 25,000 and 30 s); a fifth of it, at least 200
            and at most 2,000, for the test part.
        seed: picks the modules that are read.
        cache_dir: a folder for the cache (default: $FEDVB_CACHE, else ~/.cache/fedvb).

    Raises:
        DataError: fewer than two libraries have source files here.
    """
    roots, versions = installed()
    key = {"format": FORMAT, "max_examples": max_examples, "seed": seed, "versions": versions}
    folder = cache_dir or Path(os.environ.get("FEDVB_CACHE") or Path.home() / ".cache" / "fedvb")
    path = folder / f"docstrings-{_digest(json.dumps(key, sort_keys=True))[:16]}.jsonl"
    cached = _read_cache(path, key)
    if cached is not None:
        return Docstrings(*cached, versions)
    train, test = collect(roots, max_examples, seed)
    try:
        write_atomic(path, _to_lines(key, train, test))
    except OSError as error:  # a read-only home costs seconds, not the run
        logging.getLogger(__name__).warning("docstrings are not cached: %s", error)
    return Docstrings(train, test, versions)


def installed() -> tuple[dict[str, Path], dict[str, str]]:
    """Source folder and version of each library, by label, without importing any."""
    roots = {STANDARD_LIBRARY: Path(sysconfig.get_path("stdlib"))}
    versions = {STANDARD_LIBRARY: platform.python_version()}
    for label, package, distribution in LIBRARIES:
        try:
            spec = importlib.util.find_spec(package)
            version = importlib.metadata.version(distribution)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            continue
        if spec is not None and spec.origin is not None:
            roots[label], versions[label] = Path(spec.origin).parent, version
    return roots, versions


def collect(
    roots: Mapping[str, Path], max_examples: int, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Read modules, always one of the label with the fewest examples, until both parts are full.

    Args:
        roots: source folder of each label.

    Returns:
        Training and test examples.

    Raises:
        DataError: fewer than two labels have examples to train on.
    """
    room = {
        "train": max_examples or math.inf,
        "test": min(max(LEAST_TEST, max_examples // 5), MOST_TEST) if max_examples else MOST_TEST,
    }
    waiting = {split: _modules(roots, split, seed) for split in room}
    owner: dict[str, Example | None] = {}  # None: two libraries have this text
    part: dict[str, str] = {}
    count: Counter[tuple[str, str]] = Counter()
    while turn := _next_turn(room, waiting, count):
        split, label = turn
        module, path = waiting[split][label].pop()
        for text in first_paragraphs(path)[:MOST_IN_MODULE]:
            first = owner.get(text)
            if text in owner:
                if first is not None and first.library != label:
                    owner[text] = None
                    count[part[text], first.library] -= 1
            elif sum(count[split, name] for name in roots) < room[split]:
                owner[text], part[text] = Example(text, label, module), split
                count[split, label] += 1
    kept = [example for example in owner.values() if example is not None]
    train = tuple(example for example in kept if part[example.text] == "train")
    if len({example.library for example in train}) < 2:
        raise DataError(f"docstrings: found source files of {_names(train)}; expected at least two libraries")
    return train, tuple(example for example in kept if part[example.text] == "test")


def _next_turn(
    room: Mapping[str, float],
    waiting: Mapping[str, Mapping[str, list[tuple[str, Path]]]],
    count: Mapping[tuple[str, str], int],
) -> tuple[str, str] | None:
    """The part that has room, and its label with the fewest examples among those with modules left."""
    for split, modules in waiting.items():
        labels = [label for label, left in modules.items() if left]
        if labels and sum(count[split, label] for label in modules) < room[split]:
            return split, min(labels, key=lambda label: (count[split, label], label))
    return None


def _modules(roots: Mapping[str, Path], split: str, seed: int) -> dict[str, list[tuple[str, Path]]]:
    """Modules (name, file) of one part by label, in seeded order: the next to read is the last."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for label, root in sorted(roots.items()):
        modules = [(_module_name(label, root, path), path) for path in _source_files(root)]
        mine = [module for module in modules if _is_test(module[0]) == (split == "test")]
        found[label] = sorted(mine, key=lambda module: (_digest(f"{seed}:{module[0]}"), module))
    return found


def _module_name(label: str, root: Path, path: Path) -> str:
    return ".".join((label, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


def _is_test(module: str) -> bool:
    return int(_digest(module)[:8], 16) % 100 < TEST_PERCENT


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _source_files(root: Path) -> Iterator[Path]:
    """Python files below `root`, without tests and vendored copies of other libraries."""
    skipped = TESTS | VENDORED | FOREIGN
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        for name in names:
            stem, suffix = os.path.splitext(name)
            is_test = stem in TESTS or stem.startswith("test_") or stem.endswith("_test")
            if suffix == ".py" and not is_test:
                yield Path(folder, name)


def first_paragraphs(path: Path) -> list[str]:
    """The first paragraph of every docstring of a file, whitespace folded, of 30 to 400 characters, in file
    order.

    A generated file, and one that cannot be parsed, has none.
    """
    try:
        source = path.read_bytes()
        if len(source) > LARGEST or GENERATED.search(source[:2000]):
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    docstrings = (ast.get_docstring(node, clean=False) or "" for node in _documented(tree))
    paragraphs = (" ".join(re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0].split()) for text in docstrings)
    return [text for text in paragraphs if SHORTEST <= len(text) <= LONGEST]


def _documented(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Module, classes and functions, nested ones too (`ast.walk` would visit every expression as well)."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, Documented):
            yield node
        inner = [*getattr(node, "body", ()), *getattr(node, "handlers", ())]
        inner += [*getattr(node, "orelse", ()), *getattr(node, "finalbody", ())]
        stack.extend(child for child in reversed(inner) if isinstance(child, (ast.stmt, ast.ExceptHandler)))


def _names(examples: tuple[Example, ...]) -> str:
    return ", ".join(sorted({example.library for example in examples})) or "no library"


def _to_lines(key: object, train: tuple[Example, ...], test: tuple[Example, ...]) -> str:
    """The cache: a header line, then an example a line, training first."""
    body = "".join(json.dumps(astuple(example)) + "\n" for example in (*train, *test))
    return json.dumps({"key": key, "train": len(train), "sha256": _digest(body)}) + "\n" + body


def _read_cache(path: Path, key: object) -> tuple[tuple[Example, ...], tuple[Example, ...]] | None:
    """What `_to_lines` wrote for this key, or None where it is absent, damaged or another's."""
    try:
        first, _, body = path.read_text(encoding="utf-8").partition("\n")
        header = json.loads(first)
        if header["key"] != key or header["sha256"] != _digest(body):
            return None
        examples = tuple(Example(*json.loads(line)) for line in body.splitlines())
        return examples[: header["train"]], examples[header["train"] :]
    except (OSError, ValueError, KeyError, TypeError):
        return None
