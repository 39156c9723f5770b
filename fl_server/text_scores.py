"""Scores of generated texts, from sums that clients send: see `fl_client.text_scores`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping

from fl_server.exchange import Reply, client_order
from vblora.errors import RunError, UpdateError

__all__ = ["read_text_sums", "require_library", "text_scores"]

Sums = Mapping[str, float]

COUNTS = [f"text-bleu-{what}-{order}" for what in ("right", "ngrams") for order in range(1, 5)]
LENGTHS = ["text-bleu-length", "text-bleu-reference-length"]
SHARES = ["text-exact", "text-rouge"]  # at most 1 of each prompt
NAMES = ["text-prompts", *SHARES, *COUNTS, *LENGTHS]


def require_library() -> None:
    """See that sums can be made into scores here.

    Raises:
        RunError: a library is missing.
    """
    if importlib.util.find_spec("sacrebleu") is None:
        raise RunError(
            "eval-generate: needs sacrebleu, which is not installed; pip install 'fed-vblora[text-scores]'"
        )


def read_text_sums(reply: Reply) -> Sums:
    """The sums in a reply.

    Raises:
        UpdateError: one is missing, or cannot be.
    """
    told = {name: float(reply.metrics.get(name, math.nan)) for name in NAMES}
    wrong = [name for name, value in told.items() if not 0 <= value < 1 << 53]
    wrong += [name for name in SHARES if told[name] > told["text-prompts"]]
    if wrong:
        why = reply.text or f"sums of generated texts lack or misstate {', '.join(wrong):.200}"
        raise UpdateError(f"evaluation: {why}")
    return told


def text_scores(told: Mapping[str, Sums]) -> dict[str, float]:
    """Scores from the sums of clients, added in the order of their names; empty where nothing was generated.

    `prompts` answered; shares from 0 to 1 for `exact_match` and `rouge_l`; `bleu` from 0 to 100, as usual.
    """
    from sacrebleu.metrics.bleu import BLEU

    parts = [told[name] for name in sorted(told, key=client_order)]
    sums = {name: sum(part[name] for part in parts) for name in NAMES}
    prompts = sums["text-prompts"]
    if not prompts:
        return {}
    counts = [int(sums[name]) for name in COUNTS]
    length, known = (int(sums[name]) for name in LENGTHS)
    bleu = BLEU.compute_bleu(counts[:4], counts[4:], length, known, smooth_method="exp").score
    return {
        "prompts": int(prompts),
        "exact_match": sums["text-exact"] / prompts,
        "rouge_l": sums["text-rouge"] / prompts,
        "bleu": bleu,
    }
