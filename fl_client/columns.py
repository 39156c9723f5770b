"""Which column of a data set plays which role: text, label, completion, group."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from vblora.errors import ConfigError, DataError

__all__ = ["Roles", "Task", "find_roles"]

Task = Literal["classification", "causal-lm"]

# Usual names in order of preference, compared in lower case.
TEXT = (
    *(
        "text",
        "sentence",
        "content",
        "question",
        "utterance",
        "review",
        "comment",
        "message",
        "tweet",
        "query",
    ),
    *("document", "article", "passage", "body", "abstract", "headline", "title", "description", "story"),
    *("docstring", "prompt", "instruction", "input"),
)
LABEL = (
    *("label", "labels", "category", "class", "intent", "sentiment", "topic", "emotion", "coarse_label"),
    *("library", "target"),
)
PROMPT = ("prompt", "instruction", "input", "question", "mr", "source", "query")
COMPLETION = ("completion", "response", "output", "answer", "ref", "summary", "highlights", "target")
CHAT = ("messages", "conversations", "conversation")
# Instruction sets such as Alpaca and Dolly keep what the instruction is about in a second, often blank,
# column.
INSTRUCTION = "instruction"
INSTRUCTION_INPUT = ("input", "context")


@dataclass(frozen=True)
class Roles:
    """Column names. `text` may be several columns, joined by a blank line; a role that nothing plays is
    "". Where `chat` names a column of messages, there is no other text."""

    text: tuple[str, ...]
    label: str = ""
    completion: str = ""
    group: str = ""
    chat: str = ""

    @property
    def named(self) -> tuple[str, ...]:
        """Every column that plays a role."""
        return (*self.text, *(name for name in (self.label, self.completion, self.group, self.chat) if name))


def find_roles(
    found: Sequence[str],
    task: str,
    where: str,
    *,
    text_column: str = "",
    label_column: str = "",
    group_column: str = "",
) -> tuple[Task, Roles]:
    """Match the columns `found` at `where` to roles: those given by name, the others by their usual names.

    Args:
        task: "classification", "causal-lm", or "auto": classification where there is a label column, else
            causal-lm where there are messages, prompt and completion columns, or text alone.
        text_column: the text, or the prompt. "a+b" joins two columns by a blank line.
        label_column: the label; for causal-lm the completion. Naming the text column alone asks causal-lm for
            plain text.

    Raises:
        ConfigError: another task.
        DataError: a column that is not there, or a role that no column plays.
    """
    if task not in ("auto", "classification", "causal-lm"):
        raise ConfigError(f"task is {task!r}, expected 'classification', 'causal-lm' or 'auto'")
    group = _given(found, group_column, "group", where)
    text = _given_text(found, text_column, where)
    label = _given(found, label_column, "completion" if task == "causal-lm" else "label", where)
    if task == "auto":
        task = _guess_task(found, where, text, label)
    if task == "classification":
        return "classification", _classification(found, where, text, label, group)
    return cast(Task, task), _causal(found, where, text, label, group)


def _classification(found: Sequence[str], where: str, text: tuple[str, ...], label: str, group: str) -> Roles:
    label = label or _usual(found, LABEL, text)
    if not label:
        raise DataError(f"{where}: found no label column among {_listed(found)}; name it with --label-column")
    text = text or _texts(found, label)
    rest = [name for name in found if name not in (label, group)]
    if not text and len(rest) == 1:
        text = (rest[0],)
    if not text:
        raise DataError(f"{where}: found no text column among {_listed(found)}; name it with --text-column")
    return Roles(text, label=label, group=group)


def _causal(found: Sequence[str], where: str, text: tuple[str, ...], completion: str, group: str) -> Roles:
    if not text and not completion and (chat := _usual(found, CHAT, ())):
        return Roles((), group=group, chat=chat)
    if not text:
        completion = completion or _usual(found, COMPLETION, ())
        prompt = _prompts(found, completion)
        if completion and prompt:
            return Roles(prompt, completion=completion, group=group)
        text = _texts(found, completion)
    if not text:
        raise DataError(
            f"{where}: found neither a text column nor a prompt and a completion among {_listed(found)}; "
            "name them with --text-column and --label-column"
        )
    given = completion if completion not in text else ""
    return Roles(text, completion=given, group=group)


def _guess_task(found: Sequence[str], where: str, text: tuple[str, ...], label: str) -> Task:
    """The task that the columns speak for; one that could be either must be told."""
    if label:
        return "classification"
    label = _usual(found, LABEL, text)
    if not (label and (text or _texts(found, label))):
        return "causal-lm"
    completion = _usual(found, COMPLETION, ())
    if not text and completion and _prompts(found, completion):
        raise DataError(
            f"{where}: could be classification (label {label!r}) or causal-lm (completion {completion!r}); "
            "say which with --task"
        )
    return "classification"


def _prompts(found: Sequence[str], completion: str) -> tuple[str, ...]:
    prompt = _usual(found, PROMPT, (completion,))
    if prompt.lower() != INSTRUCTION:
        return (prompt,) if prompt else ()
    more = _usual(found, INSTRUCTION_INPUT, (completion,))
    return (prompt, more) if more else (prompt,)


def _texts(found: Sequence[str], taken: str) -> tuple[str, ...]:
    name = _usual(found, TEXT, (taken,))
    return (name,) if name else ()


def _usual(found: Sequence[str], usual: Iterable[str], taken: Iterable[str]) -> str:
    """The first usual name that is found and not taken, as the data spells it; "" if none."""
    spelt = {name.lower(): name for name in reversed(found) if name not in set(taken)}
    return next((spelt[name] for name in usual if name in spelt), "")


def _given_text(found: Sequence[str], name: str, where: str) -> tuple[str, ...]:
    if not name or name in found or "+" not in name:
        single = _given(found, name, "text", where)
        return (single,) if single else ()
    return tuple(_given(found, part.strip(), "text", where) for part in name.split("+"))


def _given(found: Sequence[str], name: str, role: str, where: str) -> str:
    if not name or name in found:
        return name
    close = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise DataError(f"{where}: no {role} column {name!r}; found {_listed(found)}{hint}")


def _listed(found: Sequence[str], most: int = 20) -> str:
    names = ", ".join(repr(name) for name in found[:most])
    return names + (f" and {len(found) - most} more" if len(found) > most else "")
