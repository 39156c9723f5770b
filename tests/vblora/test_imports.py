"""Adapters that PEFT saved, or a run of ours, read as version 0: equal outputs, and training that goes on."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from fl_client import assembly
from fl_client.optim import AdamW
from fl_client.settings import AdapterSettings, SiteSettings
from tests.vblora.tiny import KINDS, adapt, make_base, make_blueprint, make_inputs, make_state, outputs
from vblora.candidates import CHECK_EVERY
from vblora.errors import ConfigError, StartError
from vblora.files import save_state
from vblora.imports import read_start
from vblora.model import AdaptedModel, describe_base, find_head, find_linears
from vblora.peft_files import dense_logits, export_peft
from vblora.rows import MixedRows
from vblora.spec import Blueprint, VBLoRASpec
from vblora.state import initial_state

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own call
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "down_proj"]}


def saved_by_peft(family: str, folder: Path, **options: Any) -> tuple[nn.Module, Any]:
    """A base, and an adapter on it that PEFT made, moved and saved. The head is PEFT's to save."""
    base = make_base(family, layers=1)
    shared = {"target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2"}
    if family == "bert":
        shared["modules_to_save"] = ["classifier"]
    kind = peft.LoraConfig if "lora_alpha" in options else peft.VBLoRAConfig
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(copy.deepcopy(base), kind(**shared, **options)).eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                spread = 0.3 if "lora_" in name or "modules_to_save" in name else 0.05
                parameter.data += spread * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return base, model


def started(base: nn.Module, folder: Path, seed: int = 7) -> Blueprint:
    found = read_start(folder, seed)
    linears = tuple(linear for linear in find_linears(base) if linear.name in found.layers)
    labels = ("no", "yes", "perhaps") if find_head(base) else ()
    return found.started(Blueprint(found.spec, linears, find_head(base), describe_base(base), labels))


def vblora(h: int, **options: Any) -> dict[str, Any]:
    return {"r": 3, "num_vectors": h, "vector_length": 16, "topk": 2, **options}


def ours(base: nn.Module, blueprint: Blueprint) -> AdaptedModel:
    return AdaptedModel(copy.deepcopy(base), blueprint)


def predicted(model: AdaptedModel, inputs: dict[str, Tensor]) -> Tensor:
    model.bind(model.load(initial_state(model.blueprint)))
    return outputs(model, inputs).detach()


@pytest.mark.parametrize(
    "options",
    [vblora(40), vblora(300, topk=3), vblora(40, save_only_topk_weights=True), {"r": 3, "lora_alpha": 5}],
    ids=["full", "full k=3", "topk", "lora"],
)
@pytest.mark.parametrize("family", TARGETS)
def test_version_0_says_what_peft_says(family, options, tmp_path):
    base, theirs = saved_by_peft(family, tmp_path, **options)
    inputs = make_inputs(4)
    found = predicted(ours(base, started(base, tmp_path)), inputs)
    torch.testing.assert_close(found, outputs(theirs, inputs), rtol=1e-5, atol=1e-5)
    assert (found - outputs(base, inputs)).abs().max() > 1e-3


def test_rank_stabilised_lora(tmp_path):
    base, theirs = saved_by_peft("bert", tmp_path, r=3, lora_alpha=5, use_rslora=True)
    found = predicted(ours(base, started(base, tmp_path)), make_inputs(4))
    torch.testing.assert_close(found, outputs(theirs, make_inputs(4)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["full", "topk"])
def test_16_bit_files(form, dtype, tmp_path):
    """PEFT fails to load the top-k form of these."""
    base, theirs = saved_by_peft("bert", tmp_path, **vblora(40, save_only_topk_weights=form == "topk"))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}, path)
    found = predicted(ours(base, started(base, tmp_path)), make_inputs(4))
    torch.testing.assert_close(found, outputs(theirs, make_inputs(4)), rtol=0.05, atol=0.05)


