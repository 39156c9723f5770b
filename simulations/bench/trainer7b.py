"""A site with a small GPU: a round of the resident trainer over a 7B base in 4 bits, its memory and seconds.

    python -m simulations.bench.trainer7b [--shape llama-2-7b] [--rows 4] [--length 512] [--json FILE]

Needs torch, transformers and bitsandbytes, no data libraries and no Flower; with grpcio the round is asked
for over the trainer's socket. Weights are random: each block is made and quantised by itself, so that the
dense model never lies there. What `simulations.memory_plan` predicts stands beside what was measured; with
--limit a larger GPU gives no more than one of so many GiB would.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fl_client.assembly import Texts, assemble
from fl_client.base import Base, find_device
from fl_client.batches import Examples
from fl_client.questions import Answer, Question, Scalar
from fl_client.serve import answer
from fl_client.settings import AdapterSettings, ComputeSettings, DataSettings, SiteSettings
from fl_client.site import OnStep, Site
from fl_client.train import LocalSettings
from simulations.bench.shapes import SHAPES, Shape
from simulations.bench.tables import print_table
from simulations.bench.timing import describe_machine
from simulations.memory_plan import CONTEXT, GIB, BaseShape, Training, base_shape, predicted_memory
from vblora.files import write_atomic
from vblora.weights import keep_unpacked
from vblora.wire import encode_state, initial

__all__ = ["Row", "build_in_few_bits", "few_bits", "main", "measure"]

STEPS = 10  # of a round
ROUNDS = 2  # of each way; the first warms up
# How a site may keep the memory down: checkpointing, pieces of a step.
WAYS = ((False, 1), (False, 4), (True, 1), (True, 4))

Ask = Callable[[Question, Mapping[str, Scalar]], Answer]


@dataclass(frozen=True)
class Row:
    """One way of training.

    Attributes:
        checkpointing, accumulate: the site's settings.
        first: seconds of the first round, from the question to the encoded update.
        seconds: of the last round.
        peak: GiB that PyTorch had allocated at most; 0 on a CPU.
        predicted: GiB that were predicted for that.
        used: GiB of the device that were taken after it, by whomever; 0 on a CPU.
        device: GiB that such a device is said to need.
        sent: bytes of the update.
        error: why there is none.
    """

    checkpointing: bool
    accumulate: int
    first: float = 0.0
    seconds: float = 0.0
    peak: float = 0.0
    predicted: float = 0.0
    used: float = 0.0
    device: float = 0.0
    sent: int = 0
    error: str = ""


COLUMNS: dict[str, Callable[[Any], str]] = {
    "checkpointing": lambda row: "yes" if row.checkpointing else "no",
    "accumulate": lambda row: str(row.accumulate),
    "s a round": lambda row: f"{row.seconds:.1f}" if not row.error else row.error,
    "peak GiB": lambda row: f"{row.peak:.2f}",
    "predicted": lambda row: f"{row.predicted:.2f}",
    "used GiB": lambda row: f"{row.used:.2f}",
    "said to need": lambda row: f"{row.device:.2f}",
    "update B": lambda row: f"{row.sent:,}",
}


def few_bits(layer: nn.Linear, quantize: str = "4bit") -> nn.Module:
    """A frozen linear layer in 4 or 8 bits on its own device, as `--quantize` loads it."""
    import bitsandbytes as bnb

    bits: Any = bnb.nn
    sides, bias, weight = (layer.in_features, layer.out_features), layer.bias is not None, layer.weight
    if quantize == "4bit":
        nf4 = {"quant_type": "nf4", "compress_statistics": True}
        made = bits.Linear4bit(*sides, bias=bias, compute_dtype=weight.dtype, device="meta", **nf4)
        made.weight = bits.Params4bit(weight.data, requires_grad=False, **nf4)
    else:
        made = bits.Linear8bitLt(*sides, bias=bias, has_fp16_weights=False, device="meta")
        made.weight = bits.Int8Params(weight.data.half(), requires_grad=False, has_fp16_weights=False)
    if bias:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    moved: nn.Module = made.to(layer.weight.device)  # which quantises
    return moved


def build_in_few_bits(shape: Shape, device: torch.device) -> nn.Module:
    """A Llama of this shape with random weights, its blocks' linear layers in 4 bits; bfloat16."""
    layers = shape.sizes["num_hidden_layers"]
    config = LlamaConfig(**{**shape.sizes, "num_hidden_layers": 0}, use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
            config.num_hidden_layers = layers
            for place in range(layers):
                block = LlamaDecoderLayer(config, place)
                for name, module in list(block.named_modules()):
                    if isinstance(module, nn.Linear):
                        nn.init.normal_(module.weight, std=0.02)
                        parent, _, child = name.rpartition(".")
                        setattr(block.get_submodule(parent), child, few_bits(module))
                model.model.layers.append(block)
    finally:
        torch.set_default_dtype(before)
    made: nn.Module = model
    keep_unpacked(made)
    return made


def measure(shape: Shape, device: torch.device, steps: int) -> Iterator[Row]:
    """Train in each way, through one trainer over one base; yields a row as soon as it is known."""
    with torch.device("meta"):
        plain = base_shape(LlamaForCausalLM(LlamaConfig(**shape.sizes)))
    for checkpointing in dict.fromkeys(checkpointing for checkpointing, _ in WAYS):
        yield from _over_one_base(shape, plain, device, checkpointing, steps)
        gc.collect()  # no base lies there any more when the next one is made
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _over_one_base(
    shape: Shape, plain: BaseShape, device: torch.device, checkpointing: bool, steps: int
) -> Iterator[Row]:
    """The ways that share a base: an adapter is put into it for good, as checkpointing is."""
    numbers = [pieces for given, pieces in WAYS if given == checkpointing]
    with tempfile.TemporaryDirectory(prefix="fedvb-") as folder:
        try:
            site = _site(shape, build_in_few_bits(shape, device), checkpointing, Path(folder), steps)
        except torch.OutOfMemoryError as error:
            yield from (Row(checkpointing, pieces, error=_one_line(error)) for pieces in numbers)
            return
        for pieces in numbers:
            own = replace(site.settings, local=replace(site.settings.local, accumulate=pieces))
            with _asked(replace(site, settings=own), Path(folder)) as ask:
                yield _rounds(shape, plain, site, ask, Row(checkpointing, pieces))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    llamas = [name for name, shape in SHAPES.items() if "num_key_value_heads" in shape.sizes]
    parser.add_argument("--shape", choices=llamas, default="llama-2-7b")
    parser.add_argument("--rows", type=int, default=4, help="texts of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a round")
    parser.add_argument("--layers", type=int, help="blocks of the model; else as many as the shape has")
    parser.add_argument("--limit", type=float, help="GiB of a smaller GPU, CUDA's own share included")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write all numbers here, row by row")
    given = parser.parse_args(arguments)
    device = find_device(given.device)
    shape = replace(SHAPES[given.shape], rows=given.rows, length=given.length)
    if given.layers:
        shape = replace(shape, sizes={**shape.sizes, "num_hidden_layers": given.layers})
    if given.limit:
        _limit(device, given.limit)
    machine, rows = describe_machine(), []
    for row in measure(shape, device, given.steps):
        rows.append(row)
        print(json.dumps(asdict(row)), flush=True)
        if given.json:  # as far as it has come: the next way may end badly
            told = {"machine": machine, "given": _plain(given), "rows": [asdict(row) for row in rows]}
            write_atomic(given.json, json.dumps(told, indent=2))
    what = f"{given.shape} in nf4, {given.rows}x{given.length} tokens, rounds of {given.steps} steps"
    limit = f", {given.limit:g} GiB at most" if given.limit else ""
    print_table(f"{what}, {machine['device']}{limit}", rows, COLUMNS)


def _plain(given: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(given).items() if name != "json"}


def _limit(device: torch.device, gib: float) -> None:
    """Have PyTorch allocate no more than a device of so many GiB leaves it."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gib * GIB - CONTEXT) / whole), device)


def _site(shape: Shape, base: nn.Module, checkpointing: bool, folder: Path, steps: int) -> Site:
    """A site of its own over texts of one length, more of them than a round takes."""
    count = 2 * shape.rows * steps
    tokens = np.random.default_rng(0).integers(10, shape.sizes["vocab_size"], count * shape.length)
    starts = np.arange(0, len(tokens) + 1, shape.length, dtype=np.int64)
    train = Examples(tokens.astype(np.int32), starts, np.zeros(count, np.int64))
    test = train.take(np.arange(1))
    settings = SiteSettings(
        device=str(next(base.parameters()).device),
        cohort=1,
        data=DataSettings(clients=1, partition="iid", max_length=shape.length),
        adapter=AdapterSettings(
            rank=shape.rank, num_vectors=shape.num_vectors, vector_length=shape.vector_length
        ),
        local=LocalSettings(steps=steps, batch_size=shape.rows),
        compute=ComputeSettings(checkpointing=checkpointing),
        state=str(folder / "memory"),
    )
    texts = Texts(train, (np.arange(count),), test, (np.arange(0),), (), {})
    return assemble(settings, texts, Base(base, None, 0))


@contextmanager
def _asked(site: Site, folder: Path) -> Iterator[Ask]:
    """Asks a trainer that holds a site: over its socket where grpcio is there in a fitting version."""
    try:
        from fl_client import trainer
        from fl_client.resident import Resident
        from fl_client.thin import ask_trainer
    except Exception as error:  # generated code refuses older libraries by errors of their own
        print(f"without the socket: {type(error).__name__}: {error}")
        yield lambda question, run: next(answer(site, [question]))
        return

    class Held(Resident):
        """A resident whose site is there already."""

        def answer(
            self, question: Question, run: Mapping[str, Scalar], on_step: OnStep | None = None
        ) -> Answer:
            return next(answer(site, [question], on_step, on_step))

    held = Held({"model": "random", "data": "random"}, folder)
    held.device = site.model.device
    socket = folder / "t.sock"
    server = trainer._listen(socket, trainer._Service(held, "random", "random", threading.Event()))
    try:
        yield lambda question, run: ask_trainer(socket, question, run)
    finally:
        server.stop(grace=None).wait()


def _rounds(shape: Shape, plain: BaseShape, site: Site, ask: Ask, way: Row) -> Row:
    """Ask for some rounds from the initial state; the last one is told."""
    start, device = initial(site.blueprint), site.model.device
    blob = encode_state(start, site.blueprint, start)
    training = Training(
        shape.rows,
        shape.length,
        str(site.model.dtype).removeprefix("torch."),
        "4bit",
        checkpointing=way.checkpointing,
        accumulate=way.accumulate,
    )
    memory = predicted_memory(plain, site.blueprint, training)
    way = replace(way, predicted=memory.allocated / GIB, device=memory.device / GIB)
    seconds = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for number in range(1, ROUNDS + 1):
        config: dict[str, Scalar] = {"round": number, "lr-scale": 1.0, "run": "bench"}
        started = time.perf_counter()
        try:
            found = ask(Question(0, "train", blob, config), {})
        except torch.OutOfMemoryError as error:  # without a trainer, which says so in its answer
            found = Answer(0, error=_one_line(error))
        seconds.append(time.perf_counter() - started)
        if found.error:
            break
    way = replace(way, first=seconds[0], seconds=seconds[-1], sent=len(found.blob), error=found.error)
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_allocated(device)
        way = replace(way, peak=peak / GIB, used=(whole - free) / GIB)
    return way


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


if __name__ == "__main__":
    main()
