"""One client that tries to wreck the bank: a task's score without it, with it, and with updates cut back.

In every round the first of the clients sends the opposite of what it has learned, `STRETCH` times as long,
and says that it has learned from as many texts as the server believes. All clients train in every round.
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from fl_client.opening import open_site
from fl_client.serve import Answer, Question, answer
from fl_client.settings import SiteSettings
from fl_client.site import Site
from fl_server.aggregate import MAX_EXAMPLES
from fl_server.observer import LogObserver
from fl_server.rounds import run_rounds
from fl_server.settings import ServerSettings
from simulations.bench.tables import print_table
from simulations.direct import DirectExchange
from vblora.errors import RunError
from vblora.frame import read_blob
from vblora.wire import decode_update, encode_update

__all__ = ["Row", "measure", "poisoned", "run"]

STRETCH = 100.0
POISONER = 0
Answers = Callable[[Sequence[Question]], Iterable[Answer]]


@dataclass(frozen=True)
class Row:
    """One run: whether one client lies, the factor of `clip-updates`, its scores and how often it was cut."""

    poisoned: bool
    factor: float
    start: float
    final: float
    cut: int


def run(config: Mapping[str, Any], factors: Sequence[float]) -> list[Row]:
    """Train once for each factor (0 cuts nothing), with and without the liar; print the scores."""
    logging.getLogger("fl_server").setLevel(logging.ERROR)
    site = open_site(SiteSettings.from_run_config(config))
    rows = []
    for lies, factor in product((False, True), factors):
        rows.append(measure(site, config, factor, lies))
        print(f"{len(rows)} of {2 * len(factors)} runs: {rows[-1].final:.3f}", file=sys.stderr, flush=True)
    columns: dict[str, Callable[[Any], str]] = {
        "client 1": lambda row: "lies" if row.poisoned else "honest",
        "clip-updates": lambda row: f"{row.factor:g}" if row.factor else "off",
        "start": lambda row: f"{row.start:.3f}",
        "final": lambda row: f"{row.final:.3f}",
        "its updates cut": lambda row: str(row.cut),
    }
    print_table(f"{config['data']}: {site.task.metric} with one of {len(site.parts)} lying", rows, columns)
    return rows


def measure(site: Site, config: Mapping[str, Any], factor: float, lies: bool) -> Row:
    """One run in this process."""
    site.memory.open("")
    answers: Answers = partial(answer, site)
    with tempfile.TemporaryDirectory() as out:
        server = ServerSettings.from_run_config({**config, "clip-updates": factor, "out": out})
        exchange = DirectExchange(partial(poisoned, answers, site) if lies else answers, server.clients)
        watch = _Cuts()
        try:
            score = run_rounds(exchange, server, watch)["score"]
        except RunError:  # no honest client can learn from such a state any more
            score = {"start": math.nan, "final": math.nan}
    return Row(lies, factor, score["start"], score["final"], watch.cut)


def poisoned(answers: Answers, site: Site, questions: Sequence[Question]) -> Iterator[Answer]:
    """What all clients answer, one of which lies."""
    for found in answers(questions):
        if questions[0].kind == "train" and found.client == POISONER:
            found = replace(found, blob=_poison(site, found.blob))
        yield found


def _poison(site: Site, blob: bytes) -> bytes:
    reference = site.memory.state(read_blob(blob)[0].digest)
    update = decode_update(blob, site.blueprint, reference)
    dense = {name: np.asarray(change * -np.float32(STRETCH)) for name, change in update.dense.items()}
    return encode_update(replace(update, dense=dense, steps={}, examples=MAX_EXAMPLES), site.blueprint)


class _Cuts(LogObserver):
    """Counts how often the liar was cut back; tells nothing else."""

    cut = 0

    def update_clipped(self, number: int, client: str, cuts: str) -> None:
        self.cut += client == str(POISONER)
