"""Open a site from its settings: read the data, deal it, load the base, put the adapter in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from fl_client.assembly import Texts, assemble, task_of
from fl_client.base import Base, find_device, find_model, load_base, longest_text
from fl_client.batches import Examples
from fl_client.held_out import deal_held_out
from fl_client.packed import pack, require_packable
from fl_client.partition import parse_partition, partition
from fl_client.settings import DataSettings, SiteSettings
from fl_client.site import Site
from fl_client.tables import Corpus, Table, load_corpus
from fl_client.tasks import UNCUT
from vblora.errors import ConfigError
from vblora.versions import installed_versions

__all__ = ["load_parts", "open_site", "prepare_texts"]

DOCSTRINGS = 4000
VERSIONED = ("fed-vblora", "flwr", "torch", "transformers", "datasets", "numpy")


@lru_cache(maxsize=1)
def open_site(settings: SiteSettings) -> Site:
    """Load data, base and adapter once for a process; later calls with equal settings return the same site.

    Raises:
        DataError, ModelError, ConfigError: what the settings name cannot be used.
    """
    texts, base = load_parts(settings)
    return assemble(settings, texts, base)


def load_parts(settings: SiteSettings) -> tuple[Texts, Base]:
    """Load what `assemble` puts together: the texts, and the base without an adapter.

    Raises:
        DataError, ModelError, ConfigError: as `open_site`.
    """
    find_model(settings.model)  # a misspelt name should not wait for the data to be read
    device = find_device(settings.device)
    corpus, parts = _dealt(settings.data)
    base = load_base(
        settings.model,
        corpus.labels,
        device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        seed=settings.data.seed,
    )
    return _tokenised(corpus, parts, base, settings.data), base


def prepare_texts(settings: SiteSettings) -> Texts:
    """Read, deal and tokenise the data as `open_site` does, for a machine without data libraries."""
    corpus, parts = _dealt(settings.data)
    base = load_base(settings.model, corpus.labels, torch.device("cpu"), seed=settings.data.seed)
    return _tokenised(corpus, parts, base, settings.data)


def _dealt(data: DataSettings) -> tuple[Corpus, list[NDArray[np.int64]]]:
    spec = parse_partition(data.partition)
    corpus = load_corpus(
        data.data,
        "classification" if data.task == "auto" and data.labels else data.task,
        text_column=data.text_column,
        label_column=data.label_column,
        group_column=spec.column,
        eval_split=data.eval_split,
        labels=data.label_names,
        max_examples=data.max_examples or (DOCSTRINGS if data.data == "docstrings" else 0),
        seed=data.seed,
    )
    return corpus, partition(corpus.train, data.partition, data.clients, data.seed)


def _tokenised(corpus: Corpus, parts: Sequence[NDArray[np.int64]], base: Base, data: DataSettings) -> Texts:
    task = task_of(corpus.labels)
    if data.chat_template == "off":
        base.tokenizer.chat_template = None
    packing = data.pack and not corpus.labels and corpus.train.completion is None
    most = UNCUT if packing else data.max_length
    train = task.encode(base.tokenizer, corpus.train, most)
    held_out = _sample(corpus.test, data.eval_examples, data.seed)
    test = task.encode(base.tokenizer, held_out, most)
    by_group = parse_partition(data.partition).kind == "by"
    own = deal_held_out(corpus.train, parts, held_out, data.seed, by_group=by_group)
    if packing:
        require_packable(base)
        train, parts = pack(train, parts, data.max_length)
        nobodys = np.setdiff1d(np.arange(len(test)), np.concatenate(own))
        test, (*own, _) = pack(test, [*own, nobodys], data.max_length)
    _require_fit(base, train, test)
    return Texts(train, tuple(parts), test, tuple(own), corpus.labels, _versions(corpus))


def _require_fit(base: Base, *parts: Examples) -> None:
    most, longest = longest_text(base.model), max(int(part.lengths.max(initial=0)) for part in parts)
    if most is not None and longest > most:
        raise ConfigError(f"--max-length: a text has {longest} tokens, the model reads {most}; use {most}")


def _sample(table: Table, count: int, seed: int) -> Table:
    """`count` rows drawn from the seed, in their order; all where count is 0."""
    if not count or count >= len(table):
        return table
    drawn = np.random.default_rng(seed).choice(len(table), count, replace=False)
    return table.take(np.sort(drawn).tolist())


def _versions(corpus: Corpus) -> dict[str, str]:
    found = {**installed_versions(VERSIONED), "torch": torch.__version__}
    return {**found, **{f"data:{name}": version for name, version in corpus.versions.items()}}
