"""The embedded data set: the same everywhere, distinct, training and test disjoint, quick to read again."""

import re
from collections import Counter
from pathlib import Path

import pytest

from fl_client import docstrings
from fl_client.docstrings import collect, first_paragraphs, installed, load
from fl_client.tables import load_corpus
from vblora.errors import DataError

SOURCE = '''"""A module docstring that is
   long   enough to stay.

A second paragraph.
"""
import os

class Thing:
    """A class docstring that is long enough."""

    def method(self):
        "Too short."

        async def inner():
            """An inner function with its own docstring."""

if os.name:
    def under_a_condition():
        """A function that is defined under a condition."""
try:
    pass
except OSError:
    def in_a_handler():
        r"""A function with \\d in a handler, never seen."""
text = """Not a docstring at all, but long enough."""
'''


@pytest.fixture
def libraries(tmp_path: Path) -> dict[str, Path]:
    """Two small libraries of 60 modules with 3 docstrings each."""
    roots = {}
    for label in ("alpha", "beta"):
        roots[label] = tmp_path / label / "src"
        for number in range(60):
            path = roots[label] / f"part{number % 4}" / f"m{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            words = [f"Function {place} of module {number} of {label}." for place in range(3)]
            path.write_text("".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(words)))
    return roots


def test_first_paragraphs_are_folded(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    assert first_paragraphs(path) == [
        "A module docstring that is long enough to stay.",
        "A class docstring that is long enough.",
        "An inner function with its own docstring.",
        "A function that is defined under a condition.",
        "A function with \\d in a handler, never seen.",
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"# This file is auto-generated.\n" + SOURCE.encode(),
        b"# DO NOT EDIT\n" + SOURCE.encode(),
        b"def broken(:\n",
        b"\x00",
        b'"""Latin-1 without saying so: \xe9 and more."""',
        b"#" * 1_000_001,
    ],
)
def test_generated_and_unparsable_files_have_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "module.py"
    path.write_bytes(content)
    assert first_paragraphs(path) == []
    assert first_paragraphs(tmp_path / "missing.py") == []


def test_training_and_test_modules_are_disjoint_and_balanced(libraries: dict[str, Path]) -> None:
    train, test = collect(libraries, 100, 0)
    assert not {row.module for row in train} & {row.module for row in test}
    assert len(train) == 100
    assert max(Counter(row.library for row in train).values()) <= 52
    assert 0 < len(test) <= 60
    assert all(row.module.startswith(row.library + ".part") for row in train + test)


def test_seed_picks_the_modules_but_not_the_split(libraries: dict[str, Path]) -> None:
    first, second = collect(libraries, 60, 0), collect(libraries, 60, 1)
    assert collect(libraries, 60, 0) == first
    assert {row.module for row in first[0]} != {row.module for row in second[0]}
    assert not {row.module for row in first[0]} & {row.module for row in second[1]}


def test_no_text_twice_and_none_of_two_libraries(libraries: dict[str, Path]) -> None:
    shared, repeated = "A sentence that both libraries have.", "A sentence that alpha has twice."
    for label, text in (("alpha", shared), ("beta", shared), ("alpha", repeated), ("alpha", repeated)):
        for number in range(20):
            module = libraries[label] / f"{len(text)}_{number}.py"
            module.write_text(f'"""{text}"""')
    train, test = collect(libraries, 0, 0)
    texts = [row.text for row in train + test]
    assert len(texts) == len(set(texts)) == 361
    assert shared not in texts
    assert texts.count(repeated) == 1


def test_a_module_gives_twelve_at_most(tmp_path: Path) -> None:
    for label in ("alpha", "beta"):
        for number in range(20):
            path = tmp_path / label / f"m{number}.py"
            path.parent.mkdir(exist_ok=True)
            texts = [f"Function {place} of module {number} of {label}." for place in range(30)]
            path.write_text("".join(f'def f():\n    """{text}"""\n' for text in texts))
    train, test = collect({label: tmp_path / label for label in ("alpha", "beta")}, 0, 0)
    assert set(Counter(row.module for row in train + test).values()) == {12}


