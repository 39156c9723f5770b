"""How mixed a client's labels are, and so how much of a shared model it can teach.

What sets classes apart cannot be learned from texts of one class; a client with little else teaches a shared
head its own class, and Adam, which knows no size of a gradient, lets it do so as fast as any other. Slowed,
it still counts in the mean with all its texts, and so holds the others back as well.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["label_mixture"]


def label_mixture(targets: NDArray[np.int64], classes: int) -> float:
    """Chance that two of a client's texts differ in their label, over the chance where labels are even.

    0 for texts of one label, 1 for labels that are equally frequent: (1 - sum p^2) / (1 - 1/L).

    Args:
        targets: (n,) int64, the label of each text; at least one.
        classes: L, at least 2.
    """
    shares = np.bincount(targets, minlength=classes) / len(targets)
    return float((1 - np.square(shares).sum()) / (1 - 1 / classes))
