"""Before the first round: who takes part, and what do they train together?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fl_server.exchange import Exchange, Reply, Request, client_order, one_line
from vblora.errors import FedVBError, RunError
from vblora.imports import hold_start
from vblora.spec import Blueprint

__all__ = ["Fault", "Roster", "Task", "describe", "meet", "name_faults", "with_start"]

METRICS = ("accuracy", "loss")
PACKAGE = "fed-vblora"
MAX_TEXT = 4 << 20  # characters of a client's answer: names of layers and of labels are the most of it
MAX_DEPTH = 20  # of lists and objects in it


@dataclass(frozen=True)
class Fault:
    """A client that was refused, or whose reply was, and why."""

    client: str
    reason: str


@dataclass(frozen=True)
class Roster:
    """The clients of a run.

    Attributes:
        clients: names, in `client_order`.
        refused: clients that may not take part.
        fingerprint: of the blueprint that all clients hold, hex.
        versions: of the first client's libraries.
    """

    clients: tuple[str, ...]
    refused: tuple[Fault, ...]
    fingerprint: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """What the clients train together, as the first of them describes it.

    Attributes:
        blueprint: of the adapter.
        metric: "accuracy" or "loss".
        higher_is_better: about the metric.
        data: about the data set, for the summary.
        model: of the base model, for the summary.
        prompts: held-out texts that have something to go on from.
    """

    blueprint: Blueprint
    metric: str
    higher_is_better: bool
    data: Any
    model: Any
    prompts: int = 0


def meet(exchange: Exchange, timeout: float) -> Roster:
    """Greet all clients. The first that can be read names the adapter; who holds another is refused.

    Raises:
        RunError: nobody is left.
    """
    names = exchange.clients()
    hellos: dict[str, dict[str, Any]] = {}
    faults = dict.fromkeys(names, f"no answer within {timeout:g} seconds")
    for reply in exchange.ask([Request(name, "hello") for name in names], timeout):
        try:
            hellos[reply.client] = _read_hello(reply)
            faults.pop(reply.client, None)
        except RunError as error:
            faults[reply.client] = str(error)
    ours = _own_version()
    ordered = sorted(hellos, key=client_order)
    theirs = {name: hellos[name]["versions"].get(PACKAGE, ours) for name in ordered}
    fitting = [name for name in ordered if theirs[name] == ours or not ours]
    first = hellos[fitting[0]] if fitting else {}
    for name in ordered:
        if name not in fitting:
            faults[name] = f"it runs {PACKAGE} {theirs[name]}, the server {ours}; install the same on both"
        elif hellos[name]["fingerprint"] != first["fingerprint"]:
            faults[name] = (
                f"its adapter is {hellos[name]['fingerprint'][:12]}, expected {first['fingerprint'][:12]} "
                f"as client {fitting[0]} has; "
                "base model, targets, rank, h, b, k, seed, start and labels must agree"
            )
    refused = tuple(Fault(name, one_line(faults[name])) for name in sorted(faults, key=client_order))
    clients = tuple(name for name in ordered if name not in faults)
    if not clients:
        raise RunError(f"hello: none of {len(names)} clients can take part: {name_faults(refused)}")
    return Roster(clients, refused, first["fingerprint"], first["versions"])


def describe(exchange: Exchange, roster: Roster, timeout: float) -> Task:
    """Ask the first client what is trained.

    Raises:
        RunError: it does not answer, or answers what cannot be used.
    """
    client = roster.clients[0]
    reply = next(exchange.ask([Request(client, "describe")], timeout), None)
    try:
        if reply is None:
            raise RunError(f"no answer within {timeout:g} seconds")
        body = _read_json(reply)
        blueprint = Blueprint.from_json(_get(body, "blueprint", str))
        metric = _get(body, "metric", dict)
        task = Task(
            blueprint,
            _get(metric, "name", str),
            _get(metric, "higher_is_better", bool),
            body.get("data"),
            body.get("model"),
            _get(body, "prompts", int),
        )
        if task.metric not in METRICS:
            raise RunError(f"its metric is {task.metric!r}, expected one of {', '.join(METRICS)}")
        if (found := blueprint.fingerprint.hex()) != roster.fingerprint:
            raise RunError(
                f"it describes adapter {found[:12]}, expected {roster.fingerprint[:12]} as in its hello"
            )
    except FedVBError as error:
        raise RunError(f"describe: client {client}: {one_line(str(error))}") from error
    return task


def with_start(task: Task, folder: str) -> Task:
    """`task` with the adapter in hand that the clients go on from, where they do.

    Args:
        task: its blueprint names that adapter at most.
        folder: where the server has it; "" is nowhere.

    Raises:
        RunError: the server has none, or the clients start from the seed.
        StartError: the folder holds another, or none.
    """
    asked = task.blueprint.start
    if asked is None and folder:
        raise RunError(
            f"start: the server goes on from {folder}, the clients from the seed; give each site --start"
        )
    if asked is None:
        return task
    if not folder:
        raise RunError(
            f"start: the clients go on from adapter {asked.digest[:12]}, the server from none; "
            "give it the same files with start=FOLDER"
        )
    return replace(task, blueprint=hold_start(task.blueprint, folder))


def name_faults(faults: tuple[Fault, ...] | list[Fault], most: int = 5) -> str:
    """The first few of them on one line."""
    named = [f"{fault.client}: {fault.reason}" for fault in faults[:most]]
    return "; ".join([*named, f"and {len(faults) - most} more"] if len(faults) > most else named)


def _own_version() -> str:
    """Empty where it is run from a checkout."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return ""


def _read_hello(reply: Reply) -> dict[str, Any]:
    body = _read_json(reply)
    versions = _get(body, "versions", dict)
    if (examples := _get(body, "examples", int)) < 1:
        raise RunError(f"it has {examples} examples, expected at least 1; give it data or leave it out")
    return {
        "fingerprint": _get(body, "fingerprint", str),
        "versions": {one_line(name): one_line(str(version)) for name, version in versions.items()},
    }


def _read_json(reply: Reply) -> dict[str, Any]:
    if reply.error:
        raise RunError(reply.error)
    if len(reply.text) > MAX_TEXT:
        raise RunError(f"its answer has {len(reply.text)} characters, expected {MAX_TEXT} at most")
    try:
        body = json.loads(reply.text)
        deep = not _is_within(body, MAX_DEPTH)
    except ValueError as error:
        raise RunError(f"its answer is not JSON ({error})") from error
    except RecursionError:
        deep = True
    if deep:
        raise RunError(f"its answer is nested too deeply, expected {MAX_DEPTH} levels at most")
    if not isinstance(body, dict):
        raise RunError(f"its answer is a {type(body).__name__}, expected a JSON object")
    return body


def _is_within(value: Any, levels: int) -> bool:
    """Whether a JSON value has no more than so many levels: what is read here is written into the summary."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(levels > 0 and _is_within(item, levels - 1) for item in items)


def _get(body: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    value = body.get(key)
    if type(value) is not kind:
        raise RunError(f"its answer has {key} = {value!r:.40}, expected {kind.__name__}")
    return value