def test_tests_and_vendored_copies_are_skipped(libraries: dict[str, Path]) -> None:
    for place in (
        "tests/a.py",
        "_vendor/a.py",
        "test_a.py",
        "a_test.py",
        "conftest.py",
        "site-packages/a.py",
    ):
        path = libraries["alpha"] / place
        path.parent.mkdir(exist_ok=True)
        path.write_text('"""A sentence that must not be read."""')
    train, test = collect(libraries, 0, 0)
    assert "A sentence that must not be read." not in {row.text for row in train + test}


def test_one_library_is_not_enough(libraries: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="docstrings: found source files of alpha; expected at least two"):
        collect({"alpha": libraries["alpha"]}, 0, 0)


def _fake_install(monkeypatch: pytest.MonkeyPatch, roots: dict[str, Path], version: str = "1.0") -> None:
    monkeypatch.setattr(docstrings, "installed", lambda: (roots, dict.fromkeys(roots, version)))


def test_cache_gives_the_same_without_reading(
    libraries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_install(monkeypatch, libraries)
    monkeypatch.setenv("FEDVB_CACHE", str(tmp_path / "cache"))
    first = load(50, 0)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(docstrings, "collect", None)  # whoever calls it fails
    assert load(50, 0) == first
    with pytest.raises(TypeError):
        load(50, 1)
    _fake_install(monkeypatch, libraries, "1.1")
    with pytest.raises(TypeError):
        load(50, 0)


@pytest.mark.parametrize(
    ("old", "new"), [("alpha", "beta"), ("\n", ""), ("Function", "\x00"), ('"train"', '"tr"'), (".*", "")]
)
def test_damaged_cache_is_rebuilt(
    libraries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    _fake_install(monkeypatch, libraries)
    first = load(50, 0, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_text()
    path.write_text(re.sub(old, new, whole))
    assert load(50, 0, tmp_path / "cache") == first
    assert path.read_text() == whole
    path.write_bytes(whole.encode()[:-40])
    assert load(50, 0, tmp_path / "cache") == first


def test_a_cache_that_cannot_be_written_is_no_error(
    libraries: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _fake_install(monkeypatch, libraries)
    (tmp_path / "file").touch()
    assert len(load(50, 0, tmp_path / "file" / "cache").train) == 50
    assert "docstrings are not cached" in caplog.text


def test_the_real_thing(tmp_path: Path) -> None:
    corpus = load_corpus("docstrings", "auto", max_examples=300, cache_dir=tmp_path)
    roots, versions = installed()
    assert corpus.labels == tuple(sorted(roots))
    assert len(corpus.labels) >= 8
    assert corpus.versions == versions
    assert len(corpus.train) == 300
    assert len(corpus.test) == 200
    counts = Counter(corpus.train.label).values()
    assert max(counts) <= min(counts) + 12
    assert all(30 <= len(text) <= 400 for text in corpus.train.text)
    assert not set(corpus.train.group or ()) & set(corpus.test.group or ())
    assert load_corpus("docstrings", "auto", max_examples=300, cache_dir=tmp_path) == corpus


def test_docstrings_as_plain_text_and_by_library(
    libraries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_install(monkeypatch, libraries)
    plain = load_corpus("docstrings", "causal-lm", cache_dir=tmp_path)
    assert (plain.labels, plain.train.label) == ((), None)
    by_library = load_corpus("docstrings", "auto", group_column="library", cache_dir=tmp_path)
    assert by_library.train.group == by_library.train.label
    with pytest.raises(DataError, match="docstrings: no split 'dev' to evaluate on; found train, test"):
        load_corpus("docstrings", "auto", eval_split="dev", cache_dir=tmp_path)
    with pytest.raises(DataError, match="docstrings: no label column 'author'; found 'text', 'library'"):
        load_corpus("docstrings", "auto", label_column="author", cache_dir=tmp_path)