def test_weights_that_16_bits_round_beyond_1_stay_usable(tmp_path):
    base, _ = saved_by_peft("bert", tmp_path, **vblora(40, save_only_topk_weights=True))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: torch.full_like(t, 1.0) if "_weights" in n else t for n, t in tensors.items()}, path)
    gaps = initial_state(started(base, tmp_path)).topk.gaps
    np.testing.assert_allclose(gaps, 24 * np.log(2), rtol=1e-6)


# --- Training goes on ----------------------------------------------------------------


@pytest.mark.parametrize("h", [40, 300])
def test_from_full_form_training_goes_on_exactly_as_in_peft(h, tmp_path):
    """Sixty AdamW steps in float64, logits so fast that rows outgrow what is held; no row is lifted first."""
    base, _ = saved_by_peft("bert", tmp_path, **vblora(h))
    blueprint = started(base, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).double().eval()
    model = ours(base.double(), blueprint)
    model.source = MixedRows(blueprint, torch.device("cpu"), width=1)
    tensors = {
        n: t.detach().double().requires_grad_() for n, t in model.load(initial_state(blueprint)).items()
    }
    rates = {"bank": 4e-3, "logits": 0.05, "head": 0.0}
    optimiser = AdamW(rates)
    groups = [
        {"params": [p], "lr": rates["bank" if "bank" in name else "logits"]}
        for name, p in theirs.named_parameters()
        if "vblora" in name
    ]
    their_optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(60):
        if step % CHECK_EVERY == 0:
            for name, grown in model.source.growth().items():
                wider = torch.cat([tensors[name].detach(), grown.double().expand(1, -1)], dim=-1)
                tensors[name] = wider.requires_grad_()
                optimiser.widen(name, len(grown))
        inputs = make_inputs(3, seed=step % 10)
        model.bind(tensors)
        mine, other = outputs(model, inputs), outputs(theirs, inputs)
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8, msg=f"step {step}")
        gradients = torch.autograd.grad(mine.square().sum(), list(tensors.values()))
        optimiser.step(tensors, dict(zip(tensors, gradients, strict=True)), None)
        their_optimiser.zero_grad()
        other.square().sum().backward()
        their_optimiser.step()
    assert (mine - outputs(base, inputs)).abs().max() > 1e-2
    assert h == 40 or model.source._candidates._tiers, "no row outgrew what is held: the test shows less"


