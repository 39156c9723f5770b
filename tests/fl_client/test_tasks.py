"""Texts to examples, losses of each client, and the sums that a score is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

from fl_client.batches import Batch, Examples, collate
from fl_client.tables import Table
from fl_client.tasks import SUMS, CausalLM, Classification
from vblora.errors import DataError

CPU = torch.device("cpu")
BOS, EOS = 1, 2
VOCABULARY = 40


@dataclass
class Letters:
    """A tokenizer of one token a letter: a is 10, b is 11, ..."""

    bos_token_id: int | None = BOS
    eos_token_id: int | None = EOS
    eos_token: str | None = ">"

    def __call__(self, texts: list[str], add_special_tokens: bool = True, **cut: Any) -> dict[str, Any]:
        ids = [[ord(letter) - 87 for letter in text] for text in texts]
        if add_special_tokens:
            ids = [[BOS, *row, EOS] for row in ids]
        if cut.get("truncation"):
            ids = [[*row[:-1][: cut["max_length"] - 1], row[-1]] for row in ids]
        return {"input_ids": ids}


def texts_of(examples: Examples) -> list[str]:
    """As letters again; < and > stand for the special tokens, | for the end of what the loss leaves out."""
    found = []
    for index, leading in enumerate(examples.targets):
        letters = [
            {BOS: "<", EOS: ">"}.get(int(token), chr(int(token) + 87)) for token in examples.text(index)
        ]
        found.append("".join(letters[:leading]) + "|" + "".join(letters[leading:]))
    return found


# --- Encoding ------------------------------------------------------------------------


def test_plain_text_is_learned_whole():
    examples = CausalLM().encode(Letters(), Table(["abc", "", "abcdefgh"]), 6)
    assert texts_of(examples) == ["<|abc>", "<|>", "<|abcde"]
    without = CausalLM().encode(Letters(None, None), Table(["abc"]), 6)
    assert texts_of(without) == ["|abc"]


def test_only_the_completion_is_learned():
    table = Table(["abc", "", "x"], completion=["de", "f", ""])
    assert texts_of(CausalLM().encode(Letters(), table, 20)) == ["<abc|de>", "<|f>", "<x|>"]


def test_an_end_that_is_spelt_out_is_not_learned_twice():
    table = Table(["a"] * 3, completion=["bc>", "bc<|endoftext|>", "bc"])
    assert texts_of(CausalLM().encode(Letters(), table, 20)) == ["<a|bc>"] * 3


def test_a_long_prompt_loses_its_beginning():
    table = Table(["abcdefgh"], completion=["xy"])
    assert texts_of(CausalLM().encode(Letters(), table, 8)) == ["<efgh|xy>"]


def test_a_long_completion_fills_what_the_prompt_leaves_free():
    table = Table(["ab", "abcdefgh"], completion=["pqrstuvwxyz"] * 2)
    assert texts_of(CausalLM().encode(Letters(), table, 8)) == ["<ab|pqrst", "<fgh|pqrs"]


@settings(deadline=None, max_examples=200)
@given(
    st.text("abcdefgh", max_size=12),
    st.text("pqrstuvw", max_size=12),
    st.integers(2, 16),
    st.sampled_from([Letters(), Letters(None, EOS), Letters(BOS, None), Letters(None, None)]),
)
def test_rows_keep_the_end_of_the_prompt_and_the_start_of_the_completion(prompt, completion, most, tokenizer):
    table = Table([prompt], completion=[completion])
    (row,) = texts_of(CausalLM().encode(tokenizer, table, most))
    start, end = "<" if tokenizer.bos_token_id else "", ">" if tokenizer.eos_token_id else ""
    whole = start + prompt + completion + end
    left, right = row.split("|")
    assert len(left + right) == min(most, len(whole)), "no room is wasted"
    assert left.startswith(start)
    assert (prompt if left == start else left[len(start) :]).startswith(prompt[-len(left[len(start) :]) :])
    assert prompt.endswith(left[len(start) :])
    assert (completion + end).startswith(right)
    assert len(right) >= min(len(completion + end), most // 2)


def test_a_label_becomes_its_index():
    task = Classification(("no", "yes"))
    examples = task.encode(Letters(), Table(["ab", "c", "abcdefgh"], label=["yes", "no", "yes"]), 5)
    assert examples.targets.tolist() == [1, 0, 1]
    assert [examples.text(index).tolist() for index in range(3)] == [
        [BOS, 10, 11, EOS],
        [BOS, 12, EOS],
        [BOS, 10, 11, 12, EOS],
    ]
    with pytest.raises(DataError, match="no label column; name it with --label-column"):
        task.encode(Letters(), Table(["ab"]), 5)


def test_a_real_tokenizer_cuts_a_text_and_keeps_its_frame(minilm: Path):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    table = Table(["good " * 50, "bad"], label=["a", "b"])
    examples = Classification(("a", "b")).encode(tokenizer, table, 8)
    assert examples.lengths.tolist() == [8, 3]
    for index in range(2):
        text = examples.text(index)
        assert (text[0], text[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_a_real_causal_tokenizer_gets_one_start_and_one_end(assets: Path):
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K-hf")
    table = Table(["Once upon a time"], completion=[" there was a dog."])
    examples = CausalLM().encode(tokenizer, table, 64)
    ids = examples.text(0).tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[1 : examples.targets[0]]).strip() == "Once upon a time"
    assert tokenizer.decode(ids[examples.targets[0] : -1]).strip() == "there was a dog."


# --- Losses --------------------------------------------------------------------------


def make_logits(*shape: int) -> Tensor:
    return torch.randn(*shape, VOCABULARY, generator=torch.Generator().manual_seed(0))


def causal_batch(clients: list[list[tuple[str, str]]]) -> Batch:
    parts = []
    for rows in clients:
        table = Table([prompt for prompt, _ in rows], completion=[answer for _, answer in rows])
        examples = CausalLM().encode(Letters(), table, 30)
        parts.append((examples, np.arange(len(rows))))
    return collate(parts, 0, CPU)


CLIENTS = [
    [("abc", "de"), ("", "fgh"), ("abcdefgh", "x")],
    [("ab", "")],
    [],
    [("a", "bcdefghij"), ("b", "c")],
]


def naive(batch: Batch, logits: Tensor, clients: list[list[tuple[str, str]]]) -> list[list[float]]:
    """Loss of every completion token of every client, token by token."""
    rows = len(batch.tokens) // len(clients)
    found = []
    for client, texts in enumerate(clients):
        losses = []
        for number, (prompt, answer) in enumerate(texts):
            row = client * rows + number
            first = 1 + len(prompt)
            for place in range(first, first + len(answer) + 1):
                scores = logits[row, place - 1].double().tolist()
                right = int(batch.tokens[row, place])
                losses.append(math.log(sum(map(math.exp, scores))) - scores[right])
        found.append(losses)
    return found


def test_a_clients_loss_is_the_mean_over_its_completion_tokens():
    batch = causal_batch(CLIENTS)
    logits = make_logits(*batch.tokens.shape)
    losses = naive(batch, logits, CLIENTS)
    expected = [sum(each) / len(each) if each else 0.0 for each in losses]
    found = CausalLM().losses(logits, batch, len(CLIENTS))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)

    sums = CausalLM().sums(logits, batch)
    assert tuple(sums) == SUMS
    assert sums["eval-examples"] == sum(map(len, losses))
    assert sums["eval-loss-sum"] == pytest.approx(sum(map(sum, losses)), rel=1e-5)


def test_prompt_and_padding_get_no_gradient():
    batch = causal_batch(CLIENTS)
    logits = make_logits(*batch.tokens.shape).requires_grad_()
    CausalLM().losses(logits, batch, len(CLIENTS)).sum().backward()
    touched = (logits.grad != 0).any(dim=-1)
    rows = len(batch.tokens) // len(CLIENTS)
    expected = torch.zeros_like(touched)
    for client, texts in enumerate(CLIENTS):
        for number, (prompt, answer) in enumerate(texts):
            expected[client * rows + number, len(prompt) : len(prompt) + len(answer) + 1] = True
    assert torch.equal(touched, expected)


def test_correct_tokens_are_counted_where_they_count():
    batch = causal_batch(CLIENTS)
    perfect = torch.zeros(*batch.tokens.shape, VOCABULARY)
    perfect[:, :-1].scatter_(2, batch.tokens[:, 1:, None], 9.0)
    sums = CausalLM().sums(perfect, batch)
    assert sums["eval-correct"] == sums["eval-examples"] > 0
    assert CausalLM().sums(perfect.roll(1, dims=-1), batch)["eval-correct"] == 0


def test_texts_of_one_token_teach_nothing():
    examples = CausalLM().encode(Letters(None, None), Table(["a", "b"]), 5)
    batch = collate([(examples, np.arange(2))], 0, CPU)
    logits = make_logits(2, 1).requires_grad_()
    losses = CausalLM().losses(logits, batch, 1)
    assert losses.tolist() == [0.0]
    losses.sum().backward()
    assert not logits.grad.any()
    assert CausalLM().sums(logits.detach(), batch) == dict.fromkeys(SUMS, 0)


def test_losses_of_labels_are_means_of_each_client():
    task = Classification(("a", "b", "c"))
    targets = torch.tensor([0, 2, 1, 1, -100, -100, -100, -100, -100])
    batch = Batch(torch.zeros(9, 1), torch.ones(9, 1), targets)
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = task.losses(logits, batch, 3)
    by_row = -logits.detach().double().log_softmax(-1)[torch.arange(4), targets[:4]]
    expected = [float(by_row[:3].mean()), float(by_row[3]), 0.0]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5)
    found.sum().backward()
    assert (logits.grad.any(dim=1) == (targets >= 0)).all()

    sums = task.sums(logits.detach(), batch)
    assert tuple(sums) == SUMS
    assert sums["eval-examples"] == 4
    assert sums["eval-loss-sum"] == pytest.approx(float(by_row.sum()), rel=1e-5)
    assert sums["eval-correct"] == int((logits[:4].argmax(-1) == targets[:4]).sum())


def test_16_bit_logits_are_summed_in_32_bits():
    batch = causal_batch(CLIENTS)
    logits = make_logits(*batch.tokens.shape).bfloat16()
    assert CausalLM().losses(logits, batch, len(CLIENTS)).dtype is torch.float32
    flat = Batch(batch.tokens, batch.mask, torch.zeros(len(batch.tokens), dtype=torch.int64))
    assert Classification(("a",)).losses(logits[:, 0], flat, 1).dtype is torch.float32


def test_the_score_is_named():
    assert (CausalLM().metric, CausalLM().labels) == ("loss", ())
    assert (Classification(("a",)).metric, Classification(("a",)).labels) == ("accuracy", ("a",))
