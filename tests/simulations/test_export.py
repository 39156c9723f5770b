"""An exported run loads in PEFT and predicts what we predict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fl_client.opening import open_site
from fl_client.settings import SiteSettings
from simulations.config import load_config
from simulations.simulate import simulate
from tests.simulations.conftest import Run, small_config
from vblora.files import load_state

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[peft]'")

TEXTS = ["the team was in a race", "some bread and cheese with soup", "one bright comet then the moon"]


@pytest.fixture(scope="module", params=["vblora", "lora"])
def trained(
    request: pytest.FixtureRequest, tiny_bert: Path, topics: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that has moved far enough from its seed for differences to show."""
    out = tmp_path_factory.mktemp("runs") / request.param
    rates = {"lr-bank": 0.05, "lr-logits": 0.05, "lr-rows": 0.02}
    simulate(small_config(tiny_bert, topics, out, adapter=request.param, local_steps=20) | rates)
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
    assert (shown.code, shown.err) == (0, "")
    assert "of round 3 -> adapter" in shown.out
    tokens = tokenised(tiny_bert, TEXTS)
    found, expected = theirs(encoder(tiny_bert, 3), tmp_path / "adapter", tokens), ours(trained, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    plain = encoder(tiny_bert, 3).eval()
    plain.classifier.load_state_dict(
        {
            "weight": torch.from_numpy(head(tmp_path / "adapter", "classifier.weight")),
            "bias": torch.from_numpy(head(tmp_path / "adapter", "classifier.bias")),
        }
    )
    with torch.no_grad():
        without = plain(**tokens).logits
    assert (without - expected).abs().max() > 1e-3  # the adapter has a say


def head(folder: Path, name: str) -> np.ndarray:
    found = load_file(folder / "adapter_model.safetensors")
    return next(array for key, array in found.items() if key.endswith(name))


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
