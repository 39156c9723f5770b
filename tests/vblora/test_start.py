"""Orders of a row's logits: seeded, with the chosen first, or sorted from dense logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vblora import seeded
from vblora.candidates import anchored
from vblora.errors import ModelError
from vblora.spec import Blueprint, Linear, LoRASpec, VBLoRASpec
from vblora.start import ChosenFirst, Content, SeededOrder, SortedOrder, Start, chosen_vectors, order_of
from vblora.state import TopK, initial_state

LINEARS = (Linear("a", 8, 12), Linear("b", 20, 8))
SPEC = VBLoRASpec(rank=2, num_vectors=30, vector_length=4, topk=3, seed=5)
BLUEPRINT = Blueprint(SPEC, LINEARS)
SEEDS = SeededOrder(5, 30, 0.1)
ROWS = np.arange(BLUEPRINT.rows)


def chosen_first(seed: int = 0) -> ChosenFirst:
    drawn = np.random.default_rng(seed).random((len(ROWS), 30)).argsort(axis=1)
    return ChosenFirst(SEEDS, drawn[:, :3].astype(np.int32))


def dense(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((len(ROWS), 30)).astype(np.float32)


ORDERS = {"seeded": SEEDS, "chosen first": chosen_first(), "sorted": SortedOrder(dense())}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_an_order_names_every_vector_once_and_falls(order):
    vectors, logits = order.vectors(ROWS, 30), order.logits(ROWS, 30)
    assert vectors.dtype == np.int32
    assert logits.dtype == np.float32
    assert (np.sort(vectors, axis=1) == np.arange(30)).all()
    assert (np.diff(logits, axis=1) < 0).all()


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_part_of_an_order_is_the_same_part_of_the_whole(order):
    some = np.array([3, 0, 7])
    for width in (1, 2, 3, 4, 17, 30):
        assert (order.vectors(some, width) == order.vectors(ROWS, 30)[some, :width]).all()
        assert (order.logits(some, width) == order.logits(ROWS, 30)[some, :width]).all()


def test_the_seeded_order_is_what_the_seed_draws():
    assert (SEEDS.vectors(ROWS, 9) == seeded.order(5, ROWS, 30, 9)).all()
    assert (SEEDS.logits(ROWS, 9) == seeded.values(5, ROWS, 30, 9, 0.1)).all()
    assert order_of(BLUEPRINT) == SEEDS


def test_the_chosen_come_first_and_the_others_keep_their_order():
    order = chosen_first()
    vectors = order.vectors(ROWS, 30)
    assert (vectors[:, :3] == order.chosen).all()
    for row, chosen, found in zip(SEEDS.vectors(ROWS, 30), order.chosen, vectors, strict=True):
        assert found[3:].tolist() == [vector for vector in row if vector not in chosen]


def test_sorted_logits_come_back_and_of_equals_the_lower_vector_is_first():
    logits = np.round(dense() * 4) / 4
    order = SortedOrder(logits)
    vectors, values = order.vectors(ROWS, 30), order.logits(ROWS, 30)
    assert (np.take_along_axis(logits, vectors.astype(np.int64), axis=1) == values).all()
    tied = values[:, 1:] == values[:, :-1]
    assert tied.any()
    assert (np.diff(vectors, axis=1)[tied] > 0).all()


def test_places_become_vectors():
    positions = np.tile(np.array([4, 0, 29], np.int32), (len(ROWS), 1))
    assert (chosen_vectors(SEEDS, positions) == SEEDS.vectors(ROWS, 30)[:, [4, 0, 29]]).all()


def test_rows_of_a_sorted_order_start_at_their_own_logits_until_they_move():
    """Whatever the margin; a row that has moved is lifted like any other."""
    order, spec = SortedOrder(dense()), replace(SPEC, margin=5.0)
    seeds = order.logits(ROWS, 30)
    topk = TopK(np.tile(np.arange(3, dtype=np.int32), (len(ROWS), 1)), seeds[:, :1] - seeds[:, 1:3])
    assert (anchored(spec, seeds, topk, keep=True) == seeds[:, :3]).all()
    moved = TopK(topk.positions, topk.gaps + np.float32(0.5) * (ROWS[:, None] == 2))
    found = anchored(spec, seeds, moved, keep=True)
    assert (found[ROWS != 2] == seeds[ROWS != 2, :3]).all()
    assert (found[2] > seeds[2, 3] + 4.9).all()


def test_version_0_is_the_content():
    order, bank = SortedOrder(dense()), np.ones((30, 4), np.float32)
    first = order.logits(ROWS, 3)
    content = Content({"bank": bank}, order, first[:, :1] - first[:, 1:])
    blueprint = replace(BLUEPRINT, start=Start(content.digest(), content))
    state = initial_state(blueprint)
    assert state.version == 0
    assert state.dense["bank"] is bank
    assert (state.topk.positions == [0, 1, 2]).all()
    assert (state.topk.gaps == content.gaps).all()
    assert order_of(blueprint) is order


def test_a_start_is_part_of_the_name_and_no_start_leaves_names_as_they_were():
    one, other = (
        Content(
            {"bank": np.full((30, 4), value, np.float32)}, chosen_first(), np.ones((len(ROWS), 2), np.float32)
        )
        for value in (1, 2)
    )
    prints = {
        replace(BLUEPRINT, start=Start(content.digest(), content)).fingerprint for content in (one, other)
    }
    assert len(prints | {BLUEPRINT.fingerprint}) == 3
    assert "start" not in BLUEPRINT.to_json()


def test_every_part_of_the_content_has_a_say_in_its_digest():
    bank, gaps = np.ones((30, 4), np.float32), np.ones((len(ROWS), 2), np.float32)
    contents = [
        Content({"bank": bank}, chosen_first(), gaps),
        Content({"bank": bank + 1}, chosen_first(), gaps),
        Content({"bank": bank}, chosen_first(1), gaps),
        Content({"bank": bank}, chosen_first(), gaps + 1),
        Content({"bank": bank}, SortedOrder(dense()), gaps),
        Content({"bank": bank}, SortedOrder(dense(1)), gaps),
        Content({"bank": bank, "head": bank[0]}, chosen_first(), gaps),
        Content({"rows": bank}),
    ]
    digests = {content.digest() for content in contents}
    assert len(digests) == len(contents)
    assert all(len(bytes.fromhex(digest)) == 16 for digest in digests)
    assert contents[0].digest() == Content({"bank": bank.copy()}, chosen_first(), gaps.copy()).digest()


def test_from_text_only_the_name_is_known_and_version_0_cannot_be_had():
    content = Content(
        {"bank": np.ones((30, 4), np.float32)}, chosen_first(), np.ones((len(ROWS), 2), np.float32)
    )
    blueprint = replace(BLUEPRINT, start=Start(content.digest(), content))
    back = Blueprint.from_json(blueprint.to_json())
    assert back == blueprint
    assert hash(back) == hash(blueprint)
    assert back.fingerprint == blueprint.fingerprint
    for ask in (initial_state, order_of):
        with pytest.raises(
            ModelError, match=f"goes on from another, {content.digest()[:12]}, which is not held"
        ):
            ask(back)
    with pytest.raises(ModelError, match="not readable"):
        Blueprint.from_json(blueprint.to_json().replace(content.digest(), "xyz"))


def test_an_adapter_without_a_bank_has_no_order():
    with pytest.raises(ModelError, match="lora has no bank"):
        order_of(Blueprint(LoRASpec(), LINEARS))
