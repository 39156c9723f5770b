"""Greedy answers: what one token after another gives, whatever shares the batch; their scores add up."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_client.batches import Examples
from fl_client.generating import asked_prompts, generate, references, rows_with_prompts
from fl_client.opening import open_site
from fl_client.packed import pack
from fl_client.settings import DataSettings, SiteSettings
from fl_client.tables import Table
from fl_client.tasks import CausalLM
from fl_client.text_scores import text_sums
from fl_server.exchange import Reply
from fl_server.text_scores import read_text_sums, text_scores
from tests.fl_client.test_tasks import Letters, texts_of
from tests.vblora.tiny import VOCABULARY, adapt, make_base, make_state
from vblora.errors import ConfigError, UpdateError
from vblora.model import AdaptedModel
from vblora.state import State, initial_state

END = 7


class Numbers:
    """Decodes tokens as their numbers."""

    eos_token_id = END

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, ids))


def make_rows(pairs: list[tuple[list[int], list[int]]]) -> Examples:
    """Prompts and completions."""
    rows = [prompt + completion for prompt, completion in pairs]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    tokens = np.array([token for row in rows for token in row], np.int32)
    prompts = [prompt for prompt, _ in pairs]
    numbers = np.array([prompts.index(prompt) for prompt in prompts], np.int64)
    return Examples(tokens, starts, np.array([*map(len, prompts)], np.int64), prompts=numbers)


ROWS = make_rows([([1, 5], [8, 9]), ([1, 6, 4], [3]), ([1, 5], [8]), ([1], [9, 9]), ([1, 9], [2])])


def slowly(model: AdaptedModel, state: State, prompt: np.ndarray, most: int) -> str:
    """Without cache and padding: the whole text again for each token."""
    ids = prompt.tolist()
    model.bind(model.load(state))
    with torch.no_grad():
        for _ in range(most):
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == END:
                break
            ids.append(token)
    model.unbind()
    return " ".join(map(str, ids[len(prompt) :]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_are_those_of_one_token_after_another(family: str):
    base = make_base(family)
    base.generation_config.eos_token_id = None
    model = adapt(base.double())
    state = make_state(model.blueprint)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(8, VOCABULARY, length).astype(np.int32) for length in (3, 9, 1, 5, 5, 2)]
    found = generate(model, state, Numbers(), prompts, 12, 0)
    assert found == [slowly(model, state, prompt, 12) for prompt in prompts]
    assert len(set(found)) > 1
    text = torch.tensor([[8, 9, 10]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=text).logits, make_base(family).double()(text).logits), "unbound"
    assert generate(model, state, Numbers(), [], 12, 0) == []


def test_the_models_own_end_ends_an_answer_too():
    base = make_base("llama")
    model = adapt(base)
    state = make_state(model.blueprint)
    prompt = np.array([8, 9, 10], np.int32)
    first = int(slowly(model, state, prompt, 1))
    model.base.generation_config.eos_token_id = [first, 95]
    assert generate(model, state, Numbers(), [prompt], 5, 0) == [""]


def test_the_models_own_taste_is_left_out():
    base = make_base("llama")
    base.generation_config.eos_token_id = None
    model = adapt(base)
    state, prompt = make_state(model.blueprint), np.array([8, 9, 10], np.int32)
    own = model.base.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_new_tokens = 50.0, 1, 3
    assert generate(model, state, Numbers(), [prompt], 12, 0) == [slowly(model, state, prompt, 12)]
    assert model.base.generation_config is own


def test_prompts_are_drawn_once_each_with_all_their_references():
    asked = asked_prompts(ROWS, 10, 0)
    assert [item.rows for item in asked] == [(0, 2), (1,), (4,)]
    assert [item.prompt.tolist() for item in asked] == [[1, 5], [1, 6, 4], [1, 9]]
    assert references(Numbers(), ROWS, asked[0]) == ["8 9", "8"]
    two = [item.rows for item in asked_prompts(ROWS, 2, 0)]
    assert two == sorted(two)
    assert len({tuple(item.rows for item in asked_prompts(ROWS, 1, seed)) for seed in range(20)}) == 3
    assert rows_with_prompts(ROWS) == 4
    assert rows_with_prompts(pack(ROWS, [np.arange(5)], 9)[0]) == 0


def test_a_prompt_that_is_cut_keeps_all_its_references():
    """How much of it is left depends on the answer of its own row."""
    table = Table(["abcdefgh"] * 4 + ["habcdefgh"], completion=["pqr", "p", "pqrst", "pqrstuv", "p"])
    examples = CausalLM().encode(Letters(), table, 10)
    assert [text.split("|")[0] for text in texts_of(examples)] == [
        "<defgh",
        "<bcdefgh",
        "<efgh",
        "<efgh",
        "<bcdefgh",
    ]
    for rows in (examples, examples.take(np.arange(5))):
        asked = asked_prompts(rows, 10, 0)
        assert [item.rows for item in asked] == [(0, 1, 2, 3), (4,)]
        assert asked[0].prompt.tolist() == examples.text(1)[:8].tolist(), (
            "what the others have of it, and more"
        )


# --- Scores --------------------------------------------------------------------------


TEXTS = ["the cat sat on the mat", "a dog", "nothing alike"]
KNOWN = [["the cat sat on a mat", "one cat sat on the mat"], ["a dog "], ["some other words", "and these"]]


def test_sums_make_the_corpus_scores():
    sacrebleu = pytest.importorskip("sacrebleu")
    pytest.importorskip("torchmetrics")
    parts = {
        "0": text_sums(TEXTS[:1], KNOWN[:1]),
        "1": text_sums(TEXTS[1:], KNOWN[1:]),
        "2": text_sums([], []),
    }
    found = text_scores({name: read_text_sums(Reply(name, metrics=part)) for name, part in parts.items()})
    streams = [[known[0] for known in KNOWN], [known[-1] for known in KNOWN]]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(TEXTS, streams).score)
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["rouge_l"] == pytest.approx((5 / 6 + 1 + 0) / 3)
    assert found["prompts"] == 3
    assert text_scores({"0": read_text_sums(Reply("0", metrics=parts["2"]))}) == {}


@pytest.mark.parametrize("change", [{"text-rouge": float("nan")}, {"text-exact": -1}, {"text-prompts": None}])
def test_sums_that_cannot_be_are_refused(change: dict[str, float | None]):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("torchmetrics")
    told = {name: value for name, value in {**text_sums(TEXTS, KNOWN), **change}.items() if value is not None}
    with pytest.raises(UpdateError, match=f"lack or misstate {next(iter(change))}"):
        read_text_sums(Reply("0", metrics=told))
    with pytest.raises(UpdateError, match="evaluation: no library"):
        read_text_sums(Reply("0", metrics=told, text="no library"))


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchmetrics" else object())
    with pytest.raises(
        ConfigError, match=r"needs torchmetrics, which is not installed; pip install .*text-scores"
    ):
        text_sums(TEXTS, KNOWN)


def test_a_site_answers_its_shards(assets: Path):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("torchmetrics")
    data = DataSettings(
        str(assets / "data" / "e2e"), "causal-lm", max_examples=20, eval_examples=12, max_length=96, clients=2
    )
    site = open_site(SiteSettings(model=str(assets / "models" / "stories260K-hf"), device="cpu", data=data))
    state = initial_state(site.blueprint)
    whole = site.generate(state, 4, 0, 1)
    parts = [site.generate(state, 4, shard, 3) for shard in range(3)]
    assert whole["text-prompts"] == 4
    assert {name: sum(part[name] for part in parts) for name in whole} == pytest.approx(whole)
