"""What a model learns to do: how texts become examples, each client's loss, the sums that make a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fl_client.batches import IGNORED, Batch, Examples
from fl_client.chats import in_template
from vblora.errors import DataError

if TYPE_CHECKING:  # reading tables needs `datasets`; training on tokens does not
    from fl_client.tables import Table

__all__ = ["SUMS", "UNCUT", "CausalLM", "Classification", "Task"]

UNCUT = 1 << 31  # tokens: a text's length at most, where it will be packed
END_OF_TEXT = "<|endoftext|>"  # at the end of completions that were written for GPT-2, as T0's are

SUMS = ("eval-examples", "eval-loss-sum", "eval-correct")


class Task(Protocol):
    """One kind of learning problem."""

    @property
    def metric(self) -> str:
        """Name of the score."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by index; empty without classes."""

    def encode(self, tokenizer: Any, table: Table, max_length: int) -> Examples:
        """Tokenise a table; texts are cut at `max_length` tokens."""

    def losses(self, logits: Tensor, batch: Batch, clients: int) -> Tensor:
        """(C,) mean loss of each client's targets, in nats; 0 for a client without any."""

    def counts(self, batch: Batch, clients: int) -> Tensor:
        """(C,) targets of each client, which its loss is the mean of."""

    def sums(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Sums over a batch, which add up over batches and clients, by the names in `SUMS`."""


@dataclass(frozen=True)
class Classification:
    """One label a text; the score is accuracy."""

    labels: tuple[str, ...]
    metric: str = "accuracy"

    def encode(self, tokenizer: Any, table: Table, max_length: int) -> Examples:
        if table.label is None:
            raise DataError("classification: the data has no label column; name it with --label-column")
        index = {label: number for number, label in enumerate(self.labels)}
        ids = tokenizer(list(table.text), truncation=True, max_length=max_length)["input_ids"]
        return _examples(ids, [index[label] for label in table.label])

    def losses(self, logits: Tensor, batch: Batch, clients: int) -> Tensor:
        rows = functional.cross_entropy(logits.float(), batch.targets, ignore_index=IGNORED, reduction="none")
        return rows.view(clients, -1).sum(dim=1) / self.counts(batch, clients).clamp(min=1)

    def counts(self, batch: Batch, clients: int) -> Tensor:
        return (batch.targets != IGNORED).view(clients, -1).sum(dim=1)

    def sums(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        real = batch.targets != IGNORED
        loss = functional.cross_entropy(logits.float(), batch.targets, ignore_index=IGNORED, reduction="sum")
        correct = (logits.argmax(dim=-1) == batch.targets) & real
        return {
            "eval-examples": int(real.sum()),
            "eval-loss-sum": float(loss.double()),
            "eval-correct": int(correct.sum()),
        }


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction on the completion of each row (on the whole text where there is no prompt).

    The score is the mean loss in nats per completion token; lower is better.
    """

    labels: tuple[str, ...] = ()
    metric: str = "loss"

    def encode(self, tokenizer: Any, table: Table, max_length: int) -> Examples:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if table.completion is None:
            texts = _ids(tokenizer, table.text)
            return _examples([(start + ids + end)[:max_length] for ids in texts], [len(start)] * len(texts))
        prompts, answers = table.text, [_without_end(said, tokenizer.eos_token) for said in table.completion]
        templated = bool(getattr(tokenizer, "chat_template", None))
        if templated:
            chats = table.chat or [(("user", text),) for text in prompts]
            pairs = [in_template(tokenizer, *row) for row in zip(chats, answers, strict=True)]
            prompts, answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
        asked = [prompt if templated else start + prompt for prompt in _ids(tokenizer, prompts)]
        said = [  # a template may write the end itself, and a new line behind it
            answer if templated and set(end) <= set(answer) else answer + end
            for answer in _ids(tokenizer, answers)
        ]
        cut = [_cut(*pair, max_length, start) for pair in zip(asked, said, strict=True)]
        examples = _examples([prompt + answer for prompt, answer in cut], [len(prompt) for prompt, _ in cut])
        return replace(examples, prompts=_numbered(asked))

    def losses(self, logits: Tensor, batch: Batch, clients: int) -> Tensor:
        tokens, _ = self._token_losses(logits, batch)
        return tokens.view(clients, -1).sum(dim=1) / self.counts(batch, clients).clamp(min=1)

    def counts(self, batch: Batch, clients: int) -> Tensor:
        return self._real(batch).view(clients, -1).sum(dim=1)

    def sums(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        tokens, real = self._token_losses(logits, batch)
        right = (logits[:, :-1].argmax(dim=-1) == batch.tokens[:, 1:]) & real
        return {
            "eval-examples": int(real.sum()),
            "eval-loss-sum": float(tokens.double().sum()),
            "eval-correct": int(right.sum()),
        }

    def _token_losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(rows, T) loss of the token after each, 0 where it does not count; (rows, T - 1) where it does.

        The last place predicts nothing. It is kept: flat logits are those of the model, not a copy.
        """
        real = self._real(batch)
        wanted = torch.where(real, batch.tokens[:, 1:], IGNORED)
        wanted = functional.pad(wanted, (0, 1), value=IGNORED)
        losses = functional.cross_entropy(
            logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view(wanted.shape), real

    def _real(self, batch: Batch) -> Tensor:
        """(rows, T - 1) bool, whether the token after each counts."""
        places = torch.arange(1, batch.tokens.shape[1], device=batch.tokens.device)
        leading = torch.where(batch.targets == IGNORED, batch.tokens.shape[1], batch.targets)
        real = (batch.mask[:, 1:] > 0) & (places >= leading.unsqueeze(1))
        if batch.positions is not None:  # nothing in a packed row tells how its next text begins
            real &= batch.positions[:, 1:] > 0
        return real


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return found


def _numbered(prompts: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """(n,) the number of each prompt, the same for equal ones."""
    numbers: dict[tuple[int, ...], int] = {}
    found = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    return np.array(found, np.int64)


def _cut(prompt: list[int], answer: list[int], most: int, start: list[int]) -> tuple[list[int], list[int]]:
    """Both, of `most` tokens together at most.

    The answer may fill what the prompt leaves free, and half of the whole in any case. The end of a prompt is
    next to what is asked, so a long one loses its beginning, all but the token that starts every text.
    """
    answer = answer[: max(most // 2, most - len(prompt))]
    first = prompt[: len(start)] if prompt[: len(start)] == start else []
    rest = prompt[len(first) :]
    return first + rest[max(0, len(prompt) + len(answer) - most) :], answer


def _without_end(completion: str, end: str | None) -> str:
    """A completion without the end that some files spell out; every row gets its end as a token."""
    for mark in (END_OF_TEXT, end):
        completion = completion.removesuffix(mark or "")
    return completion


def _examples(ids: Sequence[Sequence[int]], targets: Sequence[int]) -> Examples:
    lengths = np.fromiter((len(row) for row in ids), np.int64, len(ids))
    tokens = np.fromiter((token for row in ids for token in row), np.int32, int(lengths.sum()))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Examples(tokens, starts, np.asarray(targets, np.int64))
