"""Which runs a comparison is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_client.train import RATES
from simulations.adapters import parse_adapters
from simulations.compare.protocol import Protocol, contenders
from simulations.config import default_config
from vblora.errors import ConfigError

OWN = {"adapter", "rank", "theta-length", "lr-rows", "lr-bank", "weight-decay", "seed", "out", "eval-split"}


def protocol(adapters: str = "vblora,lora:8", out: Path = Path("cmp"), **changes: object) -> Protocol:
    base = {**default_config(), **{name.replace("_", "-"): value for name, value in changes.items()}}
    named, baseline = contenders(parse_adapters(adapters), base)  # type: ignore[arg-type]
    return Protocol(base, named, baseline, seeds=2, tune=1, out=out)  # type: ignore[arg-type]


def test_lora_stands_twice():
    """In float32, which is the baseline, and through the codec that all others use."""
    found = protocol("vblora,lora:8,lora:32,uni-lora:64")
    assert list(found.contenders) == ["lora:8 float32", "lora:8", "vblora", "lora:32", "uni-lora:64"]
    assert found.baseline == "lora:8 float32"
    assert found.contenders["lora:8 float32"].keys["wire"] == "lossless"
    assert "wire" not in found.contenders["lora:8"].keys


def test_where_nothing_is_rounded_lora_stands_once():
    found = protocol(wire="lossless")
    assert (list(found.contenders), found.baseline) == (["lora:8", "vblora"], "lora:8")
    assert protocol(wire="lossless", wire_up_bits=4.0).baseline == "lora:8 float32"


def test_without_a_lora_there_is_nothing_to_compare_with():
    with pytest.raises(ConfigError, match=r"no LoRA to compare with; name one, such as lora:8"):
        protocol("vblora,ffa-lora:8")


def test_rates_are_tried_around_what_a_run_would_have():
    found = protocol("vblora,lora:8,lora-xs:4,bank-only", lr_bank=0.01).contenders
    rates = {name: (contender.rate, contender.values) for name, contender in found.items()}
    assert rates["vblora"] == rates["bank-only"] == ("lr-bank", (0.005, 0.01, 0.02))
    for name, kind in (("lora:8", "lora"), ("lora-xs:4", "lora-xs")):
        assert rates[name] == ("lr-rows", (RATES[kind] / 2, RATES[kind], 2 * RATES[kind]))
    assert protocol("lora:8", lr_rows=0.1).contenders["lora:8"].default == 0.1


def test_a_bank_takes_no_weight_decay():
    found = protocol("vblora,lora:8,bank-only", weight_decay=0.01)
    runs = found.final_runs({name: contender.default for name, contender in found.contenders.items()})
    decay = {run.contender: run.config["weight-decay"] for run in runs}
    assert decay == {"lora:8 float32": 0.01, "lora:8": 0.01, "vblora": 0.0, "bank-only": 0.0}


def test_all_runs_share_everything_but_their_adapter():
    found = protocol("vblora,lora:8,uni-lora:64", rounds=7, wire="smallest")
    final = found.final_runs({name: contender.default for name, contender in found.contenders.items()})
    assert len(final) == 2 * 4
    for run in final:
        for other in final:
            differing = {key for key in run.config if run.config[key] != other.config[key]}
            assert differing <= OWN | ({"wire"} if "float32" in run.contender + other.contender else set())
    assert len({run.out for run in final}) == len(final)
    assert {run.config["eval-split"] for run in final} == {""}


def test_rates_are_chosen_on_other_texts_and_other_seeds():
    found = protocol()
    tuning = found.tuning_runs()
    final = found.final_runs({name: contender.default for name, contender in found.contenders.items()})
    assert len(tuning) == 3 * 3
    assert {run.config["eval-split"] for run in tuning} == {"train"}
    assert not {run.seed for run in tuning} & {run.seed for run in final}
    assert not {run.out for run in tuning} & {run.out for run in final}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seeds": 0}, "seeds is 0, expected at least 1"),
        ({"tune": -1}, "tune is -1"),
        ({"base": {**default_config(), "eval-split": "train"}}, "'train', of which rates are chosen"),
        (
            {"base": {**default_config(), "seed": 999}},
            "seed is 999: seeds from 1000 on are those of the tuning",
        ),
    ],
)
def test_what_makes_no_comparison(changes: dict[str, object], told: str):
    named, baseline = contenders(parse_adapters("lora:8"), default_config())
    given = {"base": default_config(), "seeds": 2, "tune": 1, **changes}
    with pytest.raises(ConfigError, match=told):
        Protocol(contenders=named, baseline=baseline, out=Path("cmp"), **given)  # type: ignore[arg-type]
