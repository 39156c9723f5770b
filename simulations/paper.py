"""The parameter counts that the VB-LoRA paper publishes (arXiv 2405.15179v3), counted again from the layers.

Section 3.4 of the paper counts what is stored as float32: the bank, and of each row k indices and k - 1
weights. With k = 2 and indices of one byte (h up to 256) that is h b + 1.5 S. Its tables follow this in part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from simulations.skeleton import skeleton
from vblora.model import find_linears
from vblora.spec import Linear, row_slices

__all__ = ["PUBLISHED", "Count", "Published", "count_published"]

LENGTH, TOPK = 256, 2  # b and k of every published setting
A_ROW = (1.5, 2.0, 3.0, 6.0, 0.75)  # float32 numbers a row that a published count may stand for, likely first


@dataclass(frozen=True)
class Published:
    """One line of the paper's tables.

    Attributes:
        model: a name of `known_models`.
        targets: layers, as `--target-modules` names them.
        rank, num_vectors: r and h.
        millions: as printed, in millions of parameters.
        table: where.
    """

    model: str
    targets: str
    rank: int
    num_vectors: int
    millions: str
    table: int


PUBLISHED = (
    Published("roberta-base", "query,value", 4, 90, "0.023", 1),
    Published("roberta-base", "all-linear", 4, 90, "0.027", 1),
    Published("roberta-large", "query,value", 4, 90, "0.024", 1),
    Published("roberta-large", "all-linear", 4, 90, "0.033", 1),
    Published("gpt2-medium", "all-linear", 4, 256, "0.076", 2),
    Published("gpt2-large", "all-linear", 4, 350, "0.13", 2),
    Published("llama-2-7b", "all-linear", 4, 2048, "0.8", 3),
    Published("llama-2-13b", "all-linear", 6, 2048, "1.1", 3),
    Published("mistral-7b", "all-linear", 4, 2048, "0.65", 4),
    Published("gemma-7b", "all-linear", 4, 2048, "0.67", 4),
)


@dataclass(frozen=True)
class Count:
    """A published setting, counted.

    Attributes:
        published: the setting.
        rows: S.
        stated: h b + 1.5 S, the paper's formula.
        counted: float32 numbers that hold as many bytes as the bank, the indices (one byte each up to h 256,
            two above) and the weights.
        fits: float32 numbers a row that give the printed figure; None where none of `A_ROW` does.
    """

    published: Published
    rows: int
    stated: int
    counted: int
    fits: float | None

    @property
    def agrees(self) -> bool:
        """Whether the printed figure is the one counted here."""
        return _printed(self.counted, self.published.millions)


def count_published(published: Published) -> Count:
    """Count the rows of a published setting from its model's layers."""
    base = skeleton(published.model)
    linears = tuple(_as_counted(find_linears(base.model, published.targets)))
    rows = list(row_slices(linears, published.rank, LENGTH))[-1].stop
    bank = published.num_vectors * LENGTH
    index = 1 if published.num_vectors <= 256 else 2
    fitting = (each for each in A_ROW if _printed(bank + each * rows, published.millions))
    return Count(
        published,
        rows,
        stated=round(bank + 1.5 * rows),
        counted=round(bank + rows * (TOPK * index / 4 + TOPK - 1)),
        fits=next(fitting, None),
    )


def _as_counted(linears: tuple[Linear, ...]) -> Iterator[Linear]:
    """GPT-2 holds query, key and value in one layer; the paper counts three of d to d."""
    for linear in linears:
        if linear.name.endswith("attn.c_attn"):
            side = linear.in_features
            yield from (Linear(f"{linear.name}.{part}", side, side) for part in "qkv")
        else:
            yield linear


def _printed(count: float, millions: str) -> bool:
    """Whether a count is printed so, to as many places."""
    places = len(millions.partition(".")[2])
    return f"{count / 1e6:.{places}f}" == millions
