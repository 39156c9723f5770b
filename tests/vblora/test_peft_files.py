"""Exported adapters: PEFT loads them and computes the same."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

from tests.vblora.tiny import (
    FAMILIES,
    LORA,
    VBLORA,
    adapt,
    make_base,
    make_blueprint,
    make_inputs,
    make_state,
    outputs,
)
from vblora.errors import ExportError
from vblora.model import AdaptedModel
from vblora.peft_files import dense_logits, export_peft
from vblora.rows import MixedRows
from vblora.spec import AdapterSpec, VBLoRASpec
from vblora.state import State, initial_state, mixture_weights

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own call

FORMS = {
    "full": (VBLORA, "full"),
    "topk": (VBLORA, "topk"),
    "topk of many": (replace(VBLORA, num_vectors=300, topk=5), "topk"),
    "one of many": (replace(VBLORA, num_vectors=300, topk=1), "full"),
    "lora": (LORA, "full"),
}


def check_export(
    base: nn.Module, model: AdaptedModel, state: State, inputs: dict[str, Tensor], folder: Path, form: str
) -> None:
    export_peft(state, model.blueprint, folder, base="somewhere/base", form=form)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    exported = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    model.bind(model.load(state))
    with torch.no_grad():
        expected, found, plain = outputs(model, inputs), outputs(exported, inputs), outputs(base, inputs)
    model.unbind()
    assert (expected - plain).abs().max() > 0.05, "the adapter does nothing: the test shows nothing"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_the_same_outputs(family, kind, tmp_path):
    spec, form = FORMS[kind]
    base = make_base(family)
    model = adapt(base, spec)
    check_export(base, model, make_state(model.blueprint), make_inputs(4), tmp_path, form)


@pytest.fixture(scope="module")
def encoder(minilm: Path) -> nn.Module:
    """Real weights under a new head of two labels; loading reports the missing head."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2).eval()
    finally:
        hf_logging.set_verbosity(verbosity)


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        (VBLoRASpec(num_vectors=256, vector_length=128), "full"),
        (VBLoRASpec(num_vectors=256, vector_length=128), "topk"),
        (FORMS["lora"][0], "full"),
    ],
    ids=["full", "topk", "lora"],
)
def test_peft_gives_the_same_outputs_on_real_weights(encoder, minilm, spec, form, tmp_path):
    model = adapt(encoder, spec)
    blueprint = replace(model.blueprint, labels=("no", "yes"))
    model.blueprint = blueprint
    texts = ["a delight from start to end", "dull", "no one needs two hours of this, and yet"]
    inputs = dict(AutoTokenizer.from_pretrained(minilm)(texts, padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    check_export(encoder, model, make_state(blueprint, scale=0.05), inputs, tmp_path, form)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama-cls"])
def test_the_head_arrives(family, tmp_path):
    """PEFT drops a key that it does not expect without a word."""
    base = make_base(family)
    blueprint = make_blueprint(base)
    state = make_state(blueprint)
    export_peft(state, blueprint, tmp_path, base="x")
    exported = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    loaded = dict(exported.named_parameters())
    start = 0
    for tensor in blueprint.head:
        module, rest = tensor.name.split(".", 1)
        found = loaded[f"base_model.model.{module}.modules_to_save.default.{rest}"]
        expected = state.dense["head"][start : start + tensor.size].reshape(tensor.shape)
        np.testing.assert_array_equal(found.detach().numpy(), expected)
        start += tensor.size
    assert start == blueprint.head_size


def test_the_config_says_what_peft_needs(tmp_path):
    blueprint = make_blueprint(make_base("bert"), VBLORA, "query")
    export_peft(
        initial_state(blueprint), blueprint, tmp_path / "new" / "folder", base="base/name", form="topk"
    )
    config = json.loads((tmp_path / "new" / "folder" / "adapter_config.json").read_text())
    with safe_open(tmp_path / "new" / "folder" / "adapter_model.safetensors", "np") as file:
        about = file.metadata()
    fingerprint = blueprint.fingerprint.hex()
    assert about == {"format": "pt", "fedvb": "fedvb-export-1", "adapter": fingerprint, "round": "0"}
    assert config["peft_type"] == "VBLORA"
    assert (config["r"], config["num_vectors"], config["vector_length"], config["topk"]) == (3, 40, 16, 2)
    assert config["save_only_topk_weights"] is True
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["classifier"]
    assert config["base_model_name_or_path"] == "base/name"
    assert config["target_modules"] == [f"bert.encoder.layer.{n}.attention.self.query" for n in range(2)]


@pytest.mark.parametrize(("h", "kind"), [(255, np.uint8), (256, np.int16), (300, np.int16)])
def test_indices_have_the_width_that_peft_expects(h, kind, tmp_path):
    blueprint = make_blueprint(make_base("llama"), replace(VBLORA, num_vectors=h), "q_proj")
    export_peft(initial_state(blueprint), blueprint, tmp_path, base="x", form="topk")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_A_topk"
    assert tensors[f"{name}_indices"].dtype == kind
    assert tensors[f"{name}_indices"].shape == (3, 2, 2)
    assert tensors[f"{name}_weights"].shape == (3, 2, 1)


@pytest.mark.parametrize("form", ["full", "topk"])
def test_cut_rows_are_refused(form, tmp_path):
    blueprint = make_blueprint(make_base("bert"), replace(VBLORA, vector_length=24))
    with pytest.raises(
        ExportError, match=r"^format peft: \d+ rows are cut because vector-length 24 does not divide"
    ):
        export_peft(initial_state(blueprint), blueprint, tmp_path / "out", base="x", form=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "spec", [replace(VBLORA, topk=3), replace(VBLORA, num_vectors=300)], ids=["k=3", "h=300"]
)
def test_dense_logits_select_what_the_state_selects(spec: AdapterSpec):
    blueprint = make_blueprint(make_base("bert"), spec)
    state = make_state(blueprint)
    logits = torch.from_numpy(dense_logits(state, blueprint))
    assert logits.shape == (blueprint.rows, spec.num_vectors)
    source = MixedRows(blueprint, torch.device("cpu"))
    tensors = source.load(state)
    slots = source._candidates.select(tensors["logits"]).slots[0]
    best, vectors = logits.topk(spec.topk)
    assert torch.equal(vectors.int(), source._candidates.order[slots].int())
    np.testing.assert_allclose(
        best.softmax(1).numpy(), mixture_weights(state.topk.gaps), rtol=1e-5, atol=1e-6
    )


def test_an_adapter_without_logits_has_none():
    blueprint = make_blueprint(make_base("bert"), LORA)
    with pytest.raises(ExportError, match="adapter lora has no logits"):
        dense_logits(initial_state(blueprint), blueprint)
