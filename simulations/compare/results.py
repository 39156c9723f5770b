"""What runs gave, by adapter: from summaries and histories to the rows of a comparison. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from simulations.compare.scores import (
    Interval,
    Reached,
    Spread,
    bytes_to_target,
    is_reached,
    paired,
    reached,
    spread,
    target_of,
)
from simulations.units import last_evaluations

__all__ = [
    "FLOAT32",
    "SHARES",
    "Comparison",
    "Result",
    "Row",
    "as_json",
    "compared",
    "mean_curve",
    "result_of",
    "trace",
]

FLOAT32 = " float32"  # after the name of an adapter whose messages are not rounded
SHARES = (0.95, 0.98, 1.0)  # of the baseline's score, to which bytes are counted
CLOSE = 0.005  # below the baseline's accuracy, to which they are counted too


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        seed: of everything in it.
        start, final, best, last3: scores; last3 is the mean of the last three evaluations of trained states.
        curve: (round, bytes so far, score) of each evaluation; bytes of training messages in both directions,
            all clients.
        up, down: bytes a client a round, on average.
        total: bytes in both directions, all clients, all rounds.
        sections: bytes up a client a round by section of the blob, "frame" the rest.
        trained, sent: numbers.
        seconds: of all rounds.
        averaged: evaluations that last3 is the mean of, where there were fewer than three.
        memory, gpu: bytes of main and GPU memory at most; 0 where nobody looked.
        more: other scores by name, where they were asked for: clients' own, and those of answers.
    """

    seed: int
    start: float
    final: float
    best: float
    last3: float
    curve: tuple[tuple[int, int, float], ...]
    up: float
    down: float
    total: int
    sections: Mapping[str, float]
    trained: int
    sent: int
    seconds: float
    averaged: int = 3
    memory: int = 0
    gpu: int = 0
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def by_bytes(self) -> list[tuple[float, float]]:
        """(bytes so far, score) of each evaluation of a trained state."""
        return [(sent, score) for number, sent, score in self.curve if number]


@dataclass(frozen=True)
class Row:
    """One adapter over seeds.

    Attributes:
        name: of the adapter, or of the setting.
        results: by seed, rising.
        score, best: of last3 and of the best evaluation.
        difference: last3 minus the baseline's, by seed; None of the baseline, and where no seed is shared.
        fewer: the baseline's bytes over this one's.
        targets: what it took to come to each of `SHARES` of the baseline's last3 of the same seed. A seed
            whose baseline was there before any training gives no bytes.
        close: what it took to come within `CLOSE` of it, alike; None of a loss.
    """

    name: str
    results: tuple[Result, ...]
    score: Spread
    best: Spread
    difference: Interval | None
    fewer: float | None
    targets: Mapping[float, Reached]
    close: Reached | None

    def mean(self, field: str) -> float:
        """Mean of a number of the results."""
        values = [float(getattr(result, field)) for result in self.results]
        return sum(values) / len(values)

    @property
    def sections(self) -> dict[str, float]:
        """Mean bytes up a client a round, by section."""
        names = dict.fromkeys(name for result in self.results for name in result.sections)
        count = len(self.results)
        return {name: sum(result.sections.get(name, 0) for result in self.results) / count for name in names}


@dataclass(frozen=True)
class Comparison:
    """All adapters of one protocol.

    Attributes:
        metric: name of the score.
        higher_is_better: what is good of it.
        baseline: name of the row that the others are compared with; "" for none.
        rows: the baseline first, then as they were named.
    """

    metric: str
    higher_is_better: bool
    baseline: str
    rows: tuple[Row, ...]

    @property
    def seeds(self) -> int:
        """Of the row that has most."""
        return max(len(row.results) for row in self.rows)

    @property
    def averaged(self) -> str:
        """Of which evaluations scores are means, as "last three"."""
        return last_evaluations(max(result.averaged for row in self.rows for result in row.results))


