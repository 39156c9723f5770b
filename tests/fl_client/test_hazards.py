"""Clients that fail on purpose: drawn from the seed, named in the history, and the run goes on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_client.hazards import Fate, HazardSettings
from fl_client.serve import answer
from fl_server.rounds import run_rounds
from simulations.direct import DirectExchange
from tests.fl_client.sites import make_site
from tests.fl_server.fakes import make_settings, read_history
from vblora.errors import ConfigError, RunError

DROPPED = "dropped out (simulated)"


def run(out: Path, seed: int = 0, **hazards: float) -> list[dict[str, Any]]:
    """Four rounds of five of ten clients; the history."""
    site = make_site(10, seed=seed, **hazards)
    options = {"rounds": 4, "clients": 10, "clients_per_round": 5, "seed": seed, "eval_every": 4}
    run_rounds(DirectExchange(partial(answer, site), 10), make_settings(out, **options))
    return read_history(out)


# --- Fates ---------------------------------------------------------------------------


def test_without_hazards_every_client_takes_all_its_steps():
    assert HazardSettings().fate(0, 3, 7, 20) == Fate(False, 20)


def test_fates_have_the_chances_that_were_asked_for():
    settings = HazardSettings(dropout=0.3, stragglers=0.5)
    fates = [settings.fate(1, number, client, 10) for number in range(50) for client in range(80)]
    dropped = np.mean([fate.dropped for fate in fates])
    late = np.mean([fate.steps < 10 for fate in fates if not fate.dropped])
    assert dropped == pytest.approx(0.3, abs=0.04)
    assert late == pytest.approx(0.5, abs=0.04)
    assert {fate.steps for fate in fates if not fate.dropped} == set(range(1, 11))
    assert {fate.steps for fate in fates if fate.dropped} == {0}


def test_fates_depend_on_seed_round_and_client_alone():
    settings = HazardSettings(dropout=0.5, stragglers=0.5)
    drawn = [
        tuple(settings.fate(seed, number, client, 100) for client in range(30))
        for seed in range(3)
        for number in range(3)
    ]
    assert len(set(drawn)) == 9
    assert drawn[0] == tuple(settings.fate(0, 0, client, 100) for client in range(30))


def test_who_drops_out_does_not_depend_on_stragglers():
    one, other = HazardSettings(dropout=0.4), HazardSettings(dropout=0.4, stragglers=0.9)
    for client in range(50):
        assert one.fate(0, 1, client, 5).dropped == other.fate(0, 1, client, 5).dropped


def test_a_client_of_one_step_cannot_lag():
    assert HazardSettings(stragglers=1.0).fate(0, 0, 0, 1) == Fate(False, 1)
    assert HazardSettings(stragglers=1.0).fate(0, 0, 0, 2) == Fate(False, 1)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"dropout": 1.0}, "dropout is 1.0, expected 0 to below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"stragglers": 1.5}, "stragglers is 1.5, expected 0 to 1"),
        ({"stragglers": float("nan")}, "stragglers is nan"),
    ],
)
def test_settings_say_what_is_wrong(given, fault):
    with pytest.raises(ConfigError, match=fault):
        HazardSettings(**given)


# --- Runs under failures -------------------------------------------------------------


def test_clients_that_drop_out_are_named_and_the_run_goes_on(tmp_path):
    records = run(tmp_path / "run", dropout=0.4)
    assert [record["round"] for record in records] == [0, 1, 2, 3, 4]
    lost = 0
    for record in records[1:]:
        assert {item["reason"] for item in record["dropped"]} <= {DROPPED}
        assert record["clients"] == 5 == record["replies"] + len(record["dropped"])
        assert record["missing"] == record["rejected"] == []
        lost += len(record["dropped"])
    assert lost > 0
    assert records == run(tmp_path / "again", dropout=0.4)
    assert records != run(tmp_path / "other", seed=2, dropout=0.4)


def test_stragglers_send_updates_of_fewer_examples(tmp_path):
    records, whole = run(tmp_path / "late", stragglers=0.6), run(tmp_path / "whole")
    assert all(record["replies"] == 5 and not record["rejected"] for record in records[1:])
    examples = [(late["examples"], full["examples"]) for late, full in zip(records, whole, strict=True)]
    assert all(late <= full for late, full in examples)
    assert sum(late for late, _ in examples) < sum(full for _, full in examples)


def test_a_round_in_which_all_drop_out_says_so(tmp_path):
    site = make_site(10, dropout=0.99)
    exchange = DirectExchange(partial(answer, site), 10)
    options = {"rounds": 4, "clients": 10, "clients_per_round": 2, "seed": 0, "eval_every": 4}
    with pytest.raises(RunError, match=r"no usable reply from 2 clients: \d: dropped out"):
        run_rounds(exchange, make_settings(tmp_path, **options))
