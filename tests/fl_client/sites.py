"""Sites over tiny random models, with clients that differ: no data libraries, no tokenizer."""

from __future__ import annotations

import numpy as np

from fl_client.assembly import Texts, assemble
from fl_client.base import Base
from fl_client.batches import Examples
from fl_client.hazards import HazardSettings
from fl_client.settings import AdapterSettings, DataSettings, SiteSettings
from fl_client.site import Site
from fl_client.train import LocalSettings
from tests.vblora.tiny import LABELS, VOCABULARY, make_base


def make_site(
    clients: int, *, family: str = "bert", dropout: float = 0.0, stragglers: float = 0.0, seed: int = 0
) -> Site:
    """Client n holds n + 1 texts of 2 to 12 tokens, so the first fill no batch. In float64."""
    counts = np.arange(1, clients + 1)
    labels = LABELS if family != "llama" else ()
    settings = SiteSettings(
        device="cpu",
        data=DataSettings(clients=clients, seed=seed),
        adapter=AdapterSettings(num_vectors=40, vector_length=16),
        local=LocalSettings(steps=4, batch_size=3, label_mix=False),  # a few texts are of one label
        hazards=HazardSettings(dropout, stragglers),
    )
    ends = np.cumsum(counts)
    parts = tuple(np.arange(end - count, end) for end, count in zip(ends, counts, strict=True))
    train, test = make_examples(int(ends[-1]), 1, bool(labels)), make_examples(20, 2, bool(labels))
    own = tuple(np.arange(20)[client::clients] for client in range(clients))
    texts = Texts(train, parts, test, own, labels, {})
    return assemble(settings, texts, Base(make_base(family, layers=1).double(), None, 0))


def make_examples(count: int, seed: int, classes: bool) -> Examples:
    """Texts of 2 to 12 tokens; without classes a prompt of up to two tokens."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(rng.integers(2, 13, count))]).astype(np.int64)
    tokens = rng.integers(3, VOCABULARY, starts[-1]).astype(np.int32)
    return Examples(tokens, starts, rng.integers(0, len(LABELS) if classes else 2, count))
