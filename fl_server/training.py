"""A round of training: who is asked, which replies count, and what comes of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from fl_server.asking import Inbox, Run, ask, ordered, rejected
from fl_server.broadcast import Broadcast
from fl_server.clipping import Harvest
from fl_server.evaluation import MOST_LOSS
from fl_server.exchange import NEED_STATE, Reply, Request, Scalar, client_order, one_line
from fl_server.handshake import Fault, name_faults
from fl_server.history import Record
from fl_server.stepping import step_towards
from vblora.errors import RunError, UpdateError, WireError
from vblora.frame import section_bytes
from vblora.spec import Blueprint
from vblora.state import State, Update, check_update
from vblora.wire import decode_update

__all__ = ["sample_clients", "train_round"]

RETRY = 30.0  # seconds before a round is trained again
FLOAT_BYTES, SLACK, ROOM = 4, 4, 1 << 20  # a reply may be `SLACK` times what float32 takes, and some room


def train_round(run: Run, reference: Broadcast, record: Record) -> None:
    """Train, after which the reference is the next one. Fills in its part of the record.

    Where fewer than a quorum of replies can be used the round is trained again, from the same reference, once
    clients are back.

    Raises:
        RunError: too few replies are usable, for too long.
    """
    number, settings = record["round"], run.settings
    run.attendance.new_round()
    eligible = settings.eligible(run.clients, number)
    if len(eligible) < settings.quorum:  # waiting cannot help: a run's clients are known from its start
        raise RunError(
            f"round {number}: {len(run.clients)} clients take part, the last {settings.late_clients} later, "
            f"quorum is {settings.quorum}; bring more clients and go on with resume=true (fedvb: --resume), "
            "or lower late-clients"
        )
    while True:
        there = run.attendance.gather(eligible, number)
        names = sample_clients(there, settings.clients_per_round, settings.seed, number)
        harvest = Harvest(reference.state, run.task.blueprint, settings.clip_updates, settings.logit_mean)
        faults = _collect(run, reference, names, harvest, record)
        if len(harvest) >= settings.quorum:
            break
        faults += [Fault(name, "no reply in time") for name in record["missing"]]
        found = (
            f"{len(harvest)} usable replies, quorum is {settings.quorum}," if harvest else "no usable reply"
        )
        why = f"round {number}: {found} from {len(names)} clients: {name_faults(ordered(faults))}"
        if len(record["dropped"]) == len(names):  # as drawn from the seed: they would again
            raise RunError(
                f"{why}; go on with resume=true (fedvb: --resume) and other clients, or lower dropout"
            )
        run.attendance.wait(why, RETRY)
    state, cuts = harvest.finish()
    for name in sorted(cuts, key=client_order):
        run.observer.update_clipped(number, name, cuts[name])
    record["clipped"] = sorted(cuts, key=client_order)
    record["norms"] = harvest.spread()
    record["replies"], record["examples"] = len(harvest), harvest.examples
    traffic = record["bytes"]
    traffic["up_per_client"] = round(sum(traffic["up_sections"].values()) / len(harvest))
    stepped, reference.moments = step_towards(state, reference.state, reference.moments, settings.step)
    reference.advance(stepped)


def sample_clients(clients: Sequence[str], count: int, seed: int, number: int) -> list[str]:
    """The clients of round `number`, in the order of `clients`: only the seed and the round decide."""
    draws = np.random.Philox(key=np.array([seed, number], np.uint64)).random_raw(len(clients))
    return [clients[at] for at in sorted(np.argsort(draws, kind="stable")[:count])]


def _collect(
    run: Run, reference: Broadcast, names: Sequence[str], harvest: Harvest, record: Record
) -> list[Fault]:
    """Ask clients to train, until enough have answered; returns what is wrong with the replies of others."""
    number, settings, traffic = record["round"], run.settings, record["bytes"]
    run.observer.round_started(number, names)
    record["clients"] = len(names)
    record["lr_scale"] = settings.lr_scale(number)
    traffic["up_sections"] = {}

    config: dict[str, Scalar] = {"round": number, "lr-scale": record["lr_scale"], "run": run.name}
    if frozen := settings.frozen(number):
        config["frozen"] = frozen
    silent = settings.silent(number)
    if settings.train_seconds:
        config["seconds"] = settings.train_seconds
    # All are waited for in full, so that what comes twice is counted.
    early = settings.close_at < 1
    enough = settings.enough(len(names))
    inbox = Inbox(names)
    losses: dict[str, tuple[float, int]] = {}
    faults: list[Fault] = []
    dropped: list[Fault] = []
    requests = [Request(name, "train", b"", config) for name in names]
    for reply in inbox.first_of(ask(run, reference, requests, inbox)):
        if reply.metrics.get("dropped"):
            dropped.append(Fault(reply.client, one_line(reply.text)))
            run.observer.client_dropped(number, reply.client, dropped[-1].reason)
            continue
        traffic["up"] += len(reply.blob)
        fault = ""
        try:
            update = _read_update(reply, reference.state, run.task.blueprint, settings.max_reply)
            _require_silence(update, reference.state, silent)
            harvest.take(reply.client, update)
        except (WireError, UpdateError) as error:
            fault = one_line(str(error))
            faults.append(Fault(reply.client, fault))
        else:
            reference.acknowledge(reply.client)
            _count_sections(traffic["up_sections"], reply.blob)
            losses[reply.client] = (float(reply.metrics.get("train-loss", math.nan)), update.examples)
        run.observer.reply_received(number, "train", reply.client, fault, len(reply.blob))
        if early and len(harvest) >= enough:
            break

    traffic["down"] += inbox.sent
    traffic["down_per_client"] = round(inbox.sent / len(names))
    record["train_loss"] = _mean_loss(losses)
    record["missing"] = sorted(inbox.waiting, key=client_order)
    record["ignored"] += inbox.ignored
    record["rejected"] += rejected(faults)
    record["dropped"] = rejected(dropped)
    return faults + dropped


def _read_update(reply: Reply, state: State, blueprint: Blueprint, most: int) -> Update:
    if reply.error:
        raise UpdateError(f"training: {reply.error}")
    if reply.text == NEED_STATE:
        raise UpdateError("training: it could not read the state, not even from version 0")
    most = most or SLACK * FLOAT_BYTES * blueprint.stored_parameters + ROOM
    if len(reply.blob) > most:
        raise UpdateError(
            f"training: its reply has {len(reply.blob)} bytes, expected {most} at most (max-reply)"
        )
    update = decode_update(reply.blob, blueprint, state)
    check_update(update, blueprint, state)
    return update


def _require_silence(update: Update, state: State, silent: Collection[str]) -> None:
    """Refuse a change of what honest clients leave alone in this round."""
    moved = [name for name, change in update.dense.items() if name in silent and change.any()]
    if "logits" in silent and update.topk is not None and state.topk is not None:
        moved += [] if update.topk.same_rows(state.topk).all() else ["logits"]
    if moved:
        raise UpdateError(f"update: changes {', '.join(moved)}, which is frozen or personal in this round")


def _count_sections(sizes: dict[str, int], blob: bytes) -> None:
    for name, size in section_bytes(blob).items():
        sizes[name] = sizes.get(name, 0) + size


def _mean_loss(losses: dict[str, tuple[float, int]]) -> float | None:
    """Weighted by examples, added in the order of names; one that cannot be is left out."""
    told = [losses[name] for name in sorted(losses, key=client_order) if abs(losses[name][0]) <= MOST_LOSS]
    examples = sum(weight for _, weight in told)
    return sum(loss * weight for loss, weight in told) / examples if examples else None
