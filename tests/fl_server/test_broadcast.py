"""Who gets which bytes."""

from __future__ import annotations

import numpy as np

from fl_server.broadcast import RECENT, Broadcast
from tests.fl_server.fakes import make_blueprint
from vblora.rounding import WIRES
from vblora.state import State
from vblora.wire import decode_state, initial


def moved(broadcast: Broadcast, seed: int, scale: float = 0.01) -> State:
    rng = np.random.default_rng(seed)
    state = broadcast.state
    dense = {name: a + rng.normal(0, scale, a.shape).astype(np.float32) for name, a in state.dense.items()}
    return State(state.version + 1, dense, state.topk)


def make(rounds: int, wire: str = "default") -> Broadcast:
    blueprint = make_blueprint()
    broadcast = Broadcast(blueprint, WIRES[wire], initial(blueprint))
    for number in range(rounds):
        broadcast.acknowledge(f"{number}")
        broadcast.advance(moved(broadcast, number))
    return broadcast


def test_what_is_sent_decodes_to_the_reference_whoever_gets_it():
    broadcast = make(5)
    held = {state.digest: state for state in broadcast.recent.values()}
    for client in ("0", "1", "4", "unknown"):
        state = decode_state(broadcast.blob(client), broadcast.blueprint, held)
        assert state.digest == broadcast.state.digest
    assert decode_state(broadcast.blob("unknown"), broadcast.blueprint).digest == broadcast.state.digest


def test_who_holds_the_same_gets_the_same_bytes_once():
    broadcast = make(4)
    broadcast.held |= {"a": 3, "b": 3}
    assert broadcast.blob("a") is broadcast.blob("b")


def test_old_versions_are_forgotten():
    broadcast = make(RECENT + 3)
    assert sorted(broadcast.recent) == list(range(4, RECENT + 4))
    assert min(broadcast.held.values()) == 4
    assert broadcast.blob("0") is broadcast.blob("unknown")


def test_a_client_that_lost_its_state_gets_it_from_version_0():
    broadcast = make(3)
    broadcast.forget("2")
    assert broadcast.blob("2") is broadcast.blob("unknown")


def test_lossless_states_keep_every_bit():
    broadcast = make(2, "lossless")
    exact = moved(broadcast, 9)
    broadcast.advance(exact)
    assert all(np.array_equal(broadcast.state.dense[name], exact.dense[name]) for name in exact.dense)
    assert broadcast.waiting == {}
