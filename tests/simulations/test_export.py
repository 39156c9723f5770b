"""An exported run loads in PEFT and predicts what we predict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import vblora.peft_files
from fl_client.opening import open_site
from fl_client.settings import SiteSettings
from simulations.config import load_config
from simulations.simulate import simulate
from tests.simulations.conftest import Run, small_config
from vblora.adapters import ADAPTERS
from vblora.files import load_state, write_atomic

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[peft]'")

TEXTS = ["the team was in a race", "some bread and cheese with soup", "one bright comet then the moon"]


@pytest.fixture(scope="module", params=ADAPTERS)
def trained(
    request: pytest.FixtureRequest, tiny_bert: Path, topics: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that has moved far enough from its seed for differences to show."""
    out = tmp_path_factory.mktemp("runs") / request.param
    rates = {"lr-bank": 0.05, "lr-logits": 0.05, "lr-rows": 0.02, "rank": 4}
    simulate(small_config(tiny_bert, topics, out, adapter=request.param, local_steps=20) | rates)
    return out


@pytest.fixture(scope="module")
def cut(tiny_bert: Path, topics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose rows are cut, because b does not divide the sides."""
    out = tmp_path_factory.mktemp("runs") / "cut"
    simulate(small_config(tiny_bert, topics, out, vector_length=24, local_steps=20) | {"lr-bank": 0.05})
    return out


def ours(run: Path, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the run's own model says, from the adapter on disk."""
    model = open_site(SiteSettings.from_run_config(load_config(run))).model
    state, _ = load_state(run / "adapter" / "adapter.safetensors")
    model.bind(model.load(state))
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(**tokens).logits
    finally:
        model.unbind()
    return logits


def theirs(base: torch.nn.Module, folder: Path, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = peft.PeftModel.from_pretrained(base, folder).eval()(**tokens).logits
    return logits


def encoder(folder: Path, labels: int) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels, dtype=torch.float32
    )
    return model


def tokenised(folder: Path, texts: list[str]) -> dict[str, torch.Tensor]:
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=len(texts) > 1, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("form", ["full", "topk"])
def test_peft_predicts_the_same(fedvb: Run, trained: Path, tiny_bert: Path, tmp_path: Path, form: str):
    shown = fedvb("export", trained, "--format", "peft", "--form", form, "--out", "adapter")
    if trained.name == "lora-xs":
        assert shown.err == "fedvb: format peft: PEFT has no LoRA-XS; use --format lora\n"
        return
    assert (shown.code, shown.err) == (0, "")
    assert "of round 3 -> adapter" in shown.out
    check_adapter(tmp_path / "adapter", trained, tiny_bert)


def test_as_lora_peft_predicts_the_same(fedvb: Run, trained: Path, tiny_bert: Path, tmp_path: Path):
    shown = fedvb("export", trained, "--format", "lora", "--out", "adapter")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == f"{trained.name} adapter (as LoRA) of round 3 -> adapter\n"
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    check_adapter(tmp_path / "adapter", trained, tiny_bert)


def test_as_lora_cut_rows_can_be_told(fedvb: Run, cut: Path, tiny_bert: Path, tmp_path: Path):
    assert fedvb("export", cut, "--format", "lora", "--out", "adapter").code == 0
    check_adapter(tmp_path / "adapter", cut, tiny_bert)


def check_adapter(folder: Path, run: Path, base: Path) -> None:
    """An export says in PEFT what the run says, and not because the head alone does."""
    tokens = tokenised(base, TEXTS)
    found, expected = theirs(encoder(base, 3), folder, tokens), ours(run, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    plain = encoder(base, 3).eval()
    plain.classifier.load_state_dict(
        {
            "weight": torch.from_numpy(head(folder, "classifier.weight")),
            "bias": torch.from_numpy(head(folder, "classifier.bias")),
        }
    )
    with torch.no_grad():
        without = plain(**tokens).logits
    assert (without - expected).abs().max() > 1e-3  # the adapter has a say


def head(folder: Path, name: str) -> np.ndarray:
    found = load_file(folder / "adapter_model.safetensors")
    return next(array for key, array in found.items() if key.endswith(name))


def test_a_merged_model_needs_nothing_else(fedvb: Run, trained: Path, tiny_bert: Path, tmp_path: Path):
    shown = fedvb("export", trained, "--format", "merged", "--out", "model")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == f"{trained.name} adapter, merged into {tiny_bert}, of round 3 -> model\n"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokens = tokenised(tmp_path / "model", TEXTS)
    with torch.no_grad():
        found = model(**tokens).logits
    torch.testing.assert_close(found, ours(trained, tokenised(tiny_bert, TEXTS)), rtol=0, atol=1e-5)
    assert model.config.id2label == {0: "food", 1: "space", 2: "sport"}
    assert model.config.label2id == {"food": 0, "space": 1, "sport": 2}
    assert model.config.fedvb["format"] == "fedvb-merged-1"
    assert model.config.fedvb["round"] == 3
    assert not list(tmp_path.glob(".model*"))


def test_merged_with_cut_rows(fedvb: Run, cut: Path, tiny_bert: Path, tmp_path: Path):
    assert fedvb("export", cut, "--format", "merged", "--out", "model").code == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokens = tokenised(tiny_bert, TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens).logits, ours(cut, tokens), rtol=0, atol=1e-5)


def test_a_base_of_four_bits(fedvb: Run, small: list[str], tiny_bert: Path, tmp_path: Path):
    """Trained on it, merged through the dense weights that the bits mean."""
    pytest.importorskip("bitsandbytes", reason="not installed: pip install -e '.[quantize]'")
    shown = fedvb("simulate", *small, "--quantize", "4bit", "--lr-bank", "0.05", "--out", "run")
    assert (shown.code, shown.err) == (0, "")
    shown = fedvb("export", "run", "--format", "merged", "--out", "model")
    assert (shown.code, shown.err) == (0, "")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokens = tokenised(tiny_bert, TEXTS)
    with torch.no_grad():
        found = model(**tokens).logits
    torch.testing.assert_close(found, ours(tmp_path / "run", tokens), rtol=0, atol=1e-4)
    told = fedvb("simulate", *small, "--quantize", "2bit", "--out", "other")
    assert "quantize is '2bit', expected one of none, 4bit, 8bit" in told.err


@pytest.mark.parametrize("format", ["peft", "lora", "merged"])
def test_a_folder_with_something_in_it_is_left_alone(fedvb: Run, finished: Path, tmp_path: Path, format: str):
    """Among a model's files an adapter would be put on top of it when it is loaded."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    told = fedvb("export", finished, "--format", format, "--out", "model")
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "--out: model holds config.json, expected a folder that is new or empty" in told.err
    (tmp_path / "file").write_text("mine")
    told = fedvb("export", finished, "--format", format, "--out", "file")
    assert (told.code, told.err) == (2, "fedvb: --out: file is a file, expected a folder\n")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "file", "model"]


def test_an_earlier_export_is_exchanged_whole(
    fedvb: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    out = ("--out", "link")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "link").symlink_to("adapter")
    assert fedvb("export", finished, *out).code == 0
    before = content()
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors"}

    def write(path: Path, data: bytes | str) -> None:
        if path.name == "adapter_config.json":
            raise OSError("disk full")
        write_atomic(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(vblora.peft_files, "write_atomic", write)
        assert fedvb("export", finished, "--format", "lora", *out).err == "fedvb: disk full\n"
    assert content() == before
    assert fedvb("export", finished, "--format", "lora", *out).code == 0
    assert all(content()[name] != before[name] for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "link"]
    told = fedvb("export", finished, "--format", "merged", *out)
    assert "link holds adapter_config.json, expected a folder that is new or empty\n" in told.err


def test_another_base_is_refused(fedvb: Run, finished: Path, minilm: Path, tmp_path: Path):
    told = fedvb("export", finished, "--format", "merged", "--model", minilm, "--out", "model")
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "is bert-384-6-30522, expected bert-32-2-" in told.err
    assert "name that base with --model" in told.err
    assert not (tmp_path / "model").exists()


def test_the_topk_form_is_small(fedvb: Run, finished: Path, tmp_path: Path):
    size = {}
    for form in ("full", "topk"):
        assert fedvb("export", finished, "--form", form, "--out", form).code == 0
        size[form] = (tmp_path / form / "adapter_model.safetensors").stat().st_size
    assert size["topk"] < size["full"] / 1.5


def test_causal_lm_in_peft(fedvb: Run, assets: Path, tmp_path: Path):
    base = assets / "models" / "stories260K-hf"
    options = [
        *("--model", base, "--data", assets / "data" / "e2e", "--task", "causal-lm", "--partition", "iid"),
        *("--max-examples", "40", "--eval-examples", "8", "--max-length", "48"),
        *("--target-modules", "q_proj,v_proj,o_proj"),  # its feed-forward layers would cut rows
        *("--clients", "2", "--clients-per-round", "2", "--rounds", "1", "--local-steps", "8"),
    ]
    assert fedvb("simulate", *options, "--out", "run").code == 0
    tokens = tokenised(base, ["Once upon a time there was a dog"])
    expected = ours(tmp_path / "run", tokens)
    for form in ("full", "topk"):
        shown = fedvb("export", "run", "--form", form, "--out", form)
        assert (shown.code, shown.err) == (0, "")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        found = theirs(model, tmp_path / form, tokens)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # logits of 10 and more
    assert fedvb("export", "run", "--format", "merged", "--out", "merged").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens).logits, expected, rtol=1e-5, atol=1e-4)


def test_cut_rows_are_refused(fedvb: Run, small: list[str], tmp_path: Path):
    assert fedvb("simulate", *small, "--rounds", "1", "--vector-length", "24", "--out", "run").code == 0
    told = fedvb("export", "run", "--out", "adapter")
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "rows are cut because vector-length 24 does not divide" in told.err
    assert not (tmp_path / "adapter").exists()


def test_a_stopped_run_exports_its_last_round(fedvb: Run, run_copy: Path, tmp_path: Path):
    for name in ("summary.json", "adapter/adapter.safetensors", "checkpoints/round-00003.safetensors"):
        (run_copy / name).unlink()
    shown = fedvb("export", run_copy, "--out", "adapter")
    assert "of round 2 -> adapter" in shown.out
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_minilm(fedvb: Run, minilm: Path, topics: Path, tmp_path: Path):
    """Real weights, by the name that newcomers use: one round, then PEFT."""
    options = [
        *(
            "--model",
            "minilm",
            "--data",
            topics,
            "--clients",
            "3",
            "--clients-per-round",
            "1",
            "--rounds",
            "1",
        ),
        *("--local-steps", "4", "--batch-size", "8", "--max-examples", "60", "--eval-examples", "16"),
    ]
    assert fedvb("simulate", *options, "--out", "run").code == 0
    tokens = tokenised(minilm, TEXTS)
    expected = ours(tmp_path / "run", tokens)
    for form in ("full", "topk"):
        assert fedvb("export", "run", "--form", form, "--out", form).code == 0
        found = theirs(encoder(minilm, 3), tmp_path / form, tokens)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
