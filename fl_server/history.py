"""What a run leaves to read: one line a round in `history.jsonl`, and `summary.json` at its end."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from fl_server.handshake import Roster, Task
from fl_server.settings import ServerSettings
from vblora.errors import RunError
from vblora.files import write_atomic
from vblora.versions import installed_versions

__all__ = ["History", "Record", "RejectedReply", "RoundBytes", "blank_record", "summarise"]

BEFORE = {"events.jsonl", "lock"}  # what a run may have in its directory before it exists


class RejectedReply(TypedDict):
    """A reply that brought nothing, and why."""

    client: str
    reason: str


class RoundBytes(TypedDict):
    """Bytes of encoded blobs, measured as they were sent and received."""

    up: int  # all training replies that arrived, rejected ones too
    down: int  # the state, to every client that was asked to train
    up_per_client: int  # of a usable reply, on average
    down_per_client: int
    up_sections: dict[str, int]  # usable replies by section, see vblora.wire.section_bytes
    evaluate: int  # both directions


class Record(TypedDict):
    """One round. Everything but `seconds` is the same for the same seed."""

    round: int  # 0 is the evaluation before training
    train_loss: float | None  # mean over clients, weighted by examples
    score: float | None  # None where the round was not evaluated
    eval_loss: float | None
    eval_examples: int
    own: dict[str, float]  # each client's score on its own held-out texts, where that was asked for
    own_mean: float | None  # over clients, each counting the same
    own_std: float | None
    texts: dict[str, float]  # scores of generated texts, where those were asked for
    clients: int  # asked to train
    replies: int  # usable ones
    rejected: list[RejectedReply]  # in training and evaluation
    dropped: list[RejectedReply]  # said that they take no part in this round
    clipped: list[str]  # clients whose updates were cut back
    norms: dict[str, list[float]]  # of usable updates by section: median and largest
    missing: list[str]  # asked to train, never answered
    ignored: int  # replies of a client that had answered before, or was not asked
    lr_scale: float
    bytes: RoundBytes
    examples: int
    digest: str  # of the state after the round, hex
    seconds: float


def blank_record(number: int) -> Record:
    """The record of a round in which nothing has happened yet."""
    return {
        "round": number,
        "train_loss": None,
        "score": None,
        "eval_loss": None,
        "eval_examples": 0,
        "own": {},
        "own_mean": None,
        "own_std": None,
        "texts": {},
        "clients": 0,
        "replies": 0,
        "rejected": [],
        "dropped": [],
        "clipped": [],
        "norms": {},
        "missing": [],
        "ignored": 0,
        "lr_scale": 0.0,
        "bytes": {
            "up": 0,
            "down": 0,
            "up_per_client": 0,
            "down_per_client": 0,
            "up_sections": {},
            "evaluate": 0,
        },
        "examples": 0,
        "digest": "",
        "seconds": 0.0,
    }


class History:
    """The records of a run, in memory and in `history.jsonl`. The run exists where this file does."""

    def __init__(self, out: Path) -> None:
        self.path = out / "history.jsonl"
        self.records: list[Record] = []

    def check(self, resume: bool) -> None:
        """See that there is a run exactly where one is to be resumed, and nothing else where one begins.

        Raises:
            RunError: the directory is taken, or holds no run.
        """
        out = self.path.parent
        if resume and not self.path.is_file():
            raise RunError(f"{out}: no run to resume, expected {self.path.name}; start without resume")
        if not resume and (self.path.exists() or any(out.glob("checkpoints/round-*"))):
            raise RunError(
                f"{out}: taken by a run; go on with resume=true (fedvb: --resume) or choose another out"
            )
        if not resume and (others := sorted({path.name for path in out.glob("*")} - BEFORE)):
            raise RunError(f"{out}: holds {others[0]}; choose another out, a folder that is new or empty")

    def create(self) -> None:
        """Begin the file."""
        write_atomic(self.path, "")

    def keep(self, rounds: int) -> None:
        """Read the records of the first `rounds` rounds and drop all later lines.

        A line is written before its checkpoint, so a later line, whole or not, is of a round cut off.

        Raises:
            RunError: a line is missing or damaged.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        if not rounds and len(lines) > 1:  # round 0 alone may have been cut off before its checkpoint
            raise RunError(
                f"{self.path}: has {len(lines)} rounds, but there is no checkpoint; restore the folder "
                "checkpoints or start anew with another out"
            )
        self.records = []
        for number, line in enumerate(lines[:rounds]):
            try:
                record: Record = json.loads(line)
                intact = record["round"] == number and line.endswith(b"\n")
            except (ValueError, KeyError, TypeError):
                intact = False
            if not intact:
                raise RunError(
                    f"{self.path}: line {number + 1} is damaged, expected the record of round {number}"
                )
            self.records.append(record)
        if len(self.records) < rounds:
            raise RunError(
                f"{self.path}: ends before round {len(self.records)}, but there is a checkpoint of round "
                f"{rounds - 1}; restore the file or start anew with another out"
            )
        if len(lines) > rounds:
            write_atomic(self.path, b"".join(lines[:rounds]))

    def append(self, record: Record) -> None:
        """Write a line and see it on the disk."""
        line = json.dumps(record, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)


