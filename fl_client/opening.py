"""Open a site from its settings: read the data, deal it, load the base, put the adapter in place."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import lru_cache

import numpy as np
import torch

from fl_client.base import find_device, load_base, longest_text
from fl_client.batches import Examples
from fl_client.cohort import CohortSizer
from fl_client.partition import parse_partition, partition
from fl_client.settings import SiteSettings
from fl_client.site import Site
from fl_client.tables import Corpus, Table, load_corpus
from fl_client.tasks import CausalLM, Classification, Task
from vblora.model import AdaptedModel, describe_base, find_head, find_linears
from vblora.spec import Blueprint

__all__ = ["open_site"]

DOCSTRINGS = 4000
VERSIONED = ("fed-vblora", "flwr", "torch", "transformers", "datasets", "numpy")


@lru_cache(maxsize=1)
def open_site(settings: SiteSettings) -> Site:
    """Load data, base and adapter once for a process; later calls with equal settings return the same site.

    Raises:
        DataError, ModelError, ConfigError: what the settings name cannot be used.
    """
    data = settings.data
    spec = parse_partition(data.partition)
    corpus = load_corpus(
        data.data,
        data.task,
        text_column=data.text_column,
        label_column=data.label_column,
        group_column=spec.column,
        eval_split=data.eval_split,
        max_examples=data.max_examples or (DOCSTRINGS if data.data == "docstrings" else 0),
        seed=data.seed,
    )
    parts = partition(corpus.train, data.partition, data.clients, data.seed)
    task: Task = Classification(corpus.labels) if corpus.labels else CausalLM()
    device = find_device(settings.device)
    base = load_base(settings.model, corpus.labels, device, dtype=settings.dtype, seed=data.seed)
    linears = find_linears(base.model, settings.adapter.target_modules)
    blueprint = Blueprint(
        spec=settings.adapter.spec(linears, data.seed),
        linears=linears,
        head=find_head(base.model),
        model=describe_base(base.model),
        labels=corpus.labels,
    )
    return Site(
        settings=settings,
        model=AdaptedModel(base.model, blueprint),
        task=task,
        train=task.encode(base.tokenizer, corpus.train, data.max_length),
        parts=tuple(parts),
        test=task.encode(
            base.tokenizer, _sample(corpus.test, data.eval_examples, data.seed), data.max_length
        ),
        pad=base.pad,
        sizer=CohortSizer(device, settings.cohort),
        versions=_versions(corpus),
    )


def _sample(table: Table, count: int, seed: int) -> Table:
    """`count` rows drawn from the seed, in their order; all where count is 0."""
    if not count or count >= len(table):
        return table
    drawn = np.random.default_rng(seed).choice(len(table), count, replace=False)
    return table.take(np.sort(drawn).tolist())


def _versions(corpus: Corpus) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    return {**found, **{f"data:{name}": version for name, version in corpus.versions.items()}}
