"""Answers of a trained run: the class of a text with its probability, or how a text goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from fl_client.assembly import task_of
from fl_client.base import Base, find_device, load_base, longest_text
from fl_client.batches import by_length, collate
from fl_client.generating import generate
from fl_client.tables import Table
from fl_client.tasks import UNCUT
from simulations.export import Trained, require_same_base
from vblora.errors import ConfigError, DataError
from vblora.model import AdaptedModel

__all__ = ["Answer", "Answerer", "lines"]

CHUNK = 256  # texts that are read before the first of them is answered
CPU_TOKENS, GPU_TOKENS = 1 << 10, 1 << 13  # of a batch
BESIDE = 8  # texts that are continued side by side


@dataclass(frozen=True)
class Answer:
    """What a run says to one text.

    Attributes:
        text: as it was asked.
        said: the class, or the continuation.
        probability: of the class; None for a continuation.
    """

    text: str
    said: str
    probability: float | None = None

    @property
    def line(self) -> str:
        """On one line: class and probability, or the continuation with its line breaks as spaces."""
        if self.probability is None:
            return " ".join(self.said.split("\n"))
        return f"{self.said}\t{self.probability:.4f}"


class Answerer:
    """A base with the adapter of a run bound, ready to answer.

    Args:
        found: the run.
        device: as `--device`.
        dtype: of the base, as `--dtype`.
        template: whether prompts go through the tokenizer's chat template, where it has one.

    Raises:
        ModelError: the base is missing, or another than the adapter was trained on.
        RunError: clients keep their heads, and none was named.
    """

    def __init__(
        self, found: Trained, device: str = "auto", dtype: str = "auto", *, template: bool = True
    ) -> None:
        found.require_head()
        blueprint, config = found.blueprint, found.config
        self.task = task_of(blueprint.labels)
        self.base: Base = load_base(
            found.model,
            blueprint.labels,
            find_device(device),
            dtype=dtype,
            quantize=str(config["quantize"]),
            seed=int(config["seed"]),
        )
        require_same_base(self.base.model, found)
        if not template:
            self.base.tokenizer.chat_template = None
        self._most = int(config["max-length"])
        self._model, self._state = AdaptedModel(self.base.model, blueprint), found.state

    @torch.no_grad()
    def answer(self, texts: Iterable[str], new_tokens: int = 64) -> Iterator[Answer]:
        """Answer texts in their order; `new_tokens` bounds a continuation, which takes the likeliest token.

        Raises:
            ConfigError: so many new tokens that no text fits before them.
        """
        waiting = iter(texts)
        while part := list(islice(waiting, CHUNK if self.task.labels else BESIDE)):
            yield from self._classified(part) if self.task.labels else self._continued(part, new_tokens)

    def _classified(self, texts: Sequence[str]) -> Iterator[Answer]:
        labels = self.task.labels
        table = Table(list(texts), label=[labels[0]] * len(texts))  # a class for the form's sake
        examples = self.task.encode(self.base.tokenizer, table, self._most)
        found: dict[int, tuple[float, int]] = {}
        device = self._model.device
        self._model.bind(self._model.load(self._state))
        for rows in by_length(examples, CPU_TOKENS if device.type == "cpu" else GPU_TOKENS):
            batch = collate([(examples, rows)], self.base.pad, device)
            best = self._model(**batch.inputs).logits.float().softmax(dim=-1).max(dim=-1)
            found |= dict(
                zip(rows.tolist(), zip(*(part.tolist() for part in best), strict=True), strict=True)
            )
        for place, text in enumerate(texts):
            probability, label = found[place]
            yield Answer(text, labels[label], probability)

    def _continued(self, texts: Sequence[str], new_tokens: int) -> Iterator[Answer]:
        most = (longest_text(self.base.model) or UNCUT) - new_tokens
        if most < 1:
            raise ConfigError(
                f"--new-tokens is {new_tokens}, the model reads {most + new_tokens} in all; "
                "leave room for a text"
            )
        tokenizer, pad = self.base.tokenizer, self.base.pad
        asked = self.task.encode(tokenizer, Table(list(texts), completion=[""] * len(texts)), most)
        # What a training row starts with; an empty text without a start token goes on from padding.
        prompts = [asked.text(row)[: asked.targets[row]] for row in range(len(asked))]
        prompts = [prompt if len(prompt) else np.array([pad], np.int32) for prompt in prompts]
        said = generate(self._model, self._state, tokenizer, prompts, new_tokens, pad)
        yield from map(Answer, texts, said)


def lines(given: Sequence[str], file: Path | None) -> Iterator[str]:
    """The texts to answer: those given, or the lines of a file, or else of standard input.

    Raises:
        ConfigError: both are given.
        DataError: the file cannot be read, or something is not UTF-8.
    """
    if given and file is not None:
        raise ConfigError("predict: texts are given and --file too; choose one")
    if given:
        for number, text in enumerate(given, 1):
            if any("\ud800" <= sign <= "\udfff" for sign in text):  # how Python keeps bytes that are no text
                raise DataError(f"predict: text {number} holds bytes that are not UTF-8")
            yield text
        return
    try:
        with _utf8(file) as stream:
            for line in stream:
                yield line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        source = "standard input" if file is None else f"--file: {file}"
        raise DataError(f"{source} cannot be read ({error})") from error


def _utf8(file: Path | None) -> TextIOWrapper:
    """A file, or standard input: as Python opens that, it may let through what is no text."""
    return TextIOWrapper(sys.stdin.buffer, "utf-8") if file is None else file.open(encoding="utf-8")
