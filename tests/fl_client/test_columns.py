"""Columns are found by their usual names, and what cannot be found is said in one line."""

import pytest

from fl_client.columns import Roles, find_roles
from vblora.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("found", "task", "roles"),
    [
        (["sentence", "label"], "classification", Roles(("sentence",), label="label")),
        (["idx", "Text", "Category"], "classification", Roles(("Text",), label="Category")),
        (["text", "target"], "classification", Roles(("text",), label="target")),
        (["mr", "ref"], "causal-lm", Roles(("mr",), completion="ref")),
        (["question", "answer"], "causal-lm", Roles(("question",), completion="answer")),
        (["task", "prompt", "completion"], "causal-lm", Roles(("prompt",), completion="completion")),
        (["text"], "causal-lm", Roles(("text",))),
        (
            ["instruction", "input", "output"],
            "causal-lm",
            Roles(("instruction", "input"), completion="output"),
        ),
    ],
)
def test_auto_finds_task_and_columns(found: list[str], task: str, roles: Roles) -> None:
    assert find_roles(found, "auto", "data") == (task, roles)
    assert find_roles(found, task, "data") == (task, roles)


def test_given_columns_win() -> None:
    found = ["text", "note", "label", "ward", "site"]
    task, roles = find_roles(
        found, "auto", "data", text_column="note", label_column="ward", group_column="site"
    )
    assert (task, roles) == ("classification", Roles(("note",), label="ward", group="site"))


def test_columns_can_be_joined() -> None:
    roles = find_roles(["a", "b", "label"], "auto", "data", text_column="a+b")[1]
    assert roles.text == ("a", "b")


def test_the_only_other_column_is_the_text() -> None:
    assert find_roles(["headword", "label"], "classification", "data")[1].text == ("headword",)


def test_text_column_alone_asks_for_plain_text() -> None:
    roles = find_roles(["text", "prompt", "output"], "causal-lm", "data", text_column="text")[1]
    assert roles == Roles(("text",))


@pytest.mark.parametrize(
    ("found", "task", "given", "message"),
    [
        (
            ["text", "label"],
            "auto",
            {"label_column": "lable"},
            "no label column 'lable'; found 'text', 'label';",
        ),
        (["text", "label"], "auto", {"label_column": "lable"}, "did you mean 'label'"),
        (["text", "label"], "auto", {"text_column": "text+titel"}, "no text column 'titel'"),
        (["text", "label"], "auto", {"group_column": "site"}, "no group column 'site'"),
        (["text", "ref"], "causal-lm", {"label_column": "reff"}, "no completion column 'reff'"),
        (["text", "score"], "classification", {}, "found no label column among 'text', 'score'"),
        (["a", "b", "label"], "classification", {}, "found no text column among"),
        (["a", "b"], "causal-lm", {}, "found neither a text column nor a prompt"),
        (["a", "b"], "auto", {}, "found neither a text column nor a prompt"),
        (["instruction", "response", "category"], "auto", {}, "could be classification .* or causal-lm"),
    ],
)
def test_what_is_missing_is_named(found: list[str], task: str, given: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        find_roles(found, task, "notes.csv", **given)
    assert str(caught.value).startswith("notes.csv: ")
    assert "\n" not in str(caught.value)


def test_unknown_task() -> None:
    with pytest.raises(ConfigError, match=r"task is 'rank', expected 'classification'"):
        find_roles(["text"], "rank", "data")
