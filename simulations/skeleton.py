"""A base model's layers from its config alone: no weights are read, none are made.

`simulations/shapes/` holds the configs of well-known models (sizes only), so that a plan needs no network.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fl_client.base import find_model, is_encoder
from vblora.errors import ModelError

__all__ = ["Skeleton", "known_models", "skeleton"]

TWO_CLASSES = 2  # of an encoder's head, where nobody says how many


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device: its layers have sizes and no numbers.

    Attributes:
        name: as it was asked for.
        model: with a classifier where there are classes, else for language modelling.
        classes: of the classifier; 0 without one.
    """

    name: str
    model: nn.Module
    classes: int

    @property
    def parameters(self) -> int:
        """Numbers of the base, tied ones once, a task head among them."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def known_models() -> list[str]:
    """Names of the models whose configs come along."""
    folder = resources.files("simulations").joinpath("shapes")
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir())


def skeleton(model: str, classes: int | None = None) -> Skeleton:
    """Build a model from its config.

    Args:
        model: a name of `known_models`, minilm, a config.json, a folder with one, or a hub id.
        classes: of a task head; 0 is language modelling. None is 2 for an encoder, else 0.

    Raises:
        ModelError: there is no config, or none that makes a model of that kind.
    """
    source = _source(model)
    try:
        config: Any = AutoConfig.from_pretrained(source)
    except Exception as error:  # the hub, the network and each config class raise their own
        raise ModelError(_unreadable(model, source, error)) from error
    encoder = is_encoder(config)
    count = classes if classes is not None else TWO_CLASSES if encoder else 0
    if encoder and not count:
        raise ModelError(f"--model: {model} is an encoder, which models no language; give --classes")
    kind = AutoModelForSequenceClassification if count else AutoModelForCausalLM
    try:
        if count:
            config.num_labels = count
        with torch.device("meta"):
            built: nn.Module = kind.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:
        what = "classifier" if count else "causal language model"
        raise ModelError(f"--model: the config of {model} makes no {what}: {_short(error)}") from error
    return Skeleton(model, built, count)


def _source(model: str) -> str:
    """A file, a folder or a hub id that transformers reads a config from."""
    name = model.lower()
    if name in known_models():
        return str(resources.files("simulations").joinpath("shapes", f"{name}.json"))
    path = Path(model).expanduser()
    if path.suffix == ".json" and not path.is_file():
        raise ModelError(
            f"--model: {model}: no such file; expected a config.json, a folder with one, or a hub id"
        )
    return str(path) if path.is_file() else find_model(model)


def _unreadable(model: str, source: str, error: Exception) -> str:
    if Path(source).exists():
        return f"--model: {model} is no config of a model: {_short(error)}"
    offline = " (offline: HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return (
        f"--model: no config of {model}{offline}; expected a config.json, a folder with one, a hub id, or "
        f"one of {', '.join(known_models())}"
    )


def _short(error: Exception) -> str:
    """Its kind and its beginning: some list every architecture there is."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{' ...' if len(text) > 200 else ''}"