@pytest.mark.parametrize("kind", ["topk", "ours", "lora"])
def test_training_goes_on_at_all(kind, tmp_path):
    """From top-k form the chosen logits stand above the others, seeded; the selection can change again."""
    if kind == "ours":
        base = make_base("bert", layers=1)
        blueprint = make_blueprint(base)
        save_state(tmp_path / "adapter" / "adapter.safetensors", make_state(blueprint), blueprint)
    else:
        options = {"r": 3, "lora_alpha": 5} if kind == "lora" else vblora(40, save_only_topk_weights=True)
        base, _ = saved_by_peft("bert", tmp_path, **options)
    blueprint = started(base, tmp_path)
    model, start = ours(base, blueprint), initial_state(blueprint)
    tensors = model.load(start)
    optimiser = torch.optim.AdamW(tensors.values(), lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(30):
        model.bind(tensors)
        loss = nn.functional.cross_entropy(model(**make_inputs(6)).logits, torch.arange(6) % 3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    if kind != "lora":
        (topk,) = model.source.selections(tensors)
        moved = (np.sort(topk.positions) != np.sort(start.topk.positions)).any(axis=1)
        assert 0 < moved.sum() < len(moved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_ours_is_where_another_starts(kind, tmp_path):
    base = make_base("bert")
    old = adapt(base, KINDS[kind])
    state, inputs = make_state(old.blueprint), make_inputs(4)
    save_state(tmp_path / "adapter.safetensors", state, old.blueprint)
    blueprint = started(base, tmp_path, seed=99)
    old.bind(old.load(state))
    found, expected = predicted(ours(base, blueprint), inputs), outputs(old, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert blueprint.spec.seed == 7  # what it draws stays what it was

    save_state(tmp_path / "adapter.safetensors", replace(initial_state(blueprint), version=1), blueprint)
    with pytest.raises(StartError, match="went on from another adapter itself; export it"):
        read_start(tmp_path, 0)


# --- There and back ------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_dense_logits_are_those_of_the_file(k, tmp_path):
    base, _ = saved_by_peft("bert", tmp_path, **vblora(40, topk=k))
    blueprint = started(base, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    export_peft(initial_state(blueprint), blueprint, tmp_path / "back", base="x")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert tensors.keys() == back.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, back[name]), name


def test_an_export_is_a_start(tmp_path):
    """Full form from a state that has moved: the same selection, and logits that stay as they are."""
    base = make_base("bert")
    blueprint = make_blueprint(base)
    state = make_state(blueprint)
    export_peft(state, blueprint, tmp_path, base="x")
    again = started(base, tmp_path)
    np.testing.assert_array_equal(dense_logits(initial_state(again), again), dense_logits(state, blueprint))
    export_peft(state, blueprint, tmp_path / "topk", base="x", form="topk")
    short = started(base, tmp_path / "topk")
    np.testing.assert_allclose(initial_state(short).topk.gaps, state.topk.gaps, rtol=1e-4, atol=1e-5)


def test_attention_of_a_mixture_of_experts_goes_on(tmp_path):
    """No layer need be named again; those that are must be the file's."""
    base = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            vocab_size=96,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
        )
    )
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    model.save_pretrained(tmp_path)

    def found(targets: str) -> Blueprint:
        adapter = AdapterSettings(target_modules=targets)
        return assembly.make_blueprint(SiteSettings(start=str(tmp_path), adapter=adapter), (), base)

    names = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]
    for targets in ("all-linear", "v_proj,q_proj"):
        assert [linear.name for linear in found(targets).linears] == names
    with pytest.raises(
        ConfigError, match="target-modules is q_proj, the adapter of --start has layers of its"
    ):
        found("q_proj")


# --- What is refused -----------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "a PEFT adapter of type IA3, expected LORA or VBLORA"),
        ({"use_dora": True}, "it uses use_dora, which cannot be trained here"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "it was begun by pissa_niter_4, which alters the base; save it",
        ),
        (
            {"init_lora_weights": "OLoRA"},
            "it was begun by olora, which alters the base; save it again as plain",
        ),
        ({"bias": "all"}, "it uses bias=all, which cannot be trained here"),
        (
            {"rank_pattern": {"query": 4}, "alpha_pattern": {"x": 1}},
            "it uses rank_pattern, alpha_pattern, which",
        ),
        ({"r": 2}, r"lora_A.weight has shape \(3, 32\), expected \(2, 32\); is the base the one that"),
        ({"r": "3"}, "adapter_config.json: .*rank is '3', expected a whole number"),
        ({"lora_alpha": None}, "adapter_config.json: "),
    ],
)
def test_what_cannot_be_trained_here_is_refused(changes, told, tmp_path):
    base, _ = saved_by_peft("bert", tmp_path, r=3, lora_alpha=5)
    edit(tmp_path, **changes)
    with pytest.raises(StartError, match=f"^start .*{told}"):
        started(base, tmp_path)


def test_another_base_is_refused(tmp_path):
    saved_by_peft("bert", tmp_path, r=3, lora_alpha=5)
    found = read_start(tmp_path, 0)
    blueprint = replace(make_blueprint(make_base("llama")), spec=found.spec)
    with pytest.raises(StartError, match=r"it adapts 2 layers, 14 were expected; .* is not in both"):
        found.started(blueprint)


