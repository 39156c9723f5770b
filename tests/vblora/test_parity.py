"""The adapted model against PEFT: outputs, gradients, training."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from tests.vblora.test_model import (
    probe,
    trained,
)
from tests.vblora.tiny import (
    KINDS,
    LORA,
    VBLORA,
    adapt,
    copy_head,
    make_base,
    make_inputs,
    make_state,
    outputs,
)
from vblora import seeded
from vblora.model import describe_base
from vblora.peft_files import dense_logits
from vblora.spec import (
    Blueprint,
)
from vblora.state import State, initial_state, lora_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own call


# --- PEFT
# -----------------------------------------------------------------------------------------------------


def peft_vblora(base: nn.Module, blueprint: Blueprint, state: State) -> Any:
    """PEFT's VB-LoRA with our tensors copied in."""
    spec: Any = blueprint.spec
    config = peft.VBLoRAConfig(
        r=spec.rank,
        num_vectors=spec.num_vectors,
        vector_length=spec.vector_length,
        topk=spec.topk,
        target_modules=[linear.name for linear in blueprint.linears],
        fan_in_fan_out=describe_base(base).startswith("gpt2"),
    )
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    own = dict(model.named_parameters(remove_duplicate=False))
    logits = torch.from_numpy(dense_logits(state, blueprint))
    with torch.no_grad():
        own["base_model.vblora_vector_bank.default"].copy_(torch.from_numpy(state.dense["bank"]))
        for part in blueprint.slices:
            name = f"base_model.model.{part.linear.name}.vblora_logits"
            a, b = logits[part.start : part.middle], logits[part.middle : part.stop]
            own[f"{name}_A.default"].copy_(a.view(spec.rank, -1, spec.num_vectors))
            own[f"{name}_B.default"].copy_(b.view(spec.rank, -1, spec.num_vectors).transpose(0, 1))
    copy_head(model.base_model.model, blueprint, state)
    return model


