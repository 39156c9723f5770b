"""Local files and folders arrive as they were written; what cannot be read is said in one line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from fl_client.raw import columns_of, read_file
from fl_client.sources import read_source
from vblora.errors import ConfigError, DataError

ROWS = [("null", "01"), ('he said "hi", twice', "1"), ("naïve\u2028line", "NA")]


def _csv(separator: str) -> str:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [separator.join(map(quoted, row)) for row in [("text", "label"), *ROWS]]
    return "\n".join(lines) + "\n"


def _jsonl() -> str:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("suffix", "content"),
    [("csv", _csv(",")), ("tsv", _csv("\t")), ("jsonl", _jsonl()), ("json", _jsonl())],
    ids=["csv", "tsv", "jsonl", "json"],
)
def test_every_value_arrives_as_written(tmp_path: Path, suffix: str, content: str, zipped: bool) -> None:
    path = tmp_path / (f"rows.{suffix}" + (".gz" if zipped else ""))
    path.write_bytes(gzip.compress(content.encode()) if zipped else content.encode())
    frame = read_file(path)
    assert list(zip(*(frame.columns[name][:] for name in ("text", "label")), strict=True)) == ROWS


def test_parquet_and_class_names(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    assert columns_of(rows)["label"][:] == ["good", "bad", None]
    path = tmp_path / "rows.parquet"
    rows.to_parquet(path)
    assert read_file(path).columns["label"][:] == ["good", "bad", None]


def test_bare_quotes_in_a_tsv_are_text(tmp_path: Path) -> None:
    path = tmp_path / "glue.tsv"
    path.write_text('sentence\tlabel\n"a film " of sorts\t1\nunclosed "\t0\n"\t1\n')
    assert read_file(path).columns["sentence"][:] == ['"a film " of sorts', 'unclosed "', '"']


@pytest.mark.parametrize("row", ['"one\n\ntwo"\t1', '1\t"one\n\ntwo"'])
def test_line_breaks_in_fields_of_a_tsv_are_text(tmp_path: Path, row: str) -> None:
    path = tmp_path / "sheet.tsv"
    path.write_text(f'a\tb\n{row}\n3\t"4"\n')
    frame = read_file(path)
    assert sorted(frame.columns[name][0] for name in "ab") == ["1", "one\n\ntwo"]
    assert [frame.columns[name][1] for name in "ab"] == ["3", "4"]


def test_blanks_around_the_names_of_columns_are_no_part_of_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text , label\n a,1\n")
    assert {name: column[:] for name, column in read_file(path).columns.items()} == {
        "text": [" a"],
        "label": ["1"],
    }


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_bytes("\ufeffANNA:\nHello.".encode())
    assert read_file(path).columns["text"][:] == ["ANNA:\nHello."]


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\r\none,1\r\ntwo,2\r\n")
    frame = read_file(path)
    assert {name: column[:] for name, column in frame.columns.items()} == {
        "text": ["one", "two"],
        "label": ["1", "2"],
    }


def test_plain_text_is_cut_at_blank_lines_and_knows_speakers(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_text("ANNA:\nHello.\nYou there?\n\n\nBEN:\nYes.\n \nStill here: yes.\n")
    columns = read_file(path).columns
    assert columns["text"][:] == ["ANNA:\nHello.\nYou there?", "BEN:\nYes.", "Still here: yes."]
    assert columns["speaker"][:] == ["ANNA", "BEN", "BEN"]


def test_private_text_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.csv"
    path.write_text(_csv(","))
    read_file(path)
    assert not (tmp_path / "cache").exists()


def _write_splits(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_text("text,label\n" + "".join(f"{name} {row},{row}\n" for row in range(3)))
    return folder


@pytest.mark.parametrize(
    ("files", "eval_split", "train", "held_out"),
    [
        (("train.csv", "dev.csv", "test.csv"), "", ["train.csv"], ["dev.csv"]),
        (("train.csv", "validation.csv", "test_labeled.csv"), "test", ["train.csv"], ["test_labeled.csv"]),
        (("train.csv", "dev.csv", "test.csv"), "dev+test", ["train.csv"], ["dev.csv", "test.csv"]),
        (("train-1.csv", "train-2.csv", "test.csv"), "", ["train-1.csv", "train-2.csv"], ["test.csv"]),
        (("devset.csv", "testset_w_refs.csv"), "", ["devset.csv"], ["testset_w_refs.csv"]),
        (("notes.csv",), "", ["notes.csv"], []),
        (("train_full.csv", "valset2.csv"), "", ["train_full.csv"], ["valset2.csv"]),
        (("training.csv", "testset.csv", "tested.csv"), "", ["training.csv"], ["testset.csv"]),
        (("trainset.csv", "device reviews.csv", "trains.csv"), "", ["trainset.csv"], []),
    ],
)
def test_folders_are_split_by_name(
    tmp_path: Path, files: tuple[str, ...], eval_split: str, train: list[str], held_out: list[str]
) -> None:
    (tmp_path / "README.md").write_text("not data")
    parts = read_source(str(_write_splits(tmp_path, *files)), eval_split)
    assert [[Path(frame.where).name for frame in part] for part in parts] == [train, held_out]


def _empty(folder: Path) -> str:
    (folder / "empty.csv").touch()
    return "empty.csv"


def _broken(folder: Path) -> str:
    (folder / "broken.parquet").write_bytes(b"not parquet at all")
    return "broken.parquet"


def _ragged(folder: Path) -> str:
    (folder / "ragged.csv").write_text("text,label\na,1\nb,2,3,4\n")
    return "ragged.csv"


def _surplus(folder: Path) -> str:
    (folder / "surplus.csv").write_text("text,label\na,1,\nb,2,\n")
    return "surplus.csv"


def _late(folder: Path) -> str:
    (folder / "late.csv").write_text("text,label\n" + "a,1\n" * 150 + "b,2,3\n")
    return "late.csv"


def _cut_short(folder: Path) -> str:
    (folder / "cut.tsv").write_text('text\tlabel\n"one\ntwo\t1\nthree\t0\n')
    return "cut.tsv"


def _latin(folder: Path) -> str:
    (folder / "latin.tsv").write_bytes("text\tlabel\ncaf\xe9\t1\n".encode("latin-1"))
    return "latin.tsv"


def _not_gzip(folder: Path) -> str:
    (folder / "a.jsonl.gz").write_bytes(b"plain text")
    return "a.jsonl.gz"


def _picture(folder: Path) -> str:
    (folder / "a.png").write_bytes(b"png")
    return "a.png"


def _two_formats(folder: Path) -> str:
    _write_splits(folder, "train.csv", "train.tsv")
    return "."


def _no_train(folder: Path) -> str:
    _write_splits(folder, "a.csv", "b.csv")
    return "."


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: "gone.csv", "no such file or folder"),
        (_empty, "the file is empty"),
        (_broken, "cannot be read as parquet: "),
        (_ragged, "line 3 has 4 fields, expected 2 as in the header; a field with ',' in it needs quotes"),
        (_surplus, "line 2 has 3 fields, expected 2 as in the header; .* no ',' ends a row"),
        (_late, "cannot be read as csv: .*Expected 2 fields in line 152, saw 3"),
        (
            _cut_short,
            "line 2 has 1 fields, expected 2 as in the header, and a quote without its pair: a line",
        ),
        (_latin, "cannot be read as tsv: .*utf-8"),
        (_not_gzip, "cannot be read as jsonl: "),
        (_picture, "cannot tell the format by its name; expected .csv .tsv"),
        (_two_formats, "found train.csv beside train.tsv; keep one format"),
        (_no_train, r"found a.csv, b.csv; expected files named train\*"),
        (lambda folder: ".", "found nothing readable; expected files named"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Callable[[Path], str], message: str
) -> None:
    path = tmp_path / make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        read_source(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_missing_splits(tmp_path: Path) -> None:
    data = str(_write_splits(tmp_path, "train.csv", "test.csv"))
    with pytest.raises(DataError, match="no split 'dev' to evaluate on; found test, train"):
        read_source(data, "dev")
    with pytest.raises(ConfigError, match=r"eval-split is 'nightly', expected 'dev', 'test', 'dev\+test'"):
        read_source(data, "nightly")


@pytest.mark.parametrize("data", ["nobody/nothing", "nothing", "nobody/nothing:config"])
def test_no_hub_within_reach(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"{data}: neither a local file or folder nor a hub data set within"):
        read_source(data, cache_dir=tmp_path)
    assert capfd.readouterr() == ("", "")


def test_hub_splits_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    part = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    asked: list[tuple[object, ...]] = []

    def fake(*args: object, **_: object) -> datasets.DatasetDict:
        asked.append(args)
        return datasets.DatasetDict(
            train=part, validation_matched=part, validation_mismatched=part, test=part
        )

    monkeypatch.setattr(datasets, "load_dataset", fake)
    train, held_out = read_source("glue:mnli")
    assert asked == [("glue", "mnli")]
    assert [frame.where for frame in train] == ["glue:mnli (train)"]
    assert [frame.where for frame in held_out] == [
        "glue:mnli (validation_matched)",
        "glue:mnli (validation_mismatched)",
    ]
