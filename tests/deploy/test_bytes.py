"""What really passes between node and server, counted on its socket, TLS and polling included."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

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
from tests.deploy.witness import read_records
from vblora.rounding import WIRES, round_update
from vblora.state import TopK
from vblora.wire import decode_state, encode_state, encode_update, initial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(590)]

ROUNDS = 6  # of the two adapters
IDLE = 20.0  # seconds for which an idle node is watched
MESSAGES = 12_000  # bytes beside the blob that the messages of a round may cost up


class Drawn(Resident):
    """Pretends to be a model of some shape: its messages are real, its updates drawn from a recorded run."""

    def __init__(self, shape: str) -> None:
        super().__init__({"model": shape, "data": "none"}, Path("nowhere"))
        self.blueprint = shape_blueprint(shape)
        self.states = {state.digest: state for state in [initial(self.blueprint)]}
        self.sent: list[int] = []

    def answer(self, question: Question, run: Mapping[str, Scalar], on_step: OnStep | None = None) -> Answer:
        if question.kind == "hello":
            told = {"fingerprint": self.blueprint.fingerprint.hex(), "examples": 1, "versions": {}}
            return Answer(0, text=json.dumps(told))
        if question.kind == "describe":
            metric = {"name": "loss", "higher_is_better": False}
            told = {"blueprint": self.blueprint.to_json(), "metric": metric, "prompts": 0}
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


def test_a_client_and_round_beside_loras(folder: Path, minilm: Path):
    """Both adapters in one deployment, both in the default wire."""
    files = [write_texts(folder / f"{n}.csv", ["food", "space", "sport"], 60, n) for n in range(2)]
    with Federation(folder, minilm, files) as federation:
        federation.start_server()
        with Proxy(federation.port) as first, Proxy(federation.port) as second:
            for site, proxy in zip(federation.sites, (first, second), strict=True):
                federation.start_trainer(site)
                federation.register(site)
                federation.start_node(site, superlink=proxy.port)
            up: dict[str, float] = {}
            told: dict[str, float] = {}
            options = {"rounds": ROUNDS, "eval_every": ROUNDS, "local_steps": 3, "batch_size": 4}
            for adapter in ("vblora", "lora"):
                marks = watch(folder / adapter, first, second)
                before = first.down + second.down
                federation.run(folder / adapter, adapter=adapter, **options)
                (_, start_up, start_down), (_, end_up, end_down) = marks[1], marks[ROUNDS - 1]
                shares = 2 * (ROUNDS - 2)  # of rounds without the app, which comes first, and the last score
                up[adapter] = (end_up - start_up) / shares
                down = (end_down - start_down) / shares
                records = read_records(folder / adapter)[2:ROUNDS]
                told[adapter] = sum(record["bytes"]["up"] for record in records) / shares
                below = sum(record["bytes"]["down"] for record in records) / shares
                print(
                    f"{adapter}: a client and round {up[adapter]:,.0f} B up, {told[adapter]:,.0f} of them "
                    f"blob, and {down:,.0f} B down, {below:,.0f} of them blob; before it, with the app, "
                    f"{(marks[0][2] - before) / 2:,.0f} B down once a run"
                )
    assert up["vblora"] > told["vblora"] > 0
    # What Flower adds is the same for both, but for the polls of a longer round.
    assert up["lora"] - up["vblora"] == pytest.approx(told["lora"] - told["vblora"], rel=0.25)


@pytest.mark.parametrize("shape", ["RoBERTa-large q,v", "Llama-2-7B"])
def test_where_the_bytes_of_a_round_go(shape: str, folder: Path):
    """Up, beside the blob: polls of an idle node, and the headers of what messages are made of."""
    folder = folder / shape[:2]
    folder.mkdir()
    drawn = Drawn(shape)
    with Federation(folder, folder, [folder / "none"]) as federation:
        (site,) = federation.sites
        server = trainer._listen(site.socket, trainer._Service(drawn, shape, "none", threading.Event()))
        try:
            federation.start_server()
            with Proxy(federation.port) as proxy:
                federation.register(site)
                federation.start_node(site, superlink=proxy.port)
                joined = until_quiet(proxy)
                start = proxy.up
                time.sleep(IDLE)
                idle = (proxy.up - start) / IDLE
                before = proxy.up
                marks = watch(folder / "run", proxy)
                federation.run(folder / "run", rounds=6, eval_every=6)
                whole = proxy.up - before
        finally:
            server.stop(grace=None).wait()
    records = read_records(folder / "run")
    # Rounds 2 to 5: in 1 the app is fetched, after 6 the model is scored.
    spent = [up - earlier for (_, earlier, _), (_, up, _) in pairwise(marks[1:6])]
    took = [now - then for (then, *_), (now, *_) in pairwise(marks[1:6])]
    blobs = [record["bytes"]["up"] for record in records[2:6]]
    beside = [up - blob for up, blob in zip(spent, blobs, strict=True)]
    messages = median(beside) - idle * median(took)
    print(
        f"{shape}: joining {joined:,} B up; idle {idle:,.0f} B a second; rounds of {median(took):.1f} s: "
        f"{median(spent):,.0f} B up, {median(blobs):,.0f} of them blob, {idle * median(took):,.0f} polls, "
        f"{messages:,.0f} messages; app, hello, two evaluations and all: "
        f"{(whole - sum(r['bytes']['up'] for r in records)) / 6:,.0f} B beside the blob, a round"
    )
    assert len(spent) == 4
    assert messages <= MESSAGES, "with polls of ten seconds no more than 15 kB"


def until_quiet(proxy: Proxy) -> int:
    """Bytes up until a node has joined: from then on no more than polls pass."""
    last, seen = time.monotonic(), 0
    while not seen or time.monotonic() - last < 4:
        if proxy.up > seen + 2000:
            last, seen = time.monotonic(), proxy.up
        time.sleep(0.1)
    return seen


def watch(out: Path, *proxies: Proxy) -> list[tuple[float, int, int]]:
    """When each round of a run was over, and the bytes up and down so far; filled as the run goes on."""
    marks: list[tuple[float, int, int]] = []

    def look() -> None:
        while not (out / "summary.json").exists():
            path = out / "history.jsonl"
            count = path.read_bytes().count(b"\n") if path.exists() else 0
            now = time.monotonic(), sum(one.up for one in proxies), sum(one.down for one in proxies)
            marks.extend([now] * (count - len(marks)))
            time.sleep(0.05)

    threading.Thread(target=look, daemon=True).start()
    return marks


def test_a_7b_shape_over_a_thin_line(folder: Path):
    folder = folder / "thin"
    folder.mkdir()
    large = Drawn("Llama-2-7B")
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
    records = read_records(folder / "run")
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
