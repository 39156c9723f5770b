"""A site with a small GPU: a round of the resident trainer over a 7B base in 4 bits, its memory and seconds.

    python -m simulations.bench.trainer7b [--shape llama-2-7b] [--rows 4] [--length 512] [--json FILE]

Needs torch, transformers and bitsandbytes, no data libraries and no Flower; with grpcio the round is asked
for over the trainer's socket. Weights are random: each block is made and quantised by itself, so that the
dense model never lies there. What `simulations.memory_plan` predicts stands beside what was measured.
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
from simulations.memory_plan import GIB, BaseShape, Training, base_shape, predicted_memory
from vblora.weights import keep_unpacked
from vblora.wire import encode_state, initial

__all__ = ["Row", "build_in_few_bits", "few_bits", "main", "measure"]

STEPS = 10
# How a site may keep the memory down: checkpointing, pieces of a step.
WAYS = ((False, 1), (False, 4), (True, 1), (True, 4))

Ask = Callable[[Question, Mapping[str, Scalar]], Answer]


@dataclass(frozen=True)
class Row:
    """One way of training.

    Attributes:
        checkpointing, accumulate: the site's settings.
        seconds: of a round of `STEPS` steps, from the question to the encoded update.
        peak: GiB that PyTorch had allocated at most; 0 on a CPU.
        predicted: GiB that were predicted for that.
        device: GiB that such a device is said to need.
        sent: bytes of the update.
        error: why there is none.
    """

    checkpointing: bool
    accumulate: int
    seconds: float = 0.0
    peak: float = 0.0
    predicted: float = 0.0
    device: float = 0.0
    sent: int = 0
    error: str = ""


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


def measure(shape: Shape, device: torch.device, steps: int) -> list[Row]:
    """Train a round in each way, through one trainer over one base."""
    rows = []
    with torch.device("meta"):
        plain = base_shape(LlamaForCausalLM(LlamaConfig(**shape.sizes)))
    with tempfile.TemporaryDirectory(prefix="fedvb-") as folder:
        for checkpointing in dict.fromkeys(checkpointing for checkpointing, _ in WAYS):
            site = _site(shape, build_in_few_bits(shape, device), checkpointing, Path(folder), steps)
            for pieces in (pieces for given, pieces in WAYS if given == checkpointing):
                own = replace(site.settings, local=replace(site.settings.local, accumulate=pieces))
                with _asked(replace(site, settings=own), Path(folder)) as ask:
                    rows.append(_round(shape, plain, site, ask, Row(checkpointing, pieces)))
            del site
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    llamas = [name for name, shape in SHAPES.items() if "num_key_value_heads" in shape.sizes]
    parser.add_argument("--shape", choices=llamas, default="llama-2-7b")
    parser.add_argument("--rows", type=int, default=4, help="texts of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    given = parser.parse_args(arguments)
    device = find_device(given.device)
    shape = replace(SHAPES[given.shape], rows=given.rows, length=given.length)
    rows = measure(shape, device, STEPS)
    machine = describe_machine()
    columns: dict[str, Callable[[Any], str]] = {
        "checkpointing": lambda row: "yes" if row.checkpointing else "no",
        "accumulate": lambda row: str(row.accumulate),
        "s a round": lambda row: f"{row.seconds:.1f}" if not row.error else row.error,
        "peak GiB": lambda row: f"{row.peak:.2f}",
        "predicted": lambda row: f"{row.predicted:.2f}",
        "device GiB": lambda row: f"{row.device:.1f}",
        "update B": lambda row: f"{row.sent:,}",
    }
    what = f"{given.shape} in nf4, {given.rows}x{given.length} tokens, rounds of {STEPS} steps"
    title = f"{what}, {machine['device']}"
    print_table(title, rows, columns)
    if given.json:
        given.json.write_text(
            json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2)
        )


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
    except (ImportError, RuntimeError) as error:  # generated code refuses older libraries so
        print(f"without the socket: {error}")
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


def _round(shape: Shape, plain: BaseShape, site: Site, ask: Ask, way: Row) -> Row:
    start = initial(site.blueprint)
    blob = encode_state(start, site.blueprint, start)
    device = site.model.device
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
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    config: dict[str, Scalar] = {"round": 1, "lr-scale": 1.0, "run": "bench"}
    found = ask(Question(0, "train", blob, config), {})
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    return replace(way, seconds=seconds, peak=peak, sent=len(found.blob), error=found.error)


if __name__ == "__main__":
    main()
