"""How near generated texts are to their references, as sums that add up over clients.

Exact match; ROUGE-L, the F-measure of the longest common subsequence of words (torchmetrics); BLEU's counts,
which make a corpus score once they are added (sacrebleu). Of several references the best counts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from vblora.errors import ConfigError

__all__ = ["require_libraries", "text_sums"]

LIBRARIES = ("sacrebleu", "torchmetrics")
ORDERS = 4  # n-grams of BLEU


def require_libraries() -> None:
    """See that the libraries of the scores are there.

    Raises:
        ConfigError: one is not.
    """
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--eval-generate: needs {' and '.join(missing)}, which is not installed; "
            "pip install 'fed-vblora[text-scores]'"
        )


def text_sums(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Sums over texts, by the names that a reply has.

    Args:
        texts: generated ones.
        references: of each text, one or more.

    Raises:
        ConfigError: a library is missing.
    """
    require_libraries()
    from sacrebleu.metrics.bleu import BLEU
    from torchmetrics.functional.text import rouge_score

    bleu = BLEU()
    counts = [0] * (2 * ORDERS + 2)
    exact, rouge = 0, 0.0
    for text, known in zip(texts, references, strict=True):
        exact += text.strip() in {reference.strip() for reference in known}
        rouge += float(
            rouge_score(text, [list(known)], accumulate="best", rouge_keys="rougeL")["rougeL_fmeasure"]
        )
        found = bleu.corpus_score([text], [[reference] for reference in known])
        told = [*found.counts, *found.totals, found.sys_len, found.ref_len]
        counts = [one + other for one, other in zip(counts, told, strict=True)]
    names = [f"{what}-{order}" for what in ("right", "ngrams") for order in range(1, ORDERS + 1)]
    sums = dict(zip([*names, "length", "reference-length"], counts, strict=True))
    return {
        "text-prompts": len(texts),
        "text-exact": exact,
        "text-rouge": rouge,
        **{f"text-bleu-{name}": count for name, count in sums.items()},
    }