def summarise(settings: ServerSettings, roster: Roster, task: Task, records: list[Record]) -> dict[str, Any]:
    """The content of `summary.json`, from the whole history."""
    trained = records[1:]
    asked = sum(record["clients"] for record in trained)
    replies = sum(record["replies"] for record in trained)
    sections = [record["bytes"]["up_sections"] for record in trained]
    down = sum(record["bytes"]["down"] for record in trained)
    return {
        "adapter": task.blueprint.spec.kind,
        "model": task.model,
        "data": task.data,
        "clients": len(roster.clients),
        "rounds": len(trained),
        "seed": settings.seed,
        "score": {**_score(task, records), **_own_score(records, roster.clients, settings.late_clients)},
        "bytes": {
            "up_per_client_round": _per(sum(sum(sizes.values()) for sizes in sections), replies),
            "down_per_client_round": _per(down, asked),
            "up_total": sum(record["bytes"]["up"] for record in trained),
            "down_total": down,
            "head": _per(sum(sizes.get("head", 0) for sizes in sections), replies),
            "evaluate_total": sum(record["bytes"]["evaluate"] for record in records),
        },
        "parameters": {
            "trained": task.blueprint.trained_parameters,
            "sent": task.blueprint.stored_parameters,
        },
        "rejected": sum(len(record["rejected"]) for record in records),
        "dropped": sum(len(record["dropped"]) for record in records),
        "seconds": sum(record["seconds"] for record in records),
        "versions": {
            "server": installed_versions(("fed-vblora", "flwr", "numpy")),
            "client": dict(roster.versions),
        },
    }


def _score(task: Task, records: list[Record]) -> dict[str, Any]:
    scores = [record["score"] for record in records if record["score"] is not None]
    last = _last(records, "score")
    best = max if task.higher_is_better else min
    return {
        "metric": task.metric,
        "start": records[0]["score"] if records else None,
        "final": scores[-1] if scores else None,
        "best": best(scores, default=None),
        "last3": sum(last) / len(last) if last else None,
        "averaged": len(last),
        **({"texts": records[-1]["texts"]} if records and records[-1]["texts"] else {}),
    }


def _own_score(records: list[Record], clients: Sequence[str], late: int) -> dict[str, float]:
    """Clients' own scores at the end, the mean of the last three of `_last`, and that of the late ones.

    Nothing where nobody was asked.
    """
    means = [mean for record in records if (mean := record["own_mean"]) is not None]
    spreads = [spread for record in records if (spread := record["own_std"]) is not None]
    if not means:
        return {}
    last, own = _last(records, "own_mean"), records[-1]["own"]
    newcomers = [own[name] for name in clients[len(clients) - late :] if name in own]
    of_late = {"own_late": sum(newcomers) / len(newcomers)} if newcomers else {}
    return {"own_mean": means[-1], "own_std": spreads[-1], "own_last3": sum(last) / len(last), **of_late}


def _last(records: Sequence[Record], name: Literal["score", "own_mean"]) -> list[float]:
    """The last three of a score: of trained states, where there is one."""
    found = [(record["round"], score) for record in records if (score := record[name]) is not None]
    trained = [score for number, score in found if number]
    return (trained or [score for _, score in found])[-3:]


def _per(total: int, count: int) -> int:
    return round(total / count) if count else 0
