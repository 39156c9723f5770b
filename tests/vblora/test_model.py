"""The adapted model against an explicit dense reference and against PEFT, forward and gradient."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertConfig, BertForMaskedLM

from tests.vblora.tiny import (
    FAMILIES,
    KINDS,
    LORA,
    VBLORA,
    adapt,
    make_base,
    make_blueprint,
    make_inputs,
    make_state,
    outputs,
)
from vblora import seeded
from vblora.errors import ModelError
from vblora.model import AdaptedModel, describe_base, find_head, find_linears
from vblora.peft_files import dense_logits
from vblora.spec import (
    BankOnlySpec,
    Blueprint,
    FFALoRASpec,
    HeadTensor,
    Linear,
    LoRASpec,
    LoRAXSSpec,
    UniLoRASpec,
)
from vblora.state import State, initial_state, lora_rows
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
    _copy_head(model.base_model.model, blueprint, state)
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
    _copy_head(model.base_model.model, blueprint, state)
    return model


def _copy_head(base: nn.Module, blueprint: Blueprint, state: State) -> None:
    start = 0
    for tensor in blueprint.head:
        value = torch.from_numpy(state.dense["head"][start : start + tensor.size]).view(tensor.shape)
        base.get_parameter(tensor.name).data.copy_(value)
        start += tensor.size


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
    _copy_head(theirs.base_model.model, blueprint, state)
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


# --- The base
# ---------------------------------------------------------------------------------------------------


def test_unbound_the_model_is_the_frozen_base():
    base = make_base("bert")
    model, inputs = adapt(base), make_inputs(3)
    expected = base(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    model.bind(model.load(make_state(model.blueprint)))
    assert not torch.allclose(model(**inputs).logits, expected, atol=1e-2)
    model.unbind()
    assert torch.equal(model(**inputs).logits, expected)


def test_the_base_is_frozen():
    model = adapt(make_base("bert").train())
    assert not model.base.training
    assert not any(parameter.requires_grad for parameter in model.base.parameters())
    kept = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    tensors = model.load(make_state(model.blueprint))
    model.bind(tensors)
    probe(model(**make_inputs(2)).logits).backward()
    assert all(tensor.grad is not None for tensor in tensors.values())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.base.state_dict().items())


def test_a_16_bit_base_gets_16_bit_factors_from_float32_tensors():
    base = make_base("llama").bfloat16()
    model = adapt(base)
    state, inputs = make_state(model.blueprint), make_inputs(3)
    logits, gradients = trained(model, state, inputs)
    assert logits.dtype is torch.bfloat16
    assert all(gradient.dtype is torch.float32 for gradient in gradients.values())
    expected, _ = trained(adapt(make_base("llama")), state, inputs)
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.15)


@pytest.mark.parametrize(
    ("family", "names", "outside"),
    [
        ("bert", ["query", "key", "value", "dense", "dense", "dense"], ["bert.pooler.dense"]),
        ("roberta", ["query", "key", "value", "dense", "dense", "dense"], []),
        ("gpt2", ["c_attn", "c_proj", "c_fc", "c_proj"], []),
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], []),
        ("llama-cls", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], []),
    ],
)
def test_all_linear_is_every_layer_of_the_trunk(family, names, outside):
    found = find_linears(make_base(family))
    assert [linear.name.rsplit(".", 1)[-1] for linear in found] == names * 2 + ["dense"] * len(outside)
    assert [linear.name for linear in found[len(names) * 2 :]] == outside


def test_sides_are_in_and_out():
    by_name = {linear.name: linear for linear in find_linears(make_base("gpt2"))}
    assert by_name["transformer.h.0.mlp.c_fc"] == Linear("transformer.h.0.mlp.c_fc", 32, 128)
    by_name = {linear.name: linear for linear in find_linears(make_base("llama"))}
    assert by_name["model.layers.1.self_attn.k_proj"] == Linear("model.layers.1.self_attn.k_proj", 32, 16)


def test_targets_fit_whole_names_from_their_end():
    base = make_base("bert")
    names = [linear.name for linear in find_linears(base, " query , attention.output.dense ")]
    assert [name.split("layer.")[1] for name in names] == [
        "0.attention.self.query",
        "0.attention.output.dense",
        "1.attention.self.query",
        "1.attention.output.dense",
    ]
    whole = "bert.encoder.layer.1.intermediate.dense"
    assert [linear.name for linear in find_linears(base, whole)] == [whole]


@pytest.mark.parametrize(
    "targets", ["quer", "uery", "query,nonsense", "classifier", "encoder", "all-linear,query"]
)
def test_a_target_that_fits_nothing_is_named(targets):
    with pytest.raises(
        ModelError, match=r"--target-modules: '.+' fits no linear layer; the base has dense, key"
    ):
        find_linears(make_base("bert"), targets)


def test_no_target_at_all_is_refused():
    with pytest.raises(ModelError, match="no linear layer to adapt"):
        make_blueprint(make_base("bert"), VBLORA, " , ")


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", [("classifier.weight", (3, 32)), ("classifier.bias", (3,))]),
        (
            "roberta",
            [
                ("classifier.dense.weight", (32, 32)),
                ("classifier.dense.bias", (32,)),
                ("classifier.out_proj.weight", (3, 32)),
                ("classifier.out_proj.bias", (3,)),
            ],
        ),
        ("llama-cls", [("score.weight", (3, 32))]),
        ("llama", []),
        ("gpt2", []),
    ],
)
def test_the_head_is_what_stands_outside_the_trunk(family, head):
    assert find_head(make_base(family)) == tuple(HeadTensor(*tensor) for tensor in head)


def test_a_language_model_without_labels_has_no_head():
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    assert find_head(BertForMaskedLM(config)) == ()


def test_a_head_that_is_not_linear_is_refused():
    base = make_base("bert")
    base.norm = nn.LayerNorm(32)
    with pytest.raises(ModelError, match="task head: norm is a LayerNorm; only linear layers"):
        find_head(base)


def test_a_base_is_described_by_its_sizes():
    assert describe_base(make_base("bert")) == "bert-32-2-96"
    assert describe_base(make_base("gpt2")) == "gpt2-32-2-96"
    assert describe_base(nn.Linear(2, 2)) == "Linear"


def test_a_base_that_does_not_fit_the_blueprint_is_refused_by_layer():
    base = make_base("bert")
    blueprint = make_blueprint(base)
    wrong = replace(
        blueprint,
        linears=(
            Linear("bert.pooler.dense", 32, 64),
            Linear("bert.pooler.nothing", 4, 4),
            Linear("bert", 4, 4),
        ),
        head=(HeadTensor("classifier.weight", (4, 32)), HeadTensor("classifier.scale", (1,))),
    )
    with pytest.raises(ModelError) as caught:
        AdaptedModel(base, wrong)
    assert str(caught.value) == (
        "base model does not fit the adapter: bert.pooler.dense is 32 to 32, expected 32 to 64; "
        "bert.pooler.nothing is no linear layer, expected 4 to 4; bert is no linear layer, expected 4 to 4; "
        "head tensor classifier.weight has shape (3, 32), expected (4, 32); "
        "head tensor classifier.scale has shape None, expected (1,)"
    )
    AdaptedModel(base, blueprint)  # nothing was replaced by the refusal
    with pytest.raises(ModelError, match="no linear layer, expected"):
        AdaptedModel(base, blueprint)  # a second adapter would stand on the first


def test_the_start_leaves_a_lora_model_as_it_was():
    base = make_base("bert")
    model = adapt(base, LORA)
    state = initial_state(model.blueprint)
    model.bind(model.load(state))
    _copy_head(base, model.blueprint, state)
    inputs = make_inputs(3)
    torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits)
    assert not np.any(state.dense["head"][-3:])
