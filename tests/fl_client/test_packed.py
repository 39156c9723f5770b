"""Packed rows hold every token, one client's alone, and teach what the texts teach one by one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fl_client.assembly import load_texts, save_texts
from fl_client.base import Base
from fl_client.batches import Examples, collate
from fl_client.opening import open_site, prepare_texts
from fl_client.packed import pack, require_packable
from fl_client.scoring import evaluate
from fl_client.settings import DataSettings, SiteSettings
from fl_client.tasks import CausalLM
from tests.vblora.tiny import VOCABULARY, adapt, make_base, make_state
from vblora.errors import ConfigError
from vblora.state import initial_state

CPU = torch.device("cpu")


def make_texts(lengths: list[int], seed: int = 0) -> Examples:
    """Plain texts that begin with a token that nothing else is."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(3, VOCABULARY, starts[-1]).astype(np.int32)
    tokens[starts[:-1]] = 1
    return Examples(tokens, starts, np.ones(len(lengths), np.int64))


def texts_of(rows: Examples, part: np.ndarray) -> list[tuple[int, ...]]:
    """The texts in some packed rows."""
    taken = rows.take(part)
    assert taken.begins is not None
    assert taken.begins[taken.starts[:-1]].all(), "every row begins with a text"
    edges = [*np.flatnonzero(taken.begins).tolist(), len(taken.tokens)]
    return [tuple(taken.tokens[low:high].tolist()) for low, high in itertools.pairwise(edges)]


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.lists(st.integers(1, 20), max_size=12), min_size=1, max_size=4),
    st.integers(2, 16),
    st.integers(0, 9),
)
def test_every_text_is_in_one_row_of_its_client(lengths: list[list[int]], most: int, seed: int):
    texts = make_texts([length for own in lengths for length in own] or [1], seed)
    ends = np.cumsum([0, *map(len, lengths)])
    parts = [np.arange(low, high) for low, high in itertools.pairwise(ends)]
    rows, owned = pack(texts, parts, most)
    assert rows.lengths.max(initial=0) <= most
    assert np.concatenate(owned).tolist() == list(range(len(rows)))
    for part, own in zip(parts, owned, strict=True):
        whole = [tuple(texts.text(index).tolist()) for index in part]
        pieces = [text[at : at + most] for text in whole for at in range(0, max(1, len(text) - 1), most - 1)]
        assert sorted(texts_of(rows, own)) == sorted(pieces)
        fullest = sorted(rows.lengths[own])
        assert all(one + other > most for one, other in itertools.pairwise(fullest)), "best fit"


@pytest.mark.parametrize("length", range(26))
@pytest.mark.parametrize("start", [0, 1])
def test_every_token_but_a_texts_first_is_learned_once(length: int, start: int):
    text = Examples(np.arange(1, length + 1, dtype=np.int32), np.array([0, length]), np.array([start]))
    rows, _ = pack(text, [np.arange(1)], 8)
    batch = collate([(rows, np.arange(len(rows)))], 0, CPU)
    learned = batch.tokens[:, 1:][CausalLM()._real(batch)]
    assert sorted(learned.tolist()) == list(range(2, length + 1))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packing_changes_no_score(family: str):
    model = adapt(make_base(family).double())
    state = make_state(model.blueprint, scale=0.05)
    texts = make_texts([5, 9, 2, 7, 1, 3, 8, 4, 6])
    rows, _ = pack(texts, [np.arange(4), np.arange(4, 9)], 11)
    assert len(rows) < len(texts)
    alone = evaluate(model, CausalLM(), state, texts, batch_tokens=30)
    packed = evaluate(model, CausalLM(), state, rows, batch_tokens=30)
    assert packed == pytest.approx(alone, rel=1e-9)
    assert packed["eval-examples"] == texts.lengths.sum() - len(texts)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packing_changes_no_gradient(family: str):
    """Over all tokens of a batch; the mean of one client's rows weighs tokens alike, packed or not."""
    model = adapt(make_base(family).double())
    texts = make_texts([5, 9, 2, 7])
    rows, _ = pack(texts, [np.arange(4)], 14)
    found = []
    for examples in (texts, rows):
        tensors = model.load(make_state(model.blueprint, scale=0.05))
        batch = collate([(examples, np.arange(len(examples)))], 0, CPU)
        model.bind(tensors)
        loss = CausalLM().losses(model(**batch.inputs).logits, batch, 1).sum()
        found.append([loss, *torch.autograd.grad(loss, list(tensors.values()))])
        model.unbind()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_positions_begin_anew_with_each_text_and_with_the_padding():
    rows, _ = pack(make_texts([3, 2, 4]), [np.arange(3)], 6)
    batch = collate([(rows, np.arange(2)), (rows, np.arange(1))], 0, CPU)
    assert batch.positions is not None
    assert batch.positions.tolist() == [
        [0, 1, 2, 3, 0, 1],
        [0, 1, 2, 0, 1, 2],
        [0, 1, 2, 3, 0, 1],
        [0, 0, 1, 2, 3, 4],
    ]
    first, second = batch.chunk(2)
    assert second.positions is not None
    assert (first.tokens[0] == second.tokens[0]).all()
    assert set(first.inputs) == {"input_ids", "position_ids"}


