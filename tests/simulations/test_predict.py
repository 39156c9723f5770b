"""`fedvb predict` says what the trained model says, a line a text, in their order."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.simulations.conftest import Run

TEXTS = [
    "the team was in a race",
    "some bread and cheese with soup",
    "one bright comet then the moon very",
    "",
]


def typed(content: bytes) -> io.TextIOWrapper:
    """A standard input as Python opens it where the locale is C: bytes that are no text go through."""
    return io.TextIOWrapper(io.BytesIO(content), "utf-8", "surrogateescape")


@pytest.fixture
def merged(fedvb: Run, finished: Path, tmp_path: Path) -> Path:
    """The finished run as a plain model."""
    assert fedvb("export", finished, "--format", "merged", "--out", "merged").code == 0
    return tmp_path / "merged"


def expected(folder: Path, texts: list[str]) -> list[tuple[str, float]]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        best = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits.softmax(
            -1
        )
    return [(model.config.id2label[int(row.argmax())], float(row.max())) for row in best]


def test_labels_and_probabilities(fedvb: Run, finished: Path, merged: Path, tmp_path: Path, monkeypatch):
    wanted = [f"{label}\t{probability:.4f}" for label, probability in expected(merged, TEXTS)]
    shown = fedvb("predict", finished, *TEXTS)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.splitlines() == wanted

    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    assert fedvb("predict", finished, "--file", "texts.txt").out.splitlines() == wanted
    monkeypatch.setattr("sys.stdin", typed("\n".join(TEXTS).encode() + b"\n"))
    assert fedvb("predict", finished).out.splitlines() == wanted


def test_json_says_all(fedvb: Run, finished: Path, merged: Path):
    shown = fedvb("predict", finished, "--json", *TEXTS)
    found = [json.loads(line) for line in shown.out.splitlines()]
    assert [row["text"] for row in found] == TEXTS
    for row, (label, probability) in zip(found, expected(merged, TEXTS), strict=True):
        assert row["said"] == label
        assert row["probability"] == pytest.approx(probability, abs=1e-5)


def test_many_lines_keep_their_order(fedvb: Run, finished: Path, tmp_path: Path):
    """More than are read at once, of all lengths."""
    texts = [" ".join(TEXTS[row % 3].split()[: 1 + row % 5]) for row in range(600)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    found = fedvb("predict", finished, "--file", "texts.txt", "--json").out.splitlines()
    assert [json.loads(line)["text"] for line in found] == texts
    alone, among = (
        json.loads(row) for row in (fedvb("predict", finished, "--json", texts[17]).out, found[17])
    )
    assert alone["said"] == among["said"]
    assert alone["probability"] == pytest.approx(among["probability"], rel=1e-4)


def test_a_language_model_goes_on_as_its_merged_weights_do(fedvb: Run, assets: Path, tmp_path: Path):
    base = assets / "models" / "stories260K-hf"
    options = [
        *("--model", base, "--data", assets / "data" / "e2e", "--task", "causal-lm", "--partition", "iid"),
        *("--max-examples", "40", "--eval-examples", "8", "--max-length", "48"),
        *("--clients", "2", "--clients-per-round", "2", "--rounds", "1", "--local-steps", "8"),
    ]
    assert fedvb("simulate", *options, "--out", "run").code == 0
    assert fedvb("export", "run", "--format", "merged", "--out", "merged").code == 0
    prompts = ["Once upon a time there was a dog", "Tom", "They went to the park and"]
    shown = fedvb("predict", "run", "--new-tokens", "12", "--json", *prompts)
    assert (shown.code, shown.err) == (0, "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for prompt, line in zip(prompts, shown.out.splitlines(), strict=True):
        tokens = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        made = model.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False)
        said = tokenizer.decode(made[0, len(tokens) :], skip_special_tokens=True)
        assert json.loads(line) == {"text": prompt, "said": said, "probability": None}
        assert len(said) > 5
    plain = fedvb("predict", "run", "--new-tokens", "12", prompts[0])
    assert plain.out.count("\n") == 1
    told = fedvb("predict", "run", "--new-tokens", "9999", "Tom")
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "--new-tokens is 9999, the model reads " in told.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["x", "--file", "texts.txt"], "predict: texts are given and --file too; choose one"),
        (["--file", "nothing.txt"], "--file: nothing.txt cannot be read"),
        (["x", "--model", "nowhere/at/all"], "--model: nowhere/at/all is no folder"),
        (["x", "--client", "0"], "its clients keep nothing for themselves"),
        (["x", "\udcff"], "predict: text 2 holds bytes that are not UTF-8"),
        (["--file", "latin1.txt"], "--file: latin1.txt cannot be read ('utf-8' codec can't decode byte 0xe9"),
        ([], "standard input cannot be read ('utf-8' codec can't decode byte 0xff in position 5"),
        (["x", "--template", "foo"], "'--template': 'foo' is not one of 'auto', 'off'"),
    ],
)
def test_what_cannot_be_answered(
    fedvb: Run,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    told: str,
):
    (tmp_path / "latin1.txt").write_bytes("café\n".encode("latin1"))
    monkeypatch.setattr("sys.stdin", typed(b"text\n\xff\xfe\n"))
    found = fedvb("predict", finished, *arguments)
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert told in found.err


def test_another_base_is_refused(fedvb: Run, finished: Path, minilm: Path):
    found = fedvb("predict", finished, "--model", minilm, "x")
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert "is bert-384-6-30522, expected bert-32-2-" in found.err
