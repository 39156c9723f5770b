"""What people look at when a run has ended: the closing table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import ROUNDED
from rich.table import Table
from rich.text import Text

from fl_client.site import Site
from simulations.units import last_evaluations, size

__all__ = ["facts", "summary_table"]


def summary_table(summary: dict[str, Any], run: Path, more: Mapping[str, str] | None = None) -> Table:
    """The closing table of one run; `more` are rows that only who ran it can know."""
    score, sent = summary["score"], summary["bytes"]
    table = Table(box=ROUNDED, show_header=False)
    table.add_column()
    table.add_column(justify="right", overflow="fold")
    rows = {
        "adapter": summary["adapter"],
        "model": _short(summary["model"]),
        "data": _short(summary["data"]),
        f"{score['metric']} at the start": f"{score['start']:.4f}",
        f"{score['metric']} at the end": f"{score['final']:.4f}",
        f"best {score['metric']}": f"{score['best']:.4f}",
        f"{score['metric']}, mean of the {last_evaluations(score['averaged'])}": f"{score['last3']:.4f}",
        **_more_scores(score),
        "sent up, a client a round": size(sent["up_per_client_round"]),
        "   of it the task head": size(sent["head"]),
        "sent down, a client a round": size(sent["down_per_client_round"]),
        "sent in all, both directions": size(sent["up_total"] + sent["down_total"]),
        "numbers trained / sent": f"{summary['parameters']['trained']:,} / {summary['parameters']['sent']:,}",
        "replies rejected": str(summary["rejected"]),
        **({"clients dropped out": str(summary["dropped"])} if summary["dropped"] else {}),
        "seconds": f"{summary['seconds']:.0f}",
        **(more or {}),
        "run directory": str(run),
        "plot": str(run / "score.png"),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _more_scores(score: dict[str, Any]) -> dict[str, str]:
    """Of clients on their own texts, and of generated texts, where there are any."""
    rows = {}
    if "own_mean" in score:
        rows[f"own {score['metric']}, mean ± over clients"] = (
            f"{score['own_mean']:.4f} ± {score['own_std']:.4f}"
        )
    if texts := score.get("texts"):
        rows["exact match, ROUGE-L, BLEU"] = (
            f"{texts['exact_match']:.3f}, {texts['rouge_l']:.3f}, {texts['bleu']:.1f}"
        )
    return rows


def facts(site: Site, config: Mapping[str, Any]) -> dict[str, str]:
    """What is about to be trained, and the sizes that were chosen."""
    blueprint, spec = site.blueprint, site.blueprint.spec
    least, most = min(map(len, site.parts)), max(map(len, site.parts))
    letters = {"num_vectors": "h", "vector_length": "b", "topk": "k", "theta_length": "d"}
    given = {letter: getattr(spec, name, None) for name, letter in letters.items()}
    sizes = ", ".join([f"rank {spec.rank}", *(f"{name} {size}" for name, size in given.items() if size)])
    return {
        "model": f"{config['model']} on {site.model.device}",
        "data": f"{config['data']}: {len(site.train):,} {site.train.unit}, {len(site.test):,} held out"
        + (f", {len(blueprint.labels)} labels" if blueprint.labels else ""),
        "clients": f"{len(site.parts)}, with {least:,} to {most:,} each; "
        f"{config['clients-per-round']} a round",
        "adapter": f"{spec.kind}, {sizes}: {blueprint.rows:,} rows in {len(blueprint.linears)} layers",
        "numbers": f"{blueprint.trained_parameters:,} trained, {blueprint.stored_parameters:,} sent "
        f"({blueprint.head_size:,} of them the head)",
    }


def _short(name: str) -> str:
    """The last part of a path; hub ids, OWNER/NAME, stay whole."""
    return Path(name).name if name.count("/") > 1 else name
