"""Conversations become prompts and answers, in the words of the tokenizer's template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fl_client.assembly import load_texts, save_texts
from fl_client.chats import answers, in_template, opening, read_chat
from fl_client.columns import Roles, find_roles
from fl_client.opening import prepare_texts
from fl_client.settings import DataSettings, SiteSettings
from fl_client.tables import Table, load_corpus
from fl_client.tasks import CausalLM
from tests.fl_client.test_tasks import EOS, Letters, texts_of
from vblora.errors import ConfigError, DataError

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def say(*turns: str) -> list[dict[str, str]]:
    """Messages that user and assistant send in turn."""
    return [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]


@dataclass
class Chatty(Letters):
    """Its template writes `u...z` and `s...z`, and begins an answer with `s`."""

    eos_token_id: int | None = ord("z") - 87
    chat_template: str | None = "any"
    rewrites: bool = False  # the prompt of a conversation that goes on

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool = False
    ) -> str:
        assert not tokenize
        if messages[0]["role"] == "system":
            raise ValueError("no system role\nplease")
        said = "".join({"user": "u", "assistant": "s"}[m["role"]] + m["content"] + "z" for m in messages)
        if self.rewrites and not add_generation_prompt:
            return "w" + said
        return said + ("s" if add_generation_prompt else "")


# --- Cells ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [
        say("hi", "yes"),
        json.dumps(say("hi", "yes")),
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "yes", "tool_calls": None},
        ],
    ],
)
def test_messages_are_read_in_the_usual_forms(cell: Any):
    assert read_chat(cell, "data") == (("user", "hi"), ("assistant", "yes"))


@pytest.mark.parametrize("cell", [None, "text", 3, ["hi"], [{"speaker": "me"}], '{"role": "user"}'])
def test_other_cells_are_told(cell: Any):
    with pytest.raises(DataError, match=r"data: holds .*, expected a list of messages"):
        read_chat(cell, "data")


def test_every_answer_has_what_stands_before():
    chat = read_chat([{"role": "system", "content": "be kind"}, *say("a", "b", "c", " ", "d", "e")], "data")
    assert list(answers(chat)) == [(chat[:2], "b"), (chat[:6], "e")]
    assert list(answers(chat[2:3])) == [], "nothing was asked"
    assert opening(chat) == "a"


@pytest.mark.parametrize("called", [{}, {"content": None}], ids=["no content", "null"])
def test_a_call_of_a_tool_is_no_answer(called: dict[str, None]):
    call = {"role": "assistant", "tool_calls": [{"id": 1}], **called}
    chat = read_chat([*say("a"), call, {"role": "tool", "content": "3"}, *say("", "b")[1:]], "data")
    assert list(answers(chat)) == [(chat[:3], "b")]


# --- Templates -----------------------------------------------------------------------


def test_the_completion_is_what_the_template_adds():
    before = read_chat(say("ab", "cd", "ef"), "data")
    assert in_template(Chatty(), before, "gh") == ("uabzscdzuefzs", "ghz")
    assert in_template(Chatty(rewrites=True), before, "gh") == ("uabzscdzuefzs", "gh")
    with pytest.raises(DataError, match=r"refuses a conversation \(no system role please\).*off"):
        in_template(Chatty(), (("system", "x"), *before), "gh")


def test_prompts_go_through_the_template_where_there_is_one():
    table = Table(["ab", "c"], completion=["de>", "f"])
    assert texts_of(CausalLM().encode(Chatty(), table, 20)) == ["uabzs|dez", "uczs|fz"]
    plain = Chatty(eos_token_id=EOS, chat_template=None)
    assert texts_of(CausalLM().encode(plain, table, 20)) == ["<ab|de>", "<c|f>"]
    assert texts_of(CausalLM().encode(Chatty(), table, 7)) == ["abzs|dez", "uczs|fz"], "its beginning is lost"
    chat = read_chat(say("ab", "cd", "ef"), "data")
    talk = Table(["ab\n\ncd\n\nef"], completion=["gh"], chat=[chat])
    assert texts_of(CausalLM().encode(Chatty(), talk, 20)) == ["uabzscdzuefzs|ghz"]


def test_an_answer_ends_where_its_template_writes_no_end():
    table = Table(["ab"], completion=["de"])
    assert texts_of(CausalLM().encode(Chatty(eos_token_id=EOS), table, 20)) == ["uabzs|dez>"]
    assert texts_of(CausalLM().encode(Chatty(eos_token_id=EOS, rewrites=True), table, 20)) == ["uabzs|de>"]
    assert texts_of(CausalLM().encode(Chatty(eos_token_id=None), table, 20)) == ["uabzs|dez"]


def test_a_real_tokenizer_writes_its_template(assets: Path):
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K-hf")
    tokenizer.chat_template = CHATML
    examples = CausalLM().encode(tokenizer, Table(["Who is it?"], completion=["A dog."]), 128)
    tokens, leading = examples.text(0).tolist(), int(examples.targets[0])
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens[leading:-1]).strip() == "A dog.<|im_end|>"
    assert tokens[-1] == tokenizer.eos_token_id, "<|im_end|> is no end to this one"
    short = CausalLM().encode(tokenizer, Table(["Who is it? " * 30], completion=["A dog."]), 64)
    assert short.text(0)[0] == tokenizer.bos_token_id, "kept when the prompt is cut"
    assert len(short.text(0)) == 64


# --- Data sets -----------------------------------------------------------------------


def test_a_column_of_messages_is_found():
    found = ["prompt", "completion", "messages", "site"]
    assert find_roles(found, "auto", "data", group_column="site") == (
        "causal-lm",
        Roles((), group="site", chat="messages"),
    )
    assert find_roles(found, "causal-lm", "data", text_column="prompt")[1] == Roles(("prompt",))


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Twenty conversations with two answers each."""
    rows = [
        {"messages": say(f"What is {n}?", f"A number, {n}.", "Sure?", "Yes."), "site": f"{n % 4}"}
        for n in range(20)
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_conversations_load_as_rows_and_stay_on_one_side(talks: Path):
    corpus = load_corpus(str(talks), "auto", group_column="site")
    assert len(corpus.train) + len(corpus.test) == 40
    assert corpus.train.chat is not None
    assert corpus.test.chat is not None
    assert {opening(chat) for chat in corpus.train.chat}.isdisjoint(map(opening, corpus.test.chat))
    row = next(row for row in range(len(corpus.train)) if len(corpus.train.chat[row]) == 3)
    assert corpus.train.completion is not None
    assert corpus.train.completion[row] == "Yes."
    assert corpus.train.text[row].endswith("\n\nSure?")
    taken = corpus.train.take([row])
    assert taken.chat == [corpus.train.chat[row]]


@pytest.mark.parametrize("blank", [None, [], "", " "], ids=repr)
def test_a_missing_conversation_is_dropped_and_a_broken_one_told(tmp_path: Path, blank: Any):
    path = tmp_path / "talks.jsonl"
    as_text = isinstance(blank, str)  # a column has one type
    talks = [say(f"What is {n}?", "A number.") for n in range(20)]
    rows = [{"messages": json.dumps(talk) if as_text else talk} for talk in talks]
    path.write_text("\n".join(map(json.dumps, [*rows, {"messages": blank}])))
    corpus = load_corpus(str(path), "auto")
    assert len(corpus.train) + len(corpus.test) == 20
    broken = {"messages": "hello" if as_text else [{"speaker": "me"}]}
    path.write_text("\n".join(map(json.dumps, [*rows, broken])))
    with pytest.raises(DataError, match=r"column 'messages'.* holds .*, expected a list of messages"):
        load_corpus(str(path), "auto")


def test_conversations_without_an_answer_are_told(tmp_path: Path):
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": say("hello?")}))
    with pytest.raises(DataError, match="column 'messages' holds no answer of an assistant"):
        load_corpus(str(path), "auto")


def test_a_site_of_conversations(talks: Path, assets: Path, tmp_path: Path):
    data = DataSettings(str(talks), max_length=64, clients=2, partition="iid", chat_template="off")
    texts = prepare_texts(SiteSettings(model=str(assets / "models" / "stories260K-hf"), data=data))
    assert texts.labels == ()
    assert len(texts.train) + len(texts.test) == 40
    assert (texts.train.targets > 1).all()
    save_texts(tmp_path / "texts.npz", texts)
    assert len(np.unique(texts.test.prompts)) == len(texts.test)
    assert load_texts(tmp_path / "texts.npz").test.prompts.tolist() == texts.test.prompts.tolist()
    with pytest.raises(ConfigError, match="chat-template is 'on', expected auto or off"):
        DataSettings(chat_template="on")
