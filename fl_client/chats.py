"""Conversations: columns of messages as rows of what was said before and the answer, and chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vblora.errors import DataError

__all__ = ["Chat", "answers", "in_template", "opening", "read_chat"]

Chat = tuple[tuple[str, str], ...]  # (role, content) of each message

ASSISTANT = "assistant"
ROLES = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT}  # as ShareGPT calls them
KEYS = (("role", "content"), ("from", "value"))


def read_chat(value: Any, where: str) -> Chat:
    """A cell of messages: a list of objects with role and content (or from and value), or its JSON.

    Raises:
        DataError: it is something else.
    """
    try:
        messages = json.loads(value) if isinstance(value, str) else value
        return tuple(_message(message) for message in messages)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"{where}: holds {value!r:.80}, expected a list of messages, each with role and content"
        ) from error


def answers(chat: Chat) -> Iterator[tuple[Chat, str]]:
    """What stands before each of the assistant's messages, and that message; a first or blank one is none."""
    for place, (role, content) in enumerate(chat):
        if role == ASSISTANT and place and content.strip():
            yield chat[:place], content


def opening(chat: Chat) -> str:
    """What a conversation begins with, apart from instructions that many share."""
    return next((content for role, content in chat if role != "system"), "")


def in_template(tokenizer: Any, before: Chat, answer: str) -> tuple[str, str]:
    """Prompt and completion as the tokenizer's chat template writes them, special tokens included.

    The completion is what the template adds to the prompt for the answer. Where it writes the prompt of an
    answered conversation otherwise, the completion is the answer alone.

    Raises:
        DataError: the template refuses the conversation.
    """
    try:
        prompt = _render(tokenizer, before, add_generation_prompt=True)
        whole = _render(tokenizer, (*before, (ASSISTANT, answer)))
    except Exception as error:  # templates raise what they like, jinja2's errors among them
        why = " ".join(str(error).split())[:200]
        raise DataError(
            f"--chat-template: the tokenizer's template refuses a conversation ({why}); "
            "use --chat-template off"
        ) from error
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :]
    return prompt, answer


def _render(tokenizer: Any, chat: Chat, **options: bool) -> str:
    messages: Sequence[Mapping[str, str]] = [{"role": role, "content": content} for role, content in chat]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _message(message: Mapping[str, Any]) -> tuple[str, str]:
    for role, content in KEYS:
        if role in message:
            name, said = str(message[role]), message.get(content) or ""
            if isinstance(said, list):  # of parts, where some may be pictures
                said = "".join(part.get("text") or "" for part in said)
            return ROLES.get(name, name), str(said)
    raise KeyError("role")
