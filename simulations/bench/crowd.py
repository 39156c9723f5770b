"""Many clients that cost nothing by themselves: what the engine adds to a round, and what it keeps."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from fl_client.app import handle
from fl_client.assembly import Texts, assemble
from fl_client.base import Base
from fl_client.memory import Memory
from fl_client.serve import Answer, Question, answer
from fl_client.settings import AdapterSettings, DataSettings, SiteSettings
from fl_client.site import Site
from fl_client.train import LocalSettings
from fl_server.app import GridExchange, app
from fl_server.exchange import Request
from fl_server.observer import LogObserver
from fl_server.plot import read_history
from simulations.bench.shapes import LABELS, SHAPES, Shape, build, make_examples
from simulations.grid import InProcessGrid, run_server_app
from simulations.meters import resident
from simulations.workers import Helpers
from vblora.frame import read_blob
from vblora.model import describe_base, find_head, find_linears
from vblora.rounding import WIRES, round_update
from vblora.spec import Blueprint, VBLoRASpec
from vblora.state import State, Update
from vblora.wire import decode_state, encode_update

__all__ = ["measure_overhead", "measure_scale"]

MB = 1e6
PIECE = 16  # clients that a process is asked for at once
OPAQUE = 100_000  # bytes each way, as in the measurement of Ray that this is compared with
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 2000,
    "num_labels": len(LABELS),
}


def measure_overhead(clients: int, rounds: int, processes: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """Seconds of a round of clients that do no training: bytes carried to and fro, and whole rounds of
    MiniLM's adapter, each update rounded by the default wire, encoded, kept, decoded, checked, averaged; by
    how many processes answer for the clients, the server's among them."""
    wire = []
    for count in processes:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            records = _run_idle(out, clients, rounds, count)
        seconds = [record["seconds"] for record in records[1:]]
        # The first round starts the helpers, the last is evaluated as well.
        typical = statistics.median(seconds[1:-1] or seconds)
        update = records[1]["bytes"]["up_per_client"]
        wire.append({"processes": count, "update_bytes": update, "seconds": typical})
    return {
        "clients": clients,
        "opaque_bytes": OPAQUE,
        "opaque_seconds": statistics.median(_carried(clients) for _ in range(rounds)),
        "wire": wire,
    }


def measure_scale(clients: int, per_round: int, rounds: int) -> dict[str, Any]:
    """Memory of this process after each round of a real run over a tiny encoder, megabytes.

    Call it in a fresh process, which has imported all by then: Flower alone takes 120 MB.
    """
    before = resident() / MB
    curve: list[float] = []
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        site = _tiny_site(clients, out / "clients")
        opened = resident() / MB
        records = _run(partial(answer, site), out, clients, per_round, rounds, curve)
    return {
        "clients": clients,
        "per_round": per_round,
        "rounds": rounds,
        "mb_before": before,
        "mb_with_data_and_model": opened,
        "mb_after_round": curve,
        "mb_grown": curve[-1] - curve[0],
        "seconds_a_round": statistics.median(record["seconds"] for record in records[1:]),
    }


def _run(
    answers: Any, out: Path, clients: int, per_round: int, rounds: int, curve: list[float] | None = None
) -> list[dict[str, Any]]:
    """The real ServerApp over our grid and the real records of the ClientApp; the history."""

    class Watching(LogObserver):
        def round_finished(self, record: Any) -> None:
            if curve is not None:
                curve.append(resident() / MB)

    config: dict[str, Any] = {
        "out": str(out),
        "clients": clients,
        "clients-per-round": per_round,
        "rounds": rounds,
        "eval-every": rounds + 1,
    }
    grid = InProcessGrid(partial(handle, answers=answers), clients, config, Watching())
    run_server_app(app, grid, config)
    return read_history(out)


def _run_idle(out: Path, clients: int, rounds: int, processes: int) -> list[dict[str, Any]]:
    folder = out / "clients"
    with closing(Helpers([partial(_idle, folder)] * (processes - 1))) as helpers:

        def answers(questions: Sequence[Question]) -> Iterator[Answer]:
            if questions[0].kind != "train":
                return _idle(folder)(questions)
            pieces = range(0, len(questions), PIECE)
            return helpers.answer(_idle(folder), [[*questions[at : at + PIECE]] for at in pieces])

        return _run(answers, out, clients, clients, rounds)