def trace(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a comparison needs of a history and a summary does not hold: `curve` and `sections`."""
    total, curve = 0, []
    sums: dict[str, int] = {}
    replies = 0
    for record in records:
        total += record["bytes"]["up"] + record["bytes"]["down"]
        if record["score"] is not None:
            curve.append((record["round"], total, record["score"]))
        if record["round"]:
            replies += record["replies"]
            for name, count in record["bytes"]["up_sections"].items():
                sums[name] = sums.get(name, 0) + count
    return {"curve": curve, "sections": {name: count / max(1, replies) for name, count in sums.items()}}


def result_of(summary: Mapping[str, Any], traced: Mapping[str, Any], **measured: int) -> Result:
    """One run from its `summary.json` and its `trace`; `measured` may hold `memory` and `gpu`."""
    score, sent = summary["score"], summary["bytes"]
    return Result(
        seed=summary["seed"],
        start=score["start"],
        final=score["final"],
        best=score["best"],
        last3=score["last3"],
        curve=tuple((int(number), int(total), float(value)) for number, total, value in traced["curve"]),
        up=sent["up_per_client_round"],
        down=sent["down_per_client_round"],
        total=sent["up_total"] + sent["down_total"],
        sections=dict(traced["sections"]),
        trained=summary["parameters"]["trained"],
        sent=summary["parameters"]["sent"],
        seconds=summary["seconds"],
        averaged=score.get("averaged", 3),
        more=_more(score),
        **measured,
    )


def _more(score: Mapping[str, Any]) -> dict[str, float]:
    texts = score.get("texts", {})
    named = {
        "own, last three": score.get("own_last3"),
        "spread among clients": score.get("own_std"),
        "exact match": texts.get("exact_match"),
        "BLEU": texts.get("bleu"),
        "ROUGE-L": texts.get("rouge_l"),
    }
    return {name: float(value) for name, value in named.items() if value is not None}


def compared(groups: Mapping[str, Sequence[Result]], baseline: str, metric: str) -> Comparison:
    """Compare groups of runs, one group an adapter, with the runs of one of them, seed by seed."""
    higher = metric != "loss"
    theirs = {result.seed: result for result in groups.get(baseline, ())}
    goals = _last3(theirs)
    starts = {seed: result.start for seed, result in theirs.items()}
    targets = {
        share: {seed: target_of(score, share, higher) for seed, score in goals.items()} for share in SHARES
    }
    close = {seed: score - CLOSE for seed, score in goals.items()}
    names = [baseline] * (baseline in groups) + [name for name in groups if name != baseline]
    rows = []
    for name in names:
        results = tuple(sorted(groups[name], key=lambda result: result.seed))
        ours = {result.seed: result for result in results}
        difference = None
        if name != baseline:
            difference = paired(_last3(ours), goals)
        shared = [result for result in results if result.seed in theirs]
        rows.append(
            Row(
                name,
                results,
                score=spread([result.last3 for result in results]),
                best=spread([result.best for result in results]),
                difference=difference,
                fewer=_fewer(results, list(theirs.values())),
                targets={share: _reached(shared, targets[share], starts, higher) for share in SHARES},
                close=_reached(shared, close, starts, higher) if higher else None,
            )
        )
    return Comparison(metric, higher, baseline if theirs else "", tuple(rows))


def mean_curve(row: Row) -> list[tuple[int, float, list[float]]]:
    """(round, mean bytes so far, scores by seed) at every round that all seeds were evaluated at."""
    curves = [{number: (sent, score) for number, sent, score in result.curve} for result in row.results]
    rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [
        (
            number,
            sum(curve[number][0] for curve in curves) / len(curves),
            [curve[number][1] for curve in curves],
        )
        for number in rounds
    ]


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as `comparison.json` holds it."""
    whole = asdict(comparison)
    whole["adapters"] = {
        row.name: {
            **{
                key: value
                for key, value in made.items()
                if key not in ("name", "results", "targets", "close")
            },
            "sections": row.sections,
            "bytes_to_target": {f"{share:g}": asdict(found) for share, found in row.targets.items()},
            "bytes_to_within_half_a_point": made["close"],
            "runs": made["results"],
        }
        for row, made in zip(comparison.rows, whole.pop("rows"), strict=True)
    }
    return whole


def _last3(results: Mapping[int, Result]) -> dict[int, float]:
    return {seed: result.last3 for seed, result in results.items()}


def _fewer(ours: Sequence[Result], theirs: Sequence[Result]) -> float | None:
    """Mean bytes of theirs over ours."""
    sent = sum(result.total for result in ours) / len(ours)
    return sum(result.total for result in theirs) / len(theirs) / sent if theirs and sent else None


def _reached(
    results: Sequence[Result], goals: Mapping[int, float], starts: Mapping[int, float], higher: bool
) -> Reached:
    """Sum up what it took to come to the goal of each seed, of those where the baseline's start, `starts`,
    fell short of it."""
    short = [one for one in results if not is_reached(starts[one.seed], goals[one.seed], higher)]
    taken = [bytes_to_target(one.by_bytes, goals[one.seed], higher) for one in short]
    return reached(taken, at_start=len(results) - len(short))
