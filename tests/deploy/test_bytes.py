"""What really passes between node and server, counted on its socket, TLS and polling included."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fl_client import trainer
from fl_client.questions import Answer, Question, Scalar
from fl_client.resident import Resident
from fl_client.site import OnStep
from simulations.bench.wire import shape_blueprint
from simulations.replay import replayed_update
from tests.deploy.conftest import write_texts
from tests.deploy.federation import Federation
from tests.deploy.proxy import Proxy
from vblora.rounding import WIRES, round_update
from vblora.state import TopK
from vblora.wire import decode_state, encode_state, encode_update, initial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(590)]

ROUNDS = 3


def test_bytes_of_a_client_and_round_beside_loras(folder: Path, minilm: Path):
    files = [write_texts(folder / f"{n}.csv", ["food", "space", "sport"], 60, n) for n in range(2)]
    with Federation(folder, minilm, files) as federation:
        federation.start_server()
        with Proxy(federation.port) as first, Proxy(federation.port) as second:
            for site, proxy in zip(federation.sites, (first, second), strict=True):
                federation.start_trainer(site)
                federation.register(site)
                federation.start_node(site, superlink=proxy.port)
            up: dict[str, float] = {}
            told: dict[str, int] = {}
            for adapter in ("vblora", "lora"):  # Flower sends the app to each node with the first
                out = folder / adapter
                before = first.up + second.up, first.down + second.down
                options = {"rounds": ROUNDS, "eval_every": ROUNDS, "local_steps": 3, "batch_size": 4}
                summary = federation.run(out, adapter=adapter, **options)
                up[adapter] = (first.up + second.up - before[0]) / 2 / ROUNDS
                down = (first.down + second.down - before[1]) / 2 / ROUNDS
                told[adapter] = summary["bytes"]["up_per_client_round"]
                print(
                    f"{adapter}: a client and round {up[adapter]:,.0f} B up and {down:,.0f} B down on the "
                    f"socket, {told[adapter]:,} B up in blobs"
                )
    assert up["lora"] > told["lora"]
    assert up["vblora"] > told["vblora"]
    assert up["vblora"] < up["lora"] / 5


class Large(Resident):
    """Pretends to be a 7B model: its messages are real ones, its updates are drawn from a recorded run."""

    def __init__(self) -> None:
        super().__init__({"model": "7B", "data": "none"}, Path("nowhere"))
        self.blueprint = shape_blueprint("Llama-2-7B")
        self.states = {state.digest: state for state in [initial(self.blueprint)]}
        self.sent: list[int] = []

    def answer(self, question: Question, run: Mapping[str, Scalar], on_step: OnStep | None = None) -> Answer:
        if question.kind == "hello":
            told = {"fingerprint": self.blueprint.fingerprint.hex(), "examples": 1, "versions": {}}
            return Answer(0, text=json.dumps(told))
        if question.kind == "describe":
            metric = {"name": "loss", "higher_is_better": False}
            told = {"blueprint": self.blueprint.to_json(), "metric": metric}
            return Answer(0, text=json.dumps(told))
        if question.kind == "evaluate":
            return Answer(0, metrics={"eval-examples": 1, "eval-loss-sum": 1.0, "eval-correct": 0})
        state = decode_state(question.blob, self.blueprint, self.states)
        self.states[state.digest] = state
        reference, update = replayed_update(self.blueprint, "first")
        topk = update.topk
        if reference.digest != state.digest:  # later rounds: a tenth of the rows choose as the update does
            assert topk is not None
            assert state.topk is not None
            chosen = np.random.default_rng(state.version).random((len(topk.positions), 1)) < 0.1
            topk = TopK(
                np.where(chosen, topk.positions, state.topk.positions),
                np.where(chosen, topk.gaps, state.topk.gaps),
            )
        update = replace(update, version=state.version, reference=state.digest, topk=topk)
        rounded, _ = round_update(update, state, WIRES["default"], {}, np.random.default_rng(state.version))
        blob = encode_update(rounded, self.blueprint, state)
        self.sent.append(len(blob))
        return Answer(0, blob, {"train-loss": 1.0, "steps": 1})


def test_a_7b_shape_over_a_thin_line(folder: Path):
    folder = folder / "thin"
    folder.mkdir()
    large = Large()
    bits, delay = 1e6, 0.1  # 1 Mbit/s each way, 200 ms there and back
    with Federation(folder, folder, [folder / "none"]) as federation:
        (site,) = federation.sites
        server = trainer._listen(site.socket, trainer._Service(large, "7B", "none", threading.Event()))
        try:
            federation.start_server()
            with Proxy(federation.port, bits, delay) as proxy:
                federation.register(site)
                federation.start_node(site, superlink=proxy.port)
                started = time.monotonic()
                federation.run(folder / "run", rounds=2, eval_every=2, timeout_seconds=500.0)
                print(f"run of 2 rounds {time.monotonic() - started:.1f} s, app and polling included")
        finally:
            server.stop(grace=None).wait()
    records = [json.loads(line) for line in (folder / "run" / "history.jsonl").read_text().splitlines()]
    lora = shape_blueprint("Llama-2-7B", lora=True)
    start = initial(lora)
    heavy = 4 * lora.stored_parameters
    print(f"update of round 1: {large.sent[0]:,} B, of round 2: {large.sent[1]:,} B")
    print(
        f"state of round 1: {records[1]['bytes']['down']:,} B, of round 2: {records[2]['bytes']['down']:,} B"
    )
    print(f"rounds: {[round(record['seconds'], 1) for record in records]} s")
    print(f"LoRA r64 in float32: {heavy:,} B, {heavy * 8 / bits:,.0f} s up at the full rate of the line")
    assert len(encode_state(start, lora, start)) < heavy
    for record in records[1:]:
        assert record["replies"] == 1
        carried = 8 * (record["bytes"]["up"] + record["bytes"]["down"]) / bits
        assert record["seconds"] < heavy * 8 / bits / 20
        assert record["seconds"] > carried