def _carried(clients: int) -> float:
    """Seconds to carry opaque bytes to all clients and others back."""

    def echo(questions: Sequence[Question]) -> Iterator[Answer]:
        blob = bytes(OPAQUE)
        return (Answer(question.client, blob[:-1] + b"x") for question in questions)

    grid = InProcessGrid(partial(handle, answers=echo), clients)
    exchange = GridExchange(grid, {str(number): node for number, node in enumerate(grid.get_node_ids())}, {})
    requests = [Request(name, "train", bytes(OPAQUE)) for name in exchange.clients()]
    started = time.perf_counter()
    for _ in exchange.ask(requests, 3600.0):
        pass
    return time.perf_counter() - started


@cache
def _idle(folder: Path) -> _Idle:
    """One a process."""
    return _Idle(folder)


class _Idle:
    """Clients of MiniLM's adapter that answer with a change drawn once."""

    def __init__(self, folder: Path) -> None:
        shape = SHAPES["minilm"]
        base = build(shape, torch.device("meta"))
        spec = VBLoRASpec(rank=4, num_vectors=shape.num_vectors, vector_length=shape.vector_length)
        self._blueprint = Blueprint(spec, find_linears(base), find_head(base), describe_base(base), LABELS)
        self._memory = Memory(folder)
        self._held: dict[bytes, State] = {}
        self._change: Update | None = None

    def __call__(self, questions: Sequence[Question]) -> Iterator[Answer]:
        for question in questions:
            if question.kind == "train":
                yield Answer(
                    question.client, self._trained(question.client, question.blob), {"train-loss": 1.0}
                )
            elif question.kind == "evaluate":
                yield Answer(
                    question.client, metrics={"eval-examples": 1, "eval-loss-sum": 1.0, "eval-correct": 1}
                )
            else:
                yield Answer(question.client, text=self._told())

    def _trained(self, client: int, blob: bytes) -> bytes:
        """What `fl_client.serve` makes of a trained update."""
        digest = read_blob(blob)[0].digest
        if self._change is None or self._change.reference != digest:
            state = decode_state(blob, self._blueprint, self._held)
            self._held[digest] = state
            rng = np.random.default_rng(state.version)
            dense = {
                name: rng.normal(0, 1e-3, array.shape).astype(np.float32)
                for name, array in state.dense.items()
            }
            assert state.topk is not None
            moved = rng.random((len(state.topk.gaps), 1)) < 0.5
            gaps = np.where(moved, state.topk.gaps + np.float32(0.01), state.topk.gaps)
            topk = replace(state.topk, gaps=gaps)
            self._change = Update(state.version, state.digest, 16, dense, topk)
        state = self._held[digest]
        noise = np.random.default_rng((state.version, client))
        update, _ = round_update(self._change, state, WIRES["default"], {}, noise)
        blob = encode_update(update, self._blueprint, state)
        self._memory.keep_sent(client, blob)
        return blob

    def _told(self) -> str:
        return json.dumps(
            {
                "fingerprint": self._blueprint.fingerprint.hex(),
                "examples": 16,
                "versions": {},
                "blueprint": self._blueprint.to_json(),
                "metric": {"name": "accuracy", "higher_is_better": True},
                "prompts": 0,
            }
        )


def _tiny_site(clients: int, folder: Path) -> Site:
    """Two short texts for each client, and an encoder of two layers; what clients keep lies in `folder`."""
    shape = Shape(TINY, 2, 8, 64, 32, (1,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**TINY))
    settings = SiteSettings(
        device="cpu",
        data=DataSettings(clients=clients),
        adapter=AdapterSettings(num_vectors=shape.num_vectors, vector_length=shape.vector_length),
        local=LocalSettings(steps=1, batch_size=2),
        state=str(folder),
    )
    parts = tuple(np.arange(2 * clients).reshape(clients, 2))
    nothing = tuple(np.empty(0, np.int64) for _ in parts)
    train, test = make_examples(shape, 0, True, 2 * clients), make_examples(shape, 1, True, 20)
    texts = Texts(train, parts, test, nothing, LABELS, {})
    return assemble(settings, texts, Base(model, None, 0))
