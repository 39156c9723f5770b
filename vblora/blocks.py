"""Activation checkpointing: blocks of the base that keep their input alone and are computed twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vblora.errors import ModelError

__all__ = ["checkpoint_blocks"]


def checkpoint_blocks(base: nn.Module, names: Iterable[str]) -> list[str]:
    """Make the blocks that hold the named layers compute again, in the backward pass, what they would keep.

    A block is a member of the outermost `nn.ModuleList` above a layer, as a transformer's layers are. The
    switch of transformers works in training mode only, where dropout is on; this one works in any.

    Returns:
        Names of the blocks.

    Raises:
        ModelError: no layer is in a list of blocks.
    """
    blocks = list(dict.fromkeys(_blocks(base, names)))
    if not blocks:
        raise ModelError("--checkpointing: the base has no list of blocks (nn.ModuleList) around its layers")
    for name in blocks:
        block = base.get_submodule(name)
        block.forward = partial(_checkpointed, block.forward)
    return blocks


def _blocks(base: nn.Module, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            if isinstance(base.get_submodule(".".join(parts[:depth])), nn.ModuleList):
                yield ".".join(parts[: depth + 1])
                break


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Nothing is drawn at random: dropout is off.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
