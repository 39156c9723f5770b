"""The adapted model against an explicit dense reference and against PEFT, forward and gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.vblora.tiny import (
    FAMILIES,
    KINDS,
    LORA,
    VBLORA,
    adapt,
    make_base,
    make_inputs,
    make_state,
    outputs,
)
from vblora import seeded
from vblora.model import AdaptedModel
from vblora.peft_files import dense_logits
from vblora.spec import (
    BankOnlySpec,
    Blueprint,
    FFALoRASpec,
    LoRASpec,
    LoRAXSSpec,
    UniLoRASpec,
)
from vblora.state import State, lora_rows
from vblora.weights import dense_weight

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own call

CUT = replace(VBLORA, vector_length=24)  # 32 and 48 leave a row of 8 and none
SPECS = {**KINDS, "cut": CUT, "wide": replace(VBLORA, num_vectors=300, topk=5)}


def probe(logits: Tensor) -> Tensor:
    """A number that depends on every output in its own way."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (logits.double() * weights).sum()


def trained(model: AdaptedModel, state: State, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs and gradients of one client; those of logits dense in the bank's order, (S, h)."""
    tensors = model.load(state)
    model.bind(tensors)
    logits = outputs(model, inputs)
    found = dict(zip(tensors, torch.autograd.grad(probe(logits), list(tensors.values())), strict=True))
    gradients = {name: gradient[0] for name, gradient in found.items()}
    if "logits" in gradients:
        source: Any = model.source
        spec: Any = model.blueprint.spec
        candidates = source._candidates
        places = candidates.select(tensors["logits"])
        chosen = gradients["logits"][places.slots[0]]
        rest = gradients["logits"].clone()
        rest[places.slots[0]] = 0
        assert (rest == 0).all()
        full = torch.zeros(model.blueprint.rows, spec.num_vectors)
        gradients["logits"] = full.scatter(1, candidates.order[places.slots[0]].long(), chosen)
    return logits.detach(), gradients


# --- The explicit reference
# -----------------------------------------------------------------------------------


def reference_tensors(blueprint: Blueprint, state: State) -> dict[str, Tensor]:
    tensors = {name: torch.from_numpy(array.copy()) for name, array in state.dense.items()}
    if state.topk is not None:
        tensors["logits"] = torch.from_numpy(dense_logits(state, blueprint))
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def reference_rows(blueprint: Blueprint, tensors: dict[str, Tensor]) -> Tensor:
    """(S, b) row by row, as each paper writes them; LoRA-XS, which has no such rows, is left out."""
    spec, length = blueprint.spec, blueprint.vector_length
    everything = np.arange(blueprint.rows)
    if isinstance(spec, LoRASpec):
        return tensors["rows"]
    if isinstance(spec, FFALoRASpec):
        rows, of_b = torch.from_numpy(lora_rows(blueprint)), iter(tensors["rows"])
        b = {row for part in blueprint.slices for row in range(part.middle, part.stop)}
        return torch.stack([next(of_b) if row in b else rows[row] for row in everything])
    if isinstance(spec, UniLoRASpec):
        entries = blueprint.rows * length
        places = seeded.integers(spec.seed, "places", entries, spec.theta_length)
        projection = torch.zeros(entries, spec.theta_length, dtype=torch.float64)
        projection[np.arange(entries), places] = 1
        projection /= projection.sum(dim=0).clamp(min=1).sqrt()
        return (projection @ tensors["theta"].double()).float().view(-1, length)
    if isinstance(spec, BankOnlySpec):
        order = torch.from_numpy(seeded.order(spec.seed, everything, spec.num_vectors, spec.num_vectors))
        values = torch.from_numpy(
            seeded.values(spec.seed, everything, spec.num_vectors, spec.num_vectors, spec.init_std)
        )
        logits = torch.empty_like(values).scatter(1, order.long(), values)
    else:
        logits = tensors["logits"]
    best, vectors = logits.topk(spec.topk)
    return torch.stack([w.softmax(0) @ tensors["bank"][v] for w, v in zip(best, vectors, strict=True)])


def reference_changes(base: nn.Module, blueprint: Blueprint, tensors: dict[str, Tensor]) -> list[Tensor]:
    """What is added to W (out, in), layer by layer."""
    spec, changes = blueprint.spec, []
    if isinstance(spec, LoRAXSSpec):
        for linear, core in zip(blueprint.linears, tensors["cores"], strict=True):
            layer = base.get_submodule(linear.name)
            u, s, vh = torch.linalg.svd(dense_weight(layer).double(), full_matrices=False)
            probe = seeded.uniform(0, "probe", 0, linear.in_features, 1.0)
            signs = (vh @ torch.from_numpy(probe).double()).sign()
            u, vh = u * signs, vh * signs.unsqueeze(1)
            r = spec.rank
            changes.append((u[:, :r] @ core.double() @ (s[:r].diag() @ vh[:r])).float())
        return changes
    rows, row = reference_rows(blueprint, tensors), 0

    def factor(side: int) -> Tensor:
        nonlocal row
        lines = []
        for _ in range(spec.rank):
            line = torch.empty(0)
            while len(line) < side:
                line, row = torch.cat([line, rows[row]]), row + 1
            lines.append(line[:side])
        return torch.stack(lines)

    scaling = spec.alpha / spec.rank if isinstance(spec, LoRASpec | FFALoRASpec) else 1.0
    for linear in blueprint.linears:
        a, b = factor(linear.in_features), factor(linear.out_features)
        changes.append(scaling * b.T @ a)
    assert row == blueprint.rows
    return changes


def reference_weights(base: nn.Module, blueprint: Blueprint, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base's weights with each low-rank product added."""
    weights = {}
    changes = reference_changes(base, blueprint, tensors)
    for linear, change in zip(blueprint.linears, changes, strict=True):
        layer = base.get_submodule(linear.name)
        weights[f"{linear.name}.weight"] = layer.weight + (
            change if isinstance(layer, nn.Linear) else change.T
        )
    start = 0
    for tensor in blueprint.head:
        weights[tensor.name] = tensors["head"][start : start + tensor.size].view(tensor.shape)
        start += tensor.size
    return weights


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_merged_weights(family, kind):
    base = make_base(family)
    model = adapt(base, SPECS[kind])
    state, inputs = make_state(model.blueprint), make_inputs(4)
    found, gradients = trained(model, state, inputs)

    tensors = reference_tensors(model.blueprint, state)
    weights = reference_weights(base, model.blueprint, tensors)
    logits = outputs(lambda **given: functional_call(base, weights, kwargs=given), inputs)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    expected = dict(zip(tensors, torch.autograd.grad(probe(logits), list(tensors.values())), strict=True))
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 1e-3, f"{name}: the test shows nothing"
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)


# --- Cohorts
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        *((family, spec) for family in FAMILIES for spec in (CUT, LORA)),
        *(("bert", KINDS[kind]) for kind in ("ffa-lora", "lora-xs", "uni-lora", "bank-only")),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_a_cohort_gives_what_each_client_gets_alone(family, spec):
    clients, each = 3, 2
    model = adapt(make_base(family), spec)
    tensors = model.load(*[make_state(model.blueprint)] * clients)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    inputs = make_inputs(clients * each)
    model.bind(tensors)
    together = outputs(model, inputs)
    losses = [probe(part) for part in together.chunk(clients)]
    gradients = torch.autograd.grad(sum(losses), list(tensors.values()))
    for client in range(clients):
        alone = {
            name: tensor[client : client + 1].detach().requires_grad_() for name, tensor in tensors.items()
        }
        rows = slice(client * each, (client + 1) * each)
        model.bind(alone)
        logits = outputs(model, {name: tensor[rows] for name, tensor in inputs.items()})
        torch.testing.assert_close(logits, together[rows], rtol=1e-5, atol=1e-5)
        for one, every in zip(
            torch.autograd.grad(probe(logits), list(alone.values())), gradients, strict=True
        ):
            torch.testing.assert_close(one[0], every[client], rtol=1e-4, atol=1e-4 * float(one.abs().max()))
