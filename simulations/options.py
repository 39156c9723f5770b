"""The options of a run on the command line, declared once: every command that starts runs takes them."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click.core import ParameterSource
from rich.markup import escape

if TYPE_CHECKING:  # it needs torch, which takes seconds to import
    from simulations.config import Config

__all__ = ["RUN_OPTIONS", "command_line", "config_of", "run_options", "typed"]

Command = Callable[..., None]

# By panel: key of the config, default, help. A default of None is chosen from the model, 0 in a config.
RUN_OPTIONS: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "Data": {
        "model": ("minilm", "Base model: minilm (the demo's), a hub id, or a local folder."),
        "data": (
            "docstrings",
            "docstrings (text of this machine's Python libraries), a csv/tsv/json/jsonl/parquet file, "
            "a folder with train/dev/test files, or a hub data set id.",
        ),
        "task": ("auto", "classification, causal-lm, or auto: what the columns suggest."),
        "text-column": ("", "Column of the text, if not a usual name."),
        "label-column": ("", "Column of the label, if not a usual name."),
        "labels": ("", "All classes by comma, where the data lacks some."),
        "eval-split": (
            "",
            "Held-out files to score on: dev, test, dev+test; train is a tenth of the training texts.",
        ),
        "max-examples": (0, "Training texts at most; 0 is all, or 4,000 docstrings."),
        "max-length": (128, "Tokens of a text at most."),
        "pack": (True, "Pack plain text for causal-lm into full rows, texts kept apart."),
        "chat-template": (
            "auto",
            "auto: prompts and completions as the tokenizer's chat template writes them, if it has one; off.",
        ),
        "partition": (
            "auto",
            "How texts are dealt: iid, dirichlet:ALPHA (less is more skewed), by:COLUMN; "
            "auto is dirichlet:0.5 where there are labels or groups, else iid.",
        ),
    },
    "Federation": {
        "clients": (10, "Virtual clients."),
        "clients-per-round": (5, "Drawn each round."),
        "rounds": (10, "Rounds of training."),
        "eval-every": (1, "Rounds between evaluations."),
        "eval-examples": (0, "Held-out texts to score on at most; 0 is all."),
        "eval-generate": (
            0,
            "Held-out prompts to answer at the end, for exact match, ROUGE-L and BLEU; "
            "needs fed-vblora[text-scores].",
        ),
        "own-scores": (
            False,
            "Score each client on held-out texts of its own, too; always done with --personal.",
        ),
        "dropout": (0.0, "Chance that a drawn client fails, and says so."),
        "stragglers": (0.0, "Chance that one is stopped early."),
        "late-clients": (0, "The last so many clients come only after --freeze-bank."),
    },
    "Adapter": {
        "adapter": ("vblora", "vblora, lora, ffa-lora, lora-xs, uni-lora or bank-only."),
        "rank": (None, "r; else 4, 8 (lora, ffa-lora) or 16 (lora-xs)."),
        "num-vectors": (None, "h, vectors in the bank; else by model size."),
        "vector-length": (None, "b, length of a vector; else one that divides."),
        "topk": (2, "k, vectors mixed into a row."),
        "target-modules": ("all-linear", "all-linear, or layer names such as query,value."),
        "alpha": (0.0, "Of lora and ffa-lora; 0 is twice the rank."),
        "theta-length": (None, "d, numbers that uni-lora trains; else by model size."),
        "start": ("", "Go on from an adapter: a folder that PEFT saved (LoRA, VB-LoRA), or a finished run."),
    },
    "Training": {
        "local-steps": (10, "Steps of a client in a round."),
        "batch-size": (16, "Texts a step."),
        "accumulate": (1, "Pieces that a step's texts are passed in: less memory, the same step."),
        "lr-bank": (8e-3, "Learning rate of the bank; a step of a rank above 4 goes further."),
        "lr-logits": (3e-2, "Learning rate of the logits."),
        "lr-rows": (0.0, "Learning rate of the kinds without a bank; 0 is the kind's own."),
        "lr-head": (4e-2, "Learning rate of the head."),
        "warmup": (0.25, "Share of a client's steps to warm up over."),
        "clip-norm": (0.0, "Largest gradient norm; 0 is off."),
        "weight-decay": (0.0, "Of AdamW; none with a bank."),
        "prox": (0.0, "FedProx: pull of a client to where it started."),
        "label-mix": (True, "Slow clients whose labels are not mixed: one with a single label teaches none."),
        "logits-every": (1, "Rounds from one that trains logits to the next; others train the bank alone."),
        "logit-mean": ("weights", "What is averaged of the selections: mixture weights, or logits."),
        "server-optimizer": ("mean", "What the server makes of a round's mean change: mean, momentum, adam."),
        "server-rate": (1.0, "Scale of the server's step."),
        "server-decay": (0.9, "Of what momentum and adam remember of earlier rounds."),
        "personal": ("none", "What stays with each client, never sent: none, head, logits, or head,logits."),
        "freeze-bank": (0, "Last round that trains the bank; then clients train what is left. 0 is never."),
        "clip-updates": (0.0, "Times the round's median that an update may reach; 0 is off."),
        "schedule": ("cosine", "Rates over rounds: cosine, root or constant."),
        "warmup-rounds": (0, "Rounds of warm-up."),
    },
    "Wire": {
        "wire": (
            "default",
            "How messages are rounded: lossless, default or smallest; the options below replace parts, "
            "and 0 or auto leaves a part as it is.",
        ),
        "wire-up-bits": (0.0, "Bits of a number going up: 0.5 to 12, 16 (bfloat16), 32 (float32)."),
        "wire-head-bits": (0.0, "The same, of the task head."),
        "wire-gap-bits": (0.0, "Bits of a gap between two logits going up: 1 to 6, or 32."),
        "wire-down-bits": (0.0, "Bits of a number's change going down: 0.5 to 12, or 32."),
        "wire-keep": (0.0, "Share of the largest numbers that go up."),
        "wire-feedback": ("auto", "Clients add what rounding dropped to their next update: on, off, auto."),
        "wire-stochastic": ("auto", "Clients round up or down by chance: on, off, auto."),
        "wire-trellis": ("auto", "Clients round along a trellis, smaller and slower: on, off, auto."),
    },
    "Run": {
        "seed": (0, "Of everything drawn at random."),
        "device": ("auto", "auto, cpu, cuda, cuda:1, ..."),
        "dtype": ("auto", "Of the base: auto, own (the files'), float32, bfloat16, float16."),
        "quantize": ("none", "Of the base's linear layers: none, 4bit (NF4), 8bit; needs bitsandbytes."),
        "cohort": (0, "Clients trained in one forward; 0 chooses."),
        "recompute": (False, "Keep no inputs of adapted layers that are cheap to make again: less memory."),
        "checkpointing": (False, "Compute each block of the base twice: much less memory, a third slower."),
        "cuda-graphs": (False, "Replay each step as one CUDA graph: faster where batches are small."),
        "fused-norms": (True, "On a GPU, norms in one kernel: 16-bit outputs differ in their last bit."),
        "workers": (0, "Processes; 0 is one a GPU."),
    },
}
LEAST = {
    "rank": 1,
    "num-vectors": 1,
    "vector-length": 1,
    "theta-length": 1,
    "workers": 0,
}  # told apart by the parser


def run_options(
    panels: Collection[str] = tuple(RUN_OPTIONS), *, without: Collection[str] = ()
) -> Callable[[Command], Command]:
    """Give a command the options of a run, in place of its `**given`; they come right after its context.

    Args:
        panels: of the options that it takes.
        without: keys that it has no use for.
    """
    shared = [
        _parameter(key, default, text, panel)
        for panel, options in RUN_OPTIONS.items()
        for key, (default, text) in options.items()
        if panel in panels and key not in without
    ]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        context, *own = (part for part in signature.parameters.values() if part.kind is not part.VAR_KEYWORD)
        named = [part.replace(kind=part.KEYWORD_ONLY) for part in own]
        whole = signature.replace(parameters=[context, *shared, *named])
        command.__signature__ = whole  # type: ignore[attr-defined]
        return command

    return decorate


def config_of(given: Mapping[str, Any]) -> Config:
    """Options as keys of a config; what is to be chosen is left out."""
    return {name.replace("_", "-"): value for name, value in given.items() if value is not None}


def command_line(context: typer.Context) -> str:
    """The command with the options that were typed, as a shell takes it."""
    words = ["fedvb", str(context.info_name)]
    for name, value in typed(context).items():
        switch = f"--{name}" if value is True else f"--no-{name}"
        words += [switch] if isinstance(value, bool) else [f"--{name}", str(value)]
    return shlex.join(words)


def typed(context: typer.Context) -> dict[str, Any]:
    """The options that were given on the command line, by config key."""
    return {
        name.replace("_", "-"): value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def _parameter(key: str, default: Any, text: str, panel: str) -> inspect.Parameter:
    told: dict[str, Any] = {"help": escape(text), "rich_help_panel": panel}
    if key in LEAST:
        told |= {"min": LEAST[key], "metavar": "INTEGER"}
    option: Any = typer.Option(**told)
    kind: Any = int | None if default is None else type(default)
    return inspect.Parameter(
        key.replace("-", "_"),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )
