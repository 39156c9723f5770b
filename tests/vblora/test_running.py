"""Ways of running that training loops use: checkpointing, autocast, compilation, attention, data parallel."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests.vblora.test_recompute import bases
from tests.vblora.tiny import FAMILIES, adapt, make_base, make_blueprint, make_inputs, make_state
from vblora.blocks import checkpoint_blocks
from vblora.errors import ModelError
from vblora.model import AdaptedModel

Run = Callable[..., Any]


def gradients(
    model: AdaptedModel, run: Run | None = None, tensors: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Of a number that every output has its part in; and the outputs."""
    tensors = tensors or model.load(make_state(model.blueprint))
    model.bind(tensors)
    logits = (model if run is None else run)(**make_inputs(4)).logits
    loss = (logits.double() * torch.arange(1.0, logits.numel() + 1).view(logits.shape).cos()).sum()
    found = torch.autograd.grad(loss, list(tensors.values()))
    model.unbind()
    return {"outputs": logits.detach(), **dict(zip(tensors, found, strict=True))}


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, values in expected.items():
        bound = tolerance * float(values.abs().max())
        assert bound >= 0
        torch.testing.assert_close(found[name].to(values.dtype), values, rtol=0, atol=bound, msg=name)


# --- Activation checkpointing --------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_checkpointed_blocks_give_the_same_to_the_bit(family, recompute):
    base = bases(torch.float32)[family]
    blueprint = make_blueprint(base)
    expected = gradients(AdaptedModel(copy.deepcopy(base), blueprint, recompute=recompute))
    blocks = checkpoint_blocks(base, [linear.name for linear in blueprint.linears])
    assert len(blocks) == 2
    check_same(gradients(AdaptedModel(base, blueprint, recompute=recompute)), expected, 0.0)


def test_checkpointed_blocks_keep_nothing_of_their_inside():
    base = make_base("llama", layers=4)
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.nbytes)
        return tensor

    kept = []
    for checkpointed in (False, True):
        own = copy.deepcopy(base)
        blueprint = make_blueprint(own)
        if checkpointed:
            checkpoint_blocks(own, [linear.name for linear in blueprint.linears])
        model = AdaptedModel(own, blueprint)
        model.bind(model.load(make_state(blueprint)))
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**make_inputs(4))
        kept.append(sum(packed))
    assert kept[1] < kept[0] / 4, "what is kept is the last norm's and the output's"


def test_checkpointed_blocks_are_run_once_where_no_gradient_is_wanted():
    model = adapt(make_base("bert"))
    calls = []
    block = model.base.bert.encoder.layer[0]
    inner = block.forward
    block.forward = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    checkpoint_blocks(model.base, ["bert.encoder.layer.0.attention.self.query"])
    with torch.no_grad():
        model.bind(model.load(make_state(model.blueprint)))
        model(**make_inputs(2))
    assert len(calls) == 1
    gradients(model)
    assert len(calls) == 3


def test_a_base_without_blocks_is_refused():
    with pytest.raises(ModelError, match="--checkpointing: the base has no list of blocks"):
        checkpoint_blocks(make_base("bert"), ["bert.pooler.dense"])


# --- Prediction ----------------------------------------------------------------------


def counted(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each composing of rows."""
    calls: list[int] = []
    rows = model.source.rows
    monkeypatch.setattr(model.source, "rows", lambda tensors: calls.append(1) or rows(tensors))
    return calls


def test_prediction_composes_once_until_a_tensor_changes(monkeypatch):
    model = adapt(make_base("bert"))
    tensors, inputs = model.load(make_state(model.blueprint)), make_inputs(3)
    calls = counted(model, monkeypatch)

    def predict() -> Tensor:
        model.bind(tensors)
        logits: Tensor = model(**inputs).logits
        return logits

    with torch.no_grad():
        first = predict()
        assert torch.equal(predict(), first)
        assert len(calls) == 1
        for name in tensors:
            tensors[name] += 0.5  # in place: the same tensor, changed
            before, first = first, predict()
            assert not torch.equal(first, before), name
        assert len(calls) == 1 + len(tensors)
        tensors["bank"] = tensors["bank"].clone()  # another tensor
        predict()
        assert len(calls) == 2 + len(tensors)
        model.unbind()
        assert torch.equal(predict(), first)
        assert len(calls) == 3 + len(tensors)


def test_training_composes_every_time(monkeypatch):
    model = adapt(make_base("bert"))
    tensors = model.load(make_state(model.blueprint))
    calls = counted(model, monkeypatch)
    with torch.no_grad():
        model.bind(tensors)
    for _ in range(2):
        model.bind(tensors)
        model(**make_inputs(2)).logits.sum().backward()
    assert len(calls) == 3
    assert all(tensor.grad is not None for tensor in tensors.values())
    with torch.inference_mode():
        model.bind(tensors)
        model.bind(tensors)
    assert len(calls) == 4


# --- Autocast, attention, compilation ------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_under_autocast_products_are_in_16_bits_and_gradients_in_32(family):
    model = adapt(make_base(family))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(model)
    assert found["outputs"].dtype is torch.bfloat16
    assert all(tensor.dtype is torch.float32 for name, tensor in found.items() if name != "outputs")
    check_same(found, gradients(model), 0.1)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_any_attention_will_do(family):
    found = []
    for kind in ("eager", "sdpa"):
        base = make_base(family)
        base.set_attn_implementation(kind)
        found.append(gradients(adapt(base)))
    check_same(*found, 1e-5)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function'> should not be instantiated")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # both the compiler's own
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_base_is_one_graph_that_new_tensors_do_not_break(family, backend, recompute):
    base = make_base(family, layers=1)
    model = AdaptedModel(base, make_blueprint(base), recompute=recompute)
    tolerance = 0 if backend == "aot_eager" else 1e-5
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        from torch._dynamo import lookup_backend

        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(base, backend=counting, fullgraph=True)
    for shift in (0.0, 0.1):
        tensors = model.load(make_state(model.blueprint))
        with torch.no_grad():
            tensors["bank"] += shift
        expected = gradients(model, tensors=tensors)
        check_same(gradients(model, compiled, tensors), expected, tolerance)
    assert len(graphs) == 1


# --- Data parallel -------------------------------------------------------------------


class Wrapped(nn.Module):
    """What wrappers want: trained tensors as parameters, a forward that composes."""

    def __init__(self, model: AdaptedModel, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.base = model.base
        self.tensors = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in tensors.items()})

    def forward(self, **inputs: Tensor) -> Tensor:
        self.model.bind(self.tensors)
        logits: Tensor = self.model(**inputs).logits
        return logits


def _wrapped() -> Wrapped:
    model = adapt(make_base("bert", layers=1))
    return Wrapped(model, {k: v.detach() for k, v in model.load(make_state(model.blueprint)).items()})


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    wrapper = nn.parallel.DistributedDataParallel(_wrapped())
    own = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in make_inputs(4).items()}
    wrapper(**own).square().mean().backward()
    if rank == 0:
        found = {name: parameter.grad for name, parameter in wrapper.module.tensors.items()}
        torch.save(found, f"{folder}/found.pt")
        store.set("saved", "yes")
    store.wait(["saved"])
    # Freeing the wrapper joins gloo's thread with Python's lock held, which that thread may be waiting for.
    os._exit(0)


def test_two_processes_under_ddp_get_the_gradients_of_the_whole_batch(tmp_path: Path):
    mp.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    whole = _wrapped()
    whole(**make_inputs(4)).square().mean().backward()
    found = torch.load(tmp_path / "found.pt")
    check_same(found, {name: value.grad for name, value in whole.tensors.items()}, 1e-5)
