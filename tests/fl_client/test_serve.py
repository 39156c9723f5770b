"""What a process of clients answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fl_client import serve
from fl_client.memory import Memory
from fl_client.questions import of_lone_site
from fl_client.serve import NEED_STATE, Answer, Question, answer
from fl_client.site import Site
from fl_client.tasks import SUMS
from tests.fl_client.sites import make_site
from vblora.errors import WireError
from vblora.rounding import WIRES, round_state
from vblora.spec import Blueprint
from vblora.state import State, check_update, initial_state
from vblora.wire import decode_state, decode_update, encode_state


@pytest.fixture(scope="module")
def site() -> Site:
    return make_site(6)


@pytest.fixture(scope="module")
def state(site: Site) -> State:
    return initial_state(site.blueprint)


def train(site: Site, state: State, clients: range, number: int = 1) -> list[Question]:
    blob = encode_state(state, site.blueprint)
    return [Question(client, "train", blob, {"round": number, "lr-scale": 1.0}) for client in clients]


def by_client(answers: list[Answer]) -> Mapping[int, Answer]:
    found = {item.client: item for item in answers}
    assert len(found) == len(answers), "one answer each"
    return found


# --- Training ------------------------------------------------------------------------


def test_every_client_that_is_asked_sends_an_update(site: Site, state: State):
    found = by_client(list(answer(site, train(site, state, range(6)))))
    assert sorted(found) == list(range(6))
    for client, item in found.items():
        update = decode_update(item.blob, site.blueprint, state)
        check_update(update, site.blueprint, state)
        assert update.examples == item.metrics["examples"] == 4 * min(3, client + 1)
        assert item.metrics["steps"] == 4
        assert 0 < item.metrics["train-loss"] < 5
        assert (item.text, item.error) == ("", "")


def test_an_update_does_not_depend_on_the_other_clients(site: Site, state: State):
    one = by_client(list(answer(site, train(site, state, range(2, 3)))))
    among = by_client(list(answer(site, train(site, state, range(6)))))
    assert one[2].metrics == pytest.approx(among[2].metrics)


def test_rates_are_scaled_by_the_server(site: Site, state: State):
    still = [Question(0, "train", encode_state(state, site.blueprint), {"round": 1, "lr-scale": 0.0})]
    (found,) = answer(site, still)
    assert not any(array.any() for array in decode_update(found.blob, site.blueprint, state).dense.values())


def test_who_drops_out_says_so_and_the_others_train(state: State):
    site = make_site(6, dropout=0.5)
    found = by_client(list(answer(site, train(site, state, range(6)))))
    dropped = {client for client in range(6) if site.fate(1, client).dropped}
    assert 0 < len(dropped) < 6
    assert {client for client, item in found.items() if "dropped" in item.metrics} == dropped
    for client in dropped:
        assert found[client] == Answer(client, metrics={"dropped": 1}, text="dropped out (simulated)")


def test_the_steps_of_a_cohort_are_told(site: Site, state: State):
    told: list[tuple[int, int]] = []
    list(answer(site, train(site, state, range(1)), lambda done, steps: told.append((done, steps))))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_answers_come_as_they_are_ready(site: Site, state: State):
    told: list[int] = []
    answers = iter(answer(site, train(site, state, range(6)), lambda done, steps: told.append(done)))
    next(answers)
    assert len(told) == 4, "one cohort of one client: their texts differ in length"


# --- The other questions -------------------------------------------------------------


def test_shards_of_the_held_out_texts_add_up(site: Site, state: State):
    blob = encode_state(state, site.blueprint)

    def sums(shards: int) -> dict[str, float]:
        questions = [
            Question(at, "evaluate", blob, {"round": 0, "shard": at, "shards": shards})
            for at in range(shards)
        ]
        found = list(answer(site, questions))
        return {name: sum(item.metrics[name] for item in found) for name in SUMS}

    assert sums(1)["eval-examples"] == 20
    assert sums(3) == pytest.approx(sums(1))


def test_a_site_alone_takes_questions_as_its_own():
    asked = Question(7, "evaluate", b"", {"round": 3, "shard": 2, "shards": 9, "own": True})
    assert of_lone_site(asked) == Question(
        0, "evaluate", b"", {"round": 3, "shard": 0, "shards": 1, "own": True}
    )
    own = Question(7, "evaluate", b"", {"round": 3, "own": True})
    assert of_lone_site(own) == replace(own, client=0)


def test_hello_and_description(site: Site):
    hellos = list(answer(site, [Question(client, "hello") for client in (0, 5)]))
    assert [json.loads(item.text)["examples"] for item in hellos] == [1, 6]
    (described,) = answer(site, [Question(0, "describe")])
    told = json.loads(described.text)
    blueprint = Blueprint.from_json(told["blueprint"])
    assert blueprint.fingerprint == site.blueprint.fingerprint
    assert {json.loads(item.text)["fingerprint"] for item in hellos} == {blueprint.fingerprint.hex()}
    assert told["metric"] == {"name": "accuracy", "higher_is_better": True}
    (language,) = answer(make_site(2, family="llama"), [Question(0, "describe")])
    assert json.loads(language.text)["metric"] == {"name": "loss", "higher_is_better": False}


def test_nothing_is_asked(site: Site):
    assert list(answer(site, [])) == []


# --- The blob ------------------------------------------------------------------------


def next_state(state: State) -> State:
    """The state after a round in which the bank moved, on the grid."""
    rng = np.random.default_rng(5)
    moved = {name: a + rng.normal(0, 0.01, a.shape).astype(np.float32) for name, a in state.dense.items()}
    return round_state(State(state.version + 1, moved, state.topk), state, state, WIRES["default"], {})[0]


def test_the_state_of_a_round_is_read_once(site: Site, state: State, monkeypatch: pytest.MonkeyPatch):
    site.memory.open("once")
    reads: list[int] = []

    def counted(blob: bytes, *others: Any) -> State:
        reads.append(len(blob))
        return decode_state(blob, *others)

    monkeypatch.setattr(serve, "decode_state", counted)
    blob = encode_state(next_state(state), site.blueprint, state)
    config = {"round": 2, "lr-scale": 1.0, "run": "once"}
    for client in range(3):
        list(answer(site, [Question(client, "train", blob, config)]))
    assert len(reads) == 1


def test_a_client_that_lacks_the_base_asks_for_the_state(site: Site, state: State):
    """It trains on nothing wrong, and goes on once it gets the state from version 0."""
    first = next_state(state)
    second = replace(next_state(first), version=2)
    config = {"round": 3, "lr-scale": 1.0, "run": "lost"}
    (found,) = answer(site, [Question(0, "train", encode_state(second, site.blueprint, first), config)])
    assert (found.text, found.blob, found.error) == (NEED_STATE, b"", "")
    (found,) = answer(site, [Question(0, "train", encode_state(second, site.blueprint, state), config)])
    assert decode_update(found.blob, site.blueprint, second).reference == second.digest


def test_what_rounding_drops_goes_into_the_next_update(site: Site, state: State):
    """With no learning at all, the second update is what was left over from the first."""
    wire = replace(WIRES["default"], feedback=True)
    site = replace(site, settings=replace(site.settings, wire=wire), memory=Memory(None))
    config = {"round": 1, "lr-scale": 1.0, "run": "feedback"}
    blob = encode_state(state, site.blueprint)
    (found,) = answer(site, [Question(1, "train", blob, config)])
    sent = decode_update(found.blob, site.blueprint, state)
    waiting = site.memory.waiting(1, 1)
    assert set(waiting) == set(sent.dense)
    still = {"round": 2, "lr-scale": 0.0, "run": "feedback"}
    after = next_state(state)
    (found,) = answer(site, [Question(1, "train", encode_state(after, site.blueprint, state), still)])
    later = decode_update(found.blob, site.blueprint, after)
    left = site.memory.waiting(1, 2)
    for name, dropped in waiting.items():
        np.testing.assert_allclose(later.dense[name] + left[name], dropped, atol=1e-7)
        assert np.abs(dropped).max() <= 2 * sent.steps[name], "a state of the trellis has every second step"


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_damaged_blob_is_an_error_of_ours(site: Site, state: State, kind: str):
    blob = encode_state(state, site.blueprint)[:-1] + b"?"
    config = {"round": 1, "lr-scale": 1.0, "shard": 0, "shards": 1}
    with pytest.raises(WireError):
        list(answer(site, [Question(0, kind, blob, config)]))


@pytest.mark.parametrize("kind", ["", "describe ", "save", "x" * 99])
def test_a_question_of_no_known_kind_is_refused(site: Site, kind: str):
    with pytest.raises(
        WireError, match=r"question: its kind is '.{0,40}, expected hello, describe, train or"
    ):
        list(answer(site, [Question(0, kind)]))