def test_files_that_are_missing_or_damaged_are_refused(tmp_path):
    with pytest.raises(StartError, match=r"no adapter there; expected a folder with adapter_config\.json"):
        read_start(tmp_path, 0)
    base, _ = saved_by_peft("bert", tmp_path / "good", **vblora(40))
    path = tmp_path / "good" / "adapter_model.safetensors"
    content = path.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(StartError, match=match):
            started(base, tmp_path / "good")

    path.write_bytes(content[:-8])
    refused("not a readable safetensors file")
    path.unlink()
    refused("not a readable safetensors file")
    path.with_suffix(".bin").write_bytes(b"x")
    refused("weights are in adapter_model.bin, a pickle")
    path.write_bytes(content)
    tensors = load_file(path)
    bank = "base_model.vblora_vector_bank"
    save_file({name: tensor for name, tensor in tensors.items() if name != bank}, path)
    refused(f"{bank} is missing")
    save_file({**tensors, bank: tensors[bank].int()}, path)
    save_file({**tensors, bank: torch.full_like(tensors[bank], torch.inf)}, path)
    refused(f"{bank} holds numbers that are not finite")
    save_file({**tensors, "base_model.model.pooler.weight": torch.ones(2)}, path)
    refused("base_model.model.pooler.weight has no place here")
    save_file({**tensors, "x": torch.ones(2, dtype=torch.complex64)}, path)
    refused("x is C64, expected one of F64")
    edit(tmp_path / "good", peft_type=None)
    refused("a PEFT adapter of type None")
    (tmp_path / "good" / "adapter_config.json").write_text("{")
    refused("adapter_config.json is not readable")


def test_indices_out_of_range_or_twice_are_refused(tmp_path):
    base, _ = saved_by_peft("bert", tmp_path, **vblora(40, save_only_topk_weights=True))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("_indices"))
    for value, told in (
        (99, "indices run from 0 to 99, expected 0 to 39"),
        (5, "a row names one vector twice"),
    ):
        changed = tensors[name].clone()
        changed[0, 0] = value
        save_file({**tensors, name: changed}, path)
        with pytest.raises(StartError, match=told):
            started(base, tmp_path)


def test_a_head_in_parts_is_refused(tmp_path):
    base, _ = saved_by_peft("bert", tmp_path, r=3, lora_alpha=5)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.endswith("classifier.bias")}, path
    )
    with pytest.raises(StartError, match=r"classifier\.bias is missing"):
        started(base, tmp_path)
    save_file({name: tensor for name, tensor in tensors.items() if "classifier" not in name}, path)
    blueprint = started(base, tmp_path)
    assert "head" not in blueprint.start.held.dense
    plain = replace(blueprint, start=None)
    assert (initial_state(blueprint).dense["head"] == initial_state(plain).dense["head"]).all()


def test_a_run_with_other_labels_is_refused(tmp_path):
    base = make_base("bert")
    blueprint = replace(make_blueprint(base), labels=("a", "b", "c"))
    save_state(tmp_path / "adapter.safetensors", make_state(blueprint), blueprint)
    with pytest.raises(StartError, match=r"its labels are \('a', 'b', 'c'\), expected \('no'"):
        started(base, tmp_path)
    shutil.copy(tmp_path / "adapter.safetensors", tmp_path / "whole")
    (tmp_path / "adapter.safetensors").write_bytes((tmp_path / "whole").read_bytes()[:-4])
    with pytest.raises(StartError, match="not a readable state file"):
        read_start(tmp_path, 0)


def test_numbers_asked_for_beside_must_be_those_of_the_file(tmp_path):
    base, _ = saved_by_peft("bert", tmp_path, **vblora(40))
    found = read_start(tmp_path, 3)
    assert found.spec == VBLoRASpec(rank=3, num_vectors=40, vector_length=16, topk=2, seed=3)
    assert found.layers == {f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "value")}
    with pytest.raises(StartError, match="expected VBLoRASpec"):
        found.started(replace(started(base, tmp_path), spec=replace(found.spec, topk=3), start=None))
