"""One table of defaults, said in four places: settings, default_config, the command line, pyproject.toml."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import pytest

from fl_server.config_file import save_config
from simulations import cli
from simulations.config import check_config, default_config, load_config
from tests.conftest import ROOT
from vblora.errors import ConfigError

NOT_UNDER_FLOWER = {"workers"}  # its engines have options of their own
NOT_ON_COMMAND_LINE = {
    *("init-std", "bank-bound", "margin", "final-scale", "wait-seconds", "timeout-seconds"),
    *("train-seconds", "quorum", "close-at", "max-reply"),
}
CHOSEN = {"rank", "num-vectors", "vector-length", "theta-length"}  # None on the command line, 0 in a config
OUT = {"out"}  # runs/NAME on the command line, runs/fedvb under Flower


def test_pyproject_holds_every_key_and_its_default():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    config = project["tool"]["flwr"]["app"]["config"]
    expected = {name: value for name, value in default_config().items() if name not in NOT_UNDER_FLOWER}
    assert config == expected
    assert {name: type(value) for name, value in config.items()} == {
        name: type(value) for name, value in expected.items()
    }


def test_the_command_line_has_the_same_defaults():
    defaults = {
        name.replace("_", "-"): parameter.default
        for name, parameter in inspect.signature(cli.simulate).parameters.items()
        if name != "context"
    }
    expected = {name: None if name in CHOSEN | OUT else value for name, value in default_config().items()}
    assert defaults == {name: value for name, value in expected.items() if name not in NOT_ON_COMMAND_LINE}


def test_the_defaults_pass_their_own_check():
    site, server = check_config(default_config())
    assert site.local.steps == 10
    assert site.data.clients == server.clients == 10
    assert site.data.seed == server.seed == 0


def test_every_part_reads_its_keys():
    changed = {"cohort": 1, "rank": 1, "max-length": 129, "local-steps": 11, "lr-bank": 1.008}
    changed |= {"clients": 9, "clients-per-round": 3, "dropout": 0.1, "stragglers": 0.2, "final-scale": 0.3}
    changed |= {"rounds": 13}
    site, server = check_config(default_config() | changed)
    assert (site.cohort, site.adapter.rank, site.data.max_length) == (1, 1, 129)
    assert (site.local.steps, site.local.lr_bank) == (11, 1.008)
    assert (site.hazards.dropout, site.hazards.stragglers) == (0.1, 0.2)
    assert (server.rounds, server.clients_per_round, server.final_scale) == (13, 3, 0.3)


def test_all_faults_of_all_parts_in_one_line():
    with pytest.raises(ConfigError) as caught:
        check_config(
            default_config()
            | {"adapter": "dora", "rounds": 0, "local-steps": 0, "partition": "random", "colour": 1}
        )
    told = str(caught.value)
    assert "\n" not in told
    for part in (
        "adapter is 'dora'",
        "rounds is 0",
        "local-steps is 0",
        "partition is 'random'",
        "unknown keys: colour",
    ):
        assert part in told


def test_a_fault_that_both_sides_find_is_told_once():
    with pytest.raises(ConfigError) as caught:
        check_config(default_config() | {"wire-keep": 2.0})
    assert str(caught.value) == "wire: keep is 2, expected above 0, at most 1"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": "four"}, "rank is 'four', expected a whole number"),
        ({"rank": 4.0}, "rank is 4.0, expected a whole number"),
        ({"lr-bank": "high"}, "lr-bank is 'high', expected a number"),
        ({"model": 3}, "model is 3, expected text"),
        ({"cohort": True}, "cohort is True, expected a whole number"),
        ({"cohort": -1}, "cohort is -1"),
        ({"accumulate": 0}, "accumulate is 0, expected at least 1"),
        ({"weight-decay": 0.1}, r"weight-decay is 0\.1, expected 0 for an adapter with a bank: a logit"),
        ({"adapter": "lora", "weight-decay": 2.0}, "weight-decay is 2.0, expected 0 to 1"),
        ({"workers": -1}, "workers is -1, expected 1 or more, or 0"),
        ({"workers": 1.5}, "workers is 1.5, expected a whole number"),
        ({"model": ""}, "model is empty"),
        ({"seed": None}, "seed is None, expected a whole number"),
    ],
)
def test_values_of_a_wrong_type(changes: dict[str, object], told: str):
    """`flwr run . -c` and a hand-edited config.json can bring any."""
    with pytest.raises(ConfigError, match=told):
        check_config({**default_config(), **changes})


def test_weight_decay_is_for_kinds_without_a_bank():
    site, _ = check_config({**default_config(), "adapter": "lora", "weight-decay": 0.1})
    assert site.local.weight_decay == 0.1


def test_whole_numbers_will_do_for_floats():
    site, _ = check_config({**default_config(), "lr-bank": 1})
    assert type(site.local.lr_bank) is float


def test_a_config_comes_back_with_the_defaults_of_what_it_lacks(tmp_path: Path):
    save_config(tmp_path, {"rounds": 3, "out": "elsewhere", "resume": True})
    assert load_config(tmp_path) == {**default_config(), "rounds": 3, "out": str(tmp_path)}