# --- Models --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_that_keep_texts_apart(family: str):
    base = make_base(family)
    base.config.use_cache = True
    require_packable(Base(base, None, 0))
    assert base.config.use_cache


def test_a_model_that_mixes_texts_is_refused():
    base = make_base("llama")
    forward = base.forward
    base.forward = lambda position_ids=None, **inputs: forward(**inputs)
    with pytest.raises(ConfigError, match="mixes the texts of a packed row; use --no-pack"):
        require_packable(Base(base, None, 0))


def test_a_model_without_positions_is_refused():
    base: nn.Module = make_base("llama")
    forward = base.forward
    base.forward = lambda input_ids, attention_mask=None: forward(input_ids, attention_mask)
    with pytest.raises(ConfigError, match=r"takes no position_ids .*; use --no-pack"):
        require_packable(Base(base, None, 0))


# --- A site --------------------------------------------------------------------------


@pytest.fixture
def plain(assets: Path, tmp_path: Path) -> SiteSettings:
    """Short texts of three writers, and one that is longer than a row."""
    lines = [
        f'{{"text": "Once upon a time {"very " * (n % 5)}long ago.", "who": "{"abc"[n % 3]}"}}'
        for n in range(60)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, lines[0].replace("long", "long " * 80)]))
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:30]))
    data = DataSettings(str(tmp_path), "causal-lm", max_length=64, partition="by:who", clients=3)
    return SiteSettings(model=str(assets / "models" / "stories260K-hf"), device="cpu", data=data)


def test_plain_text_is_packed_unless_told(plain: SiteSettings, tmp_path: Path):
    packed = prepare_texts(plain)
    loose = prepare_texts(replace(plain, data=replace(plain.data, pack=False)))
    assert packed.train.begins is not None
    assert loose.train.begins is None
    assert len(packed.train) < len(loose.train) / 2
    assert packed.train.lengths.max() <= 64
    assert len(packed.train.tokens) > len(loose.train.tokens), "what was cut is there"
    assert [sum(packed.test.lengths[own]) for own in packed.own] == [
        sum(loose.test.lengths[own]) for own in loose.own
    ]
    save_texts(tmp_path / "texts.npz", packed)
    again = load_texts(tmp_path / "texts.npz")
    assert again.train.begins is not None
    assert (again.train.begins == packed.train.begins).all()


def test_packed_rows_train(plain: SiteSettings):
    site = open_site(plain)
    state = initial_state(site.blueprint)
    trained = dict(site.train_clients(state, {0: 4, 1: 4, 2: 4}, round_number=1, scale=1.0))
    assert all(0 < result.loss < 10 for result in trained.values())
