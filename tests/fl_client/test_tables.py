"""A corpus is what the files hold, capped by seed; what is held out is the same for every seed."""

import json
from pathlib import Path

import pytest

from fl_client.tables import Corpus, Table, load_corpus
from vblora.errors import ConfigError, DataError


def _write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _numbered(path: Path, count: int = 100, labels: int = 3) -> str:
    return _write(path, [{"text": f"row {row}", "label": row % labels} for row in range(count)])


def test_take_keeps_columns_together() -> None:
    table = Table(["a", "b", "c"], label=["0", "1", "2"], group=["x", "y", "z"])
    assert table.take([2, 0]) == Table(["c", "a"], label=["2", "0"], group=["z", "x"])
    assert len(table.take([])) == 0


def test_columns_have_one_length() -> None:
    with pytest.raises(DataError, match=r"columns of \[1, 2\] entries"):
        Table(["a", "b"], label=["0"])


def test_labels_are_in_order_of_number(tmp_path: Path) -> None:
    corpus = load_corpus(_numbered(tmp_path / "rows.jsonl", labels=12), "auto")
    assert corpus.labels == tuple(str(label) for label in range(12))
    assert corpus.name == "rows"
    assert corpus.versions == {}


def test_whole_numbers_with_gaps_stay_whole(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": f"row {row}", "label": float(row % 2)} for row in range(40)]
    rows.append({"text": "no label", "label": None})
    corpus = load_corpus(_write(tmp_path / "rows.jsonl", rows), "classification")
    assert corpus.labels == ("0", "1")
    assert "no label" not in corpus.train.text + corpus.test.text


def test_blank_rows_are_dropped(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": text, "label": label} for text in "abcdef" for label in "xy"]
    blank: list[dict[str, object]] = [
        {"text": " \n", "label": "x"},
        {"text": None, "label": "x"},
        {"text": "g", "label": ""},
    ]
    corpus = load_corpus(_write(tmp_path / "rows.jsonl", blank + rows), "classification")
    assert sorted(corpus.train.text + corpus.test.text) == sorted("abcdef" * 2)


@pytest.mark.parametrize(("count", "held_out"), [(8, 1), (300, 30), (30_000, 2000)])
def test_a_tenth_is_held_out(tmp_path: Path, count: int, held_out: int) -> None:
    """The same whatever the seed: runs with several are scored on the same texts."""
    data = _numbered(tmp_path / "rows.jsonl", count)
    corpus = load_corpus(data, "classification", seed=1)
    assert len(corpus.test) == held_out
    assert sorted(corpus.train.text + corpus.test.text) == sorted(f"row {row}" for row in range(count))
    assert load_corpus(data, "classification", seed=2) == corpus


def test_settings_are_chosen_on_a_tenth_of_the_training_texts(tmp_path: Path) -> None:
    """Drawn by seed, and never of what other runs are scored on."""
    data = _numbered(tmp_path / "rows.jsonl", 300)
    scored = set(load_corpus(data, "classification").test.text)
    chosen = [load_corpus(data, "classification", eval_split="train", seed=seed) for seed in (1000, 1001)]
    for corpus in chosen:
        assert (len(corpus.train), len(corpus.test)) == (243, 27)
        assert not scored & set(corpus.train.text + corpus.test.text)
        assert not set(corpus.train.text) & set(corpus.test.text)
    assert chosen[0].test != chosen[1].test


def test_docstrings_to_choose_settings_on_are_of_other_modules() -> None:
    """As those of the test part are: what tells modules apart would look like learning."""
    corpus = load_corpus("docstrings", "classification", eval_split="train", max_examples=400, seed=1000)
    train, held_out = set(corpus.train.group or ()), set(corpus.test.group or ())
    assert len(held_out) > 1
    assert not train & held_out


def test_a_tenth_of_train_where_there_are_other_files(tmp_path: Path) -> None:
    for name, count in (("train.jsonl", 100), ("test.jsonl", 20)):
        _numbered(tmp_path / name, count)
    corpus = load_corpus(str(tmp_path), "classification", eval_split="train")
    assert (len(corpus.train), len(corpus.test)) == (90, 10)


def test_equal_prompts_are_carved_together(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": f"prompt {row // 5}", "completion": f"reference {row}"} for row in range(500)
    ]
    corpus = load_corpus(_write(tmp_path / "rows.jsonl", rows), "causal-lm")
    assert not set(corpus.train.text) & set(corpus.test.text)
    assert len(corpus.test) == 50
    assert corpus.labels == ()


def test_a_rare_label_stays_in_train(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": f"row {row}", "label": f"l{row // 2}"} for row in range(40)]
    data = _write(tmp_path / "rows.jsonl", rows)
    for seed in range(8):
        corpus = load_corpus(data, "classification", label_column="label", seed=seed)
        assert len(corpus.labels) == 20
        assert set(corpus.test.label or ()) <= set(corpus.train.label or ())


def test_a_column_that_nobody_named_holds_classes_or_none(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": f"row {row}", "target": f"l{row // 2}"} for row in range(40)]
    data = _write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"'target' holds 20 values in 36 rows, hardly classes; .*--labels"):
        load_corpus(data, "classification")
    names = tuple(f"l{row}" for row in range(20))
    assert len(load_corpus(data, "classification", labels=names).labels) == 20


def test_max_examples_is_a_seeded_subset_in_order(tmp_path: Path) -> None:
    data = _numbered(tmp_path / "rows.jsonl")
    everything = load_corpus(data, "classification", seed=3)
    some = load_corpus(data, "classification", seed=3, max_examples=20)
    place = [everything.train.text.index(text) for text in some.train.text]
    assert len(set(place)) == 20
    assert place == sorted(place)
    assert some.test == everything.test
    assert load_corpus(data, "classification", seed=3, max_examples=1000) == everything


def test_several_files_and_a_group_that_only_train_has(tmp_path: Path) -> None:
    for part, count in (("train-a", 6), ("train-b", 4)):
        rows: list[dict[str, object]] = [
            {"text": f"{part} {row}", "label": row % 2, "ward": part} for row in range(count)
        ]
        _write(tmp_path / f"{part}.jsonl", rows)
    _numbered(tmp_path / "test.jsonl", 5, 2)
    corpus = load_corpus(str(tmp_path), "classification", group_column="ward")
    assert corpus.train.group == ["train-a"] * 6 + ["train-b"] * 4
    assert corpus.test.group is None
    assert len(corpus.test) == 5


def test_joined_columns_skip_blanks(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"instruction": f"do {row}", "input": "this" if row % 2 else "", "output": "ok"} for row in range(20)
    ]
    corpus = load_corpus(_write(tmp_path / "rows.jsonl", rows), "auto")
    assert set(corpus.train.text + corpus.test.text) == {
        f"do {row}" + ("\n\nthis" if row % 2 else "") for row in range(20)
    }


def test_speakers_group_a_play(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_text("\n\n".join(f"{'ANNA' if row % 2 else 'BEN'}:\nline {row}" for row in range(20)))
    corpus = load_corpus(str(path), "causal-lm", group_column="speaker")
    assert set(corpus.train.group or ()) == {"ANNA", "BEN"}
    assert corpus.train.completion is None
    path.write_text("no play\n\nat all")
    with pytest.raises(DataError, match="no group column 'speaker'; found 'text'"):
        load_corpus(str(path), "causal-lm", group_column="speaker")


def test_bad_data_is_said_in_one_line(tmp_path: Path) -> None:
    same: list[dict[str, object]] = [{"text": str(row), "label": "x"} for row in range(30)]
    with pytest.raises(DataError, match=r"one\.jsonl: label column 'label' holds one value only, 'x'"):
        load_corpus(_write(tmp_path / "one.jsonl", same), "classification")
    with pytest.raises(DataError, match="found no row with text in all of 'text', 'label'"):
        load_corpus(_write(tmp_path / "none.jsonl", [{"text": "", "label": "x"}]), "classification")
    with pytest.raises(DataError, match="1 rows are too few to hold some out"):
        load_corpus(_write(tmp_path / "few.jsonl", [{"text": "a"}]), "causal-lm")
    (tmp_path / "lines.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(
        DataError, match=r"add rows \(a \.txt file is cut into rows at blank lines\) or a test"
    ):
        load_corpus(str(tmp_path / "lines.txt"), "causal-lm")
    nested: list[dict[str, object]] = [{"text": ["a", "b"], "label": "x"}]
    with pytest.raises(DataError, match="column 'text' holds list values, expected text"):
        load_corpus(_write(tmp_path / "nested.jsonl", nested), "classification")
    with pytest.raises(ConfigError, match="max_examples is -1, expected 0"):
        load_corpus(_numbered(tmp_path / "rows.jsonl"), "classification", max_examples=-1)


def test_evaluated_files_must_fit_train(tmp_path: Path) -> None:
    _numbered(tmp_path / "train.jsonl", 10, 2)
    _numbered(tmp_path / "test.jsonl", 10, 4)
    with pytest.raises(DataError, match=r"has 2 values in the evaluated part .* \('2', '3'\)"):
        load_corpus(str(tmp_path), "classification")
    _write(tmp_path / "test.jsonl", [{"text": "a", "labl": 0}])
    with pytest.raises(
        DataError, match=r"test\.jsonl: no column 'label', which train has; found 'text', 'labl'"
    ):
        load_corpus(str(tmp_path), "classification")


def _sizes(corpus: Corpus) -> tuple[int, int, int]:
    return len(corpus.train), len(corpus.test), len(corpus.labels)


@pytest.mark.assets
def test_sst2(assets: Path) -> None:
    corpus = load_corpus(str(assets / "data/sst2"), "auto")
    assert _sizes(corpus) == (67_349, 872, 2)
    assert corpus.train.text[0] == "hide new secretions from the parental units "
    both = load_corpus(
        str(assets / "data/sst2"), "classification", eval_split="dev+test", max_examples=16_000
    )
    assert _sizes(both) == (16_000, 872 + 1821, 2)


@pytest.mark.assets
def test_banking77(assets: Path) -> None:
    corpus = load_corpus(str(assets / "data/banking77"), "auto")
    assert _sizes(corpus) == (10_003, 3080, 77)


@pytest.mark.assets
def test_e2e(assets: Path) -> None:
    corpus = load_corpus(str(assets / "data/e2e"), "auto")
    assert _sizes(corpus) == (4672, 4693, 0)
    assert corpus.train.completion is not None
    assert corpus.train.completion[0].startswith("There is a place in the city centre, Alimentum")


@pytest.mark.assets
def test_gsm8k(assets: Path) -> None:
    corpus = load_corpus(str(assets / "data/gsm8k"), "auto")
    assert _sizes(corpus) == (7473, 1319, 0)
    assert corpus.train.completion is not None
    assert corpus.train.completion[0].endswith("#### 72")


@pytest.mark.assets
def test_t0(assets: Path) -> None:
    data = str(assets / "data/instruct/t0_train_50k.jsonl.gz")
    corpus = load_corpus(data, "auto", group_column="task", max_examples=5000)
    assert _sizes(corpus) == (5000, 2000, 0)
    assert len(set(corpus.train.group or ())) > 250


@pytest.mark.assets
def test_tinyshakespeare(assets: Path) -> None:
    corpus = load_corpus(str(assets / "data/text/tinyshakespeare.txt"), "auto", group_column="speaker")
    assert _sizes(corpus) == (6500, 722, 0)
    assert {"KING RICHARD II", "Nurse"} <= set(corpus.train.group or ())
