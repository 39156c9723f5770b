"""Put a site together from texts that are already tokenised and dealt: no data libraries needed.

`Texts` can be saved, so that a machine with a GPU and little else trains what another one prepared.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fl_client.base import Base, longest_text
from fl_client.batches import Examples
from fl_client.cohort import CohortSizer
from fl_client.graphs import Graphs
from fl_client.memory import Memory
from fl_client.settings import AdapterSettings, SiteSettings
from fl_client.site import Site
from fl_client.tasks import CausalLM, Classification, Task
from vblora.blocks import checkpoint_blocks
from vblora.errors import ConfigError, DataError
from vblora.files import write_atomic
from vblora.imports import read_start
from vblora.model import AdaptedModel, adaptable_linears, describe_base, find_head, find_linears
from vblora.norms import fuse_norms
from vblora.spec import Blueprint

__all__ = ["Texts", "assemble", "load_texts", "make_blueprint", "save_texts", "task_of"]

log = logging.getLogger(__name__)

AT_ONCE = 32  # clients scored in one forward on a GPU; its tokens are bounded, however many they are


@dataclass(frozen=True)
class Texts:
    """What a site trains and is scored on.

    Attributes:
        train: training examples of all clients.
        parts: rows of `train` by client.
        test: held-out examples.
        own: rows of `test` by client, for its own score; maybe none.
        labels: class names by index; empty for language modelling.
        versions: of whatever the texts depend on.
    """

    train: Examples
    parts: tuple[NDArray[np.int64], ...]
    test: Examples
    own: tuple[NDArray[np.int64], ...]
    labels: tuple[str, ...]
    versions: Mapping[str, str]


def task_of(labels: tuple[str, ...]) -> Task:
    """Classification where there are labels, else language modelling."""
    return Classification(labels) if labels else CausalLM()


def assemble(settings: SiteSettings, texts: Texts, base: Base) -> Site:
    """Put the adapter into the base and the texts beside it.

    Raises:
        ModelError, ConfigError, StartError: the adapter does not fit the base.
    """
    blueprint, compute = make_blueprint(settings, texts.labels, base.model), settings.compute
    settings.personal.check(blueprint)  # before the base is changed
    on_gpu = next(base.model.parameters()).device.type == "cuda"
    if compute.cuda_graphs and not on_gpu:
        raise ConfigError("--cuda-graphs: the base is on a CPU; graphs are for GPUs")
    if compute.checkpointing:
        checkpoint_blocks(base.model, [linear.name for linear in blueprint.linears])
    if compute.fused_norms and on_gpu:
        fuse_norms(base.model)
    model = AdaptedModel(base.model, blueprint, recompute=compute.recompute)
    site = Site(
        settings=settings,
        model=model,
        task=task_of(texts.labels),
        train=texts.train,
        parts=texts.parts,
        test=texts.test,
        own=texts.own,
        tokenizer=base.tokenizer,
        pad=base.pad,
        sizer=CohortSizer(model.device, settings.cohort),
        scorer=CohortSizer(model.device, settings.cohort or (AT_ONCE if model.device.type == "cuda" else 0)),
        versions=dict(texts.versions),
        graphs=Graphs(longest_text(base.model)) if compute.cuda_graphs else None,
        memory=Memory(Path(settings.state) if settings.state else None),
        salt=zlib.crc32(texts.train.tokens.tobytes()) if len(texts.parts) == 1 else 0,
    )
    _tell_of_one_label(site)
    return site


def _tell_of_one_label(site: Site) -> None:
    if (
        current_process().daemon
    ):  # a helper's: the process that it helps has the same clients, and tells of them
        return
    clients = len(site.parts)
    if still := sum(not site.pace(client) for client in range(clients)):
        log.warning(
            "%d of %d clients have texts of one label only; they teach a shared head nothing (label-mix)",
            still,
            clients,
        )


def make_blueprint(settings: SiteSettings, labels: tuple[str, ...], base: nn.Module) -> Blueprint:
    """What a site's settings and its base mean.

    Raises:
        ModelError, ConfigError, StartError: the adapter does not fit the base.
    """
    seed, found = settings.data.seed, None
    if settings.start:
        found = read_start(Path(settings.start), seed)
        spec = settings.adapter.require(found, _chosen(settings.adapter, base))
        linears = tuple(linear for linear in adaptable_linears(base) if linear.name in found.layers)
    else:
        linears = find_linears(base, settings.adapter.target_modules)
        spec = settings.adapter.spec(linears, seed)
    blueprint = Blueprint(spec, linears, find_head(base), describe_base(base), labels)
    return blueprint if found is None else found.started(blueprint)


def _chosen(adapter: AdapterSettings, base: nn.Module) -> frozenset[str]:
    """Names of the layers that were asked for by name; none where no one asked."""
    if adapter.target_modules == AdapterSettings.target_modules:
        return frozenset()
    return frozenset(linear.name for linear in find_linears(base, adapter.target_modules))


def save_texts(path: Path, texts: Texts) -> None:
    """Write texts as one npz file, atomically."""
    arrays: dict[str, Any] = {}
    for name, examples in (("train", texts.train), ("test", texts.test)):
        arrays |= {f"{name}_{key}": getattr(examples, key) for key in ("tokens", "starts", "targets")}
        optional = {"begins": examples.begins, "prompts": examples.prompts}
        arrays |= {f"{name}_{key}": array for key, array in optional.items() if array is not None}
    for name, dealt in (("part", texts.parts), ("own", texts.own)):
        arrays[f"{name}_ends"] = np.cumsum([len(part) for part in dealt])
        arrays[f"{name}_rows"] = np.concatenate(dealt)
    arrays["about"] = np.array(json.dumps({"labels": texts.labels, "versions": dict(texts.versions)}))
    buffer = BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def load_texts(path: Path) -> Texts:
    """Read what `save_texts` wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            train, test = (
                Examples(
                    arrays[f"{name}_tokens"],
                    arrays[f"{name}_starts"],
                    arrays[f"{name}_targets"],
                    arrays.get(f"{name}_begins"),
                    arrays.get(f"{name}_prompts"),
                )
                for name in ("train", "test")
            )
            parts, own = (
                tuple(np.split(arrays[f"{name}_rows"], arrays[f"{name}_ends"][:-1]))
                for name in ("part", "own")
            )
            about = json.loads(str(arrays["about"]))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a file of prepared texts ({error})") from error
    return Texts(train, parts, test, own, tuple(about["labels"]), about["versions"])