def peft_lora(base: nn.Module, blueprint: Blueprint, state: State) -> Any:
    spec: Any = blueprint.spec
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=[linear.name for linear in blueprint.linears],
        fan_in_fan_out=describe_base(base).startswith("gpt2"),
    )
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    own, rows = dict(model.named_parameters()), torch.from_numpy(state.dense["rows"])
    with torch.no_grad():
        for part in blueprint.slices:
            name = f"base_model.model.{part.linear.name}.lora"
            a, b = rows[part.start : part.middle], rows[part.middle : part.stop]
            own[f"{name}_A.default.weight"].copy_(a.reshape(spec.rank, -1))
            own[f"{name}_B.default.weight"].copy_(b.reshape(spec.rank, -1).T)
    copy_head(model.base_model.model, blueprint, state)
    return model


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_parity_with_vblora_of_peft(family):
    base = make_base(family)
    model = adapt(base)
    state, inputs = make_state(model.blueprint), make_inputs(4)
    found, gradients = trained(model, state, inputs)

    theirs = peft_vblora(base, model.blueprint, state)
    logits = outputs(theirs, inputs)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    probe(logits).backward()
    own = dict(theirs.named_parameters(remove_duplicate=False))
    bank = own["base_model.vblora_vector_bank.default"].grad
    torch.testing.assert_close(gradients["bank"], bank, rtol=1e-4, atol=1e-5 * float(bank.abs().max()))
    h = VBLORA.num_vectors
    for part in model.blueprint.slices:
        name = f"base_model.model.{part.linear.name}.vblora_logits"
        a, b = own[f"{name}_A.default"].grad, own[f"{name}_B.default"].grad
        both = torch.cat([a.reshape(-1, h), b.transpose(0, 1).reshape(-1, h)])
        assert both.abs().max() > 1e-4
        mine = gradients["logits"][part.start : part.stop]
        torch.testing.assert_close(mine, both, rtol=1e-4, atol=1e-5 * float(both.abs().max()))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_parity_with_lora_of_peft(family):
    base = make_base(family)
    model = adapt(base, LORA)
    state, inputs = make_state(model.blueprint), make_inputs(4)
    found, gradients = trained(model, state, inputs)

    theirs = peft_lora(base, model.blueprint, state)
    logits = outputs(theirs, inputs)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    probe(logits).backward()
    own = dict(theirs.named_parameters(remove_duplicate=False))
    length = model.blueprint.vector_length
    for part in model.blueprint.slices:
        name = f"base_model.model.{part.linear.name}.lora"
        a, b = own[f"{name}_A.default.weight"].grad, own[f"{name}_B.default.weight"].grad
        both = torch.cat([a.reshape(-1, length), b.T.reshape(-1, length)])
        assert both.abs().max() > 1e-4
        mine = gradients["rows"][part.start : part.stop]
        torch.testing.assert_close(mine, both, rtol=1e-4, atol=1e-5 * float(both.abs().max()))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_parity_with_lora_of_peft_whose_a_is_frozen(family):
    base = make_base(family)
    model = adapt(base, KINDS["ffa-lora"])
    state, inputs = make_state(model.blueprint), make_inputs(4)
    found, gradients = trained(model, state, inputs)

    rows = lora_rows(model.blueprint)
    of_b = np.concatenate([np.arange(part.middle, part.stop) for part in model.blueprint.slices])
    rows[of_b] = state.dense["rows"]
    theirs = peft_lora(base, model.blueprint, State(0, {**state.dense, "rows": rows}))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    logits = outputs(theirs, inputs)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    probe(logits).backward()
    length = model.blueprint.vector_length
    own = dict(theirs.named_parameters())
    expected = torch.cat(
        [
            own[f"base_model.model.{linear.name}.lora_B.default.weight"].grad.T.reshape(-1, length)
            for linear in model.blueprint.linears
        ]
    )
    scale = float(expected.abs().max())
    torch.testing.assert_close(gradients["rows"], expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_parity_with_unilora_of_peft(family):
    base = make_base(family)
    model = adapt(base, KINDS["uni-lora"])
    blueprint, spec = model.blueprint, model.blueprint.spec
    state, inputs = make_state(blueprint), make_inputs(4)
    found, gradients = trained(model, state, inputs)

    config = peft.UniLoraConfig(
        r=spec.rank,
        theta_d_length=spec.theta_length,
        target_modules=[linear.name for linear in blueprint.linears],
        fan_in_fan_out=family == "gpt2",
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    length = blueprint.vector_length
    places = torch.from_numpy(
        seeded.integers(spec.seed, "places", blueprint.rows * length, spec.theta_length)
    ).view(-1, length)
    scales = torch.bincount(places.flatten(), minlength=spec.theta_length).clamp(min=1).rsqrt()
    with torch.no_grad():
        theirs.base_model.unilora_theta_d["default"].copy_(torch.from_numpy(state.dense["theta"]))
    for part in blueprint.slices:
        layer = theirs.base_model.model.get_submodule(part.linear.name)
        a = places[part.start : part.middle].reshape(spec.rank, -1).long()
        b = places[part.middle : part.stop].reshape(spec.rank, -1).T.contiguous().long()
        layer.unilora_indices_A["default"], layer.unilora_indices_B["default"] = a, b
        layer.update_scaling("default", scales[a], scales[b])
    copy_head(theirs.base_model.model, blueprint, state)
    logits = outputs(theirs, inputs)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    probe(logits).backward()
    expected = theirs.base_model.unilora_theta_d["default"].grad
    torch.testing.assert_close(
        gradients["theta"], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )


def test_training_is_that_of_vblora_of_peft():
    """Twenty AdamW steps of the two, each with its own optimiser and its own logits, in float64."""
    base = make_base("bert", layers=1).double()
    model = adapt(base)
    state = initial_state(model.blueprint)
    tensors = {n: t.detach().double().requires_grad_() for n, t in model.load(state).items()}
    rates = {"bank": 4e-3, "logits": 1e-2, "head": 0.0}
    ours = torch.optim.AdamW(
        [{"params": [tensor], "lr": rates[name]} for name, tensor in tensors.items()], weight_decay=0.0
    )
    theirs = peft_vblora(base, model.blueprint, state).double()
    groups = [
        {"params": [p], "lr": rates["bank" if "bank" in name else "logits"]}
        for name, p in theirs.named_parameters()
        if "vblora" in name
    ]
    their_optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(20):
        inputs = make_inputs(3, seed=step)
        model.bind(tensors)
        mine, other = outputs(model, inputs), outputs(theirs, inputs)
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9, msg=f"step {step}")
        for optimiser, logits in ((ours, mine), (their_optimiser, other)):
            optimiser.zero_grad()
            probe(logits).backward()
            optimiser.step()
