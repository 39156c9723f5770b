"""A client without a model, and an exchange without a network. NumPy only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fl_server.exchange import NEED_STATE, Kind, Reply, Request
from fl_server.rounds import run_rounds
from fl_server.settings import ServerSettings
from vblora.errors import UnknownStateError
from vblora.files import load_state
from vblora.spec import Blueprint, HeadTensor, Linear, VBLoRASpec
from vblora.state import State, TopK, Update
from vblora.wire import decode_state, decode_update, encode_update

SPEC = VBLoRASpec(rank=2, num_vectors=8, vector_length=4, topk=2, seed=5)


def make_blueprint(spec: VBLoRASpec = SPEC) -> Blueprint:
    head = (HeadTensor("head.weight", (3, 8)), HeadTensor("head.bias", (3,)))
    return Blueprint(spec, (Linear("a", 8, 8), Linear("b", 8, 12)), head, "fake", ("x", "y", "z"))


def make_update(state: State, rng: np.random.Generator, num_vectors: int, examples: int) -> Update:
    """A small random change of everything; half of the rows keep their selection."""
    dense = {
        name: (1e-2 * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in state.dense.items()
    }
    topk = None
    if state.topk is not None:
        rows, k = state.topk.positions.shape
        drawn = np.argsort(rng.random((rows, num_vectors)), axis=1)[:, :k].astype(np.int32)
        gaps = np.sort(rng.random((rows, k - 1)), axis=1).astype(np.float32)
        keep = rng.random((rows, 1)) < 0.5
        topk = TopK(np.where(keep, state.topk.positions, drawn), np.where(keep, state.topk.gaps, gaps))
    return Update(state.version, state.digest, examples, dense, topk)


DISK: dict[bytes, State] = {}  # states by content: what clients keep outlives a server


@dataclass
class FakeClient:
    """Answers every kind of request; training is a random step, seeded by its name and the round."""

    name: str
    blueprint: Blueprint = field(default_factory=make_blueprint)
    held: dict[bytes, State] = field(default_factory=lambda: DISK)

    def answer(self, request: Request) -> Reply:
        if request.kind == "hello":
            return Reply(self.name, text=json.dumps(self.hello()))
        if request.kind == "describe":
            return Reply(self.name, text=json.dumps(self.description()))
        try:
            state = decode_state(request.blob, self.blueprint, self.held)
        except UnknownStateError:
            return Reply(self.name, text=NEED_STATE)
        self.held[state.digest] = state
        if request.kind == "train":
            return self.train(state, request)
        examples = 7 + len(self.name)
        sums = {
            "examples": examples,
            "loss-sum": float(np.abs(state.dense["bank"]).sum()) + examples,
            "correct": int(state.digest[0]) % examples,
        }
        metrics: dict[str, float] = {}
        if "shards" in request.config:
            assert request.config["shard"] in range(int(request.config["shards"]))
            metrics |= {f"eval-{name}": value for name, value in sums.items()}
        if request.config.get("own"):
            some = min(1, int(self.name) % 5)
            own = {"examples": int(self.name) % 5, "loss-sum": float(some), "correct": some}
            metrics |= {f"own-{name}": value for name, value in own.items()}
        return Reply(self.name, metrics=metrics)

    def hello(self) -> dict[str, Any]:
        return {
            "fingerprint": self.blueprint.fingerprint.hex(),
            "examples": 100 + int(self.name),
            "versions": {"torch": "none"},
        }

    def description(self) -> dict[str, Any]:
        return {
            "blueprint": self.blueprint.to_json(),
            "metric": {"name": "accuracy", "higher_is_better": True},
            "prompts": 5,
            "data": {"name": "nothing"},
            "model": "fake",
        }

    def train(self, state: State, request: Request) -> Reply:
        rng = np.random.default_rng([int(self.name), int(request.config["round"])])
        update = make_update(state, rng, self.blueprint.spec.num_vectors, 10 + int(self.name))
        blob = encode_update(update, self.blueprint)
        return Reply(self.name, blob, {"train-loss": 1.0 / (1 + state.version) + rng.random()})


Tamper = Callable[[Request, Reply], Sequence[Reply]]


@dataclass
class FakeExchange:
    """Carries requests to fake clients. `tamper` may replace a reply by others; `order` shuffles them."""

    members: Sequence[FakeClient]
    tamper: Tamper = lambda request, reply: [reply]
    order: int = 0
    asked: list[tuple[Kind, str]] = field(default_factory=list)
    lasting: bool = False
    away: set[str] = field(default_factory=set)

    def present(self) -> list[str]:
        return [name for name in self.clients() if name not in self.away]

    def clients(self) -> list[str]:
        return [member.name for member in self.members]

    def ask(self, requests: Sequence[Request], timeout: float) -> Iterator[Reply]:
        members = {member.name: member for member in self.members}
        for at in np.random.default_rng(self.order).permutation(len(requests)):
            request = requests[at]
            self.asked.append((request.kind, request.client))
            yield from self.tamper(request, members[request.client].answer(request))


def make_exchange(clients: int = 5, **options: Any) -> FakeExchange:
    return FakeExchange([FakeClient(str(number)) for number in range(clients)], **options)


def make_settings(out: Path, **options: Any) -> ServerSettings:
    chosen = {"rounds": 4, "clients": 5, "clients_per_round": 3, "seed": 1, "eval_every": 2, **options}
    return ServerSettings(out=str(out), **chosen)


def read_history(out: Path) -> list[dict[str, Any]]:
    """The records without the one field that may differ between two runs of one seed."""
    lines = (out / "history.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def run(out: Path, exchange: FakeExchange | None = None, **options: Any) -> dict[str, Any]:
    return run_rounds(exchange or make_exchange(), make_settings(out, **options))


def content(out: Path) -> dict[str, Any]:
    """Everything that two equal runs share."""
    summary = json.loads((out / "summary.json").read_text())
    summary.pop("seconds")
    state, _ = load_state(out / "adapter" / "adapter.safetensors")
    return {"history": read_history(out), "summary": summary, "digest": state.digest.hex()}


class QuietClient(FakeClient):
    """Leaves alone what is frozen, or the head and the logits where they are its own."""

    def train(self, state: State, request: Request) -> Reply:
        reply = super().train(state, request)
        update = decode_update(reply.blob, self.blueprint, state)
        silent = str(request.config.get("frozen", "head,logits"))
        dense = {name: change * np.float32(name not in silent) for name, change in update.dense.items()}
        topk = state.topk if "logits" in silent else update.topk
        return replace(reply, blob=encode_update(replace(update, dense=dense, topk=topk), self.blueprint))


class LossClient(FakeClient):
    def description(self) -> dict[str, Any]:
        return {**super().description(), "metric": {"name": "loss", "higher_is_better": False}}
