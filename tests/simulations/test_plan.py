"""Plans: counts and bytes of adapters that nobody trained, and the paper's own counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulations.adapters import parse_adapters
from simulations.paper import PUBLISHED, count_published
from simulations.plan import Device, Federation, plan_adapters
from tests.simulations.conftest import Run
from vblora.errors import ConfigError

KEYS = {"rows", "trained", "stored", "up_bytes_first", "up_bytes_steady", "down_bytes"}


def test_the_uplink_of_a_13b_model_is_a_thousandth_of_loras():
    for rank, rows in ((0, 61_120), (6, 91_680)):
        plan = plan_adapters("llama-2-13b", None, parse_adapters("vblora,lora:64"), {"rank": rank})
        lora, vblora = plan.adapters["lora:64"], plan.adapters["vblora"]
        assert (lora.trained, lora.stored) == (250_347_520, 250_347_520)
        assert lora.float32_bytes == pytest.approx(4 * lora.stored, rel=1e-4)
        assert 0 < lora.encoded_share < 0.1
        assert vblora.rows == rows
        assert vblora.trained == 524_288 + 2048 * rows
        assert vblora.encoded_share == 1
        assert 1800 * max(vblora.up_bytes_first, vblora.up_bytes_steady) <= lora.float32_bytes
        assert vblora.memory is not None
        assert lora.memory is not None
        assert vblora.memory.adapter < 0.1 * lora.memory.adapter


def test_a_part_of_the_layers_weighs_as_much_as_all(monkeypatch: pytest.MonkeyPatch):
    """What is scaled up from a part comes within two percent of what is encoded whole."""
    from simulations import plan

    adapters = parse_adapters("lora:8")
    whole = plan_adapters("roberta-base", 2, adapters, {}).adapters["lora:8"]
    monkeypatch.setattr(plan, "WHOLE", 1 << 18)
    part = plan_adapters("roberta-base", 2, adapters, {}).adapters["lora:8"]
    assert whole.encoded_share == 1
    assert part.encoded_share < 0.25
    for name in ("up_bytes_first", "up_bytes_steady", "down_bytes", "float32_bytes"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=0.02)
    assert part.head_up_bytes == pytest.approx(whole.head_up_bytes, rel=0.01)


def test_a_bank_is_not_cut_into_layers(monkeypatch: pytest.MonkeyPatch):
    """It is as large for one as for all; a vector of more numbers than one layer reads is none of one."""
    from simulations import plan

    adapters = parse_adapters("vblora,uni-lora:40000")
    whole = plan_adapters("roberta-base", 2, adapters, {}).adapters
    monkeypatch.setattr(plan, "WHOLE", 1 << 10)
    assert plan_adapters("roberta-base", 2, adapters, {}).adapters == whole


def test_the_same_sizes_as_a_run_of_that_model(finished: Path, tiny_bert: Path):
    summary = json.loads((finished / "summary.json").read_text())
    one = plan_adapters(str(tiny_bert), 3, parse_adapters("vblora"), {}).adapters["vblora"]
    assert one.trained + one.head == summary["parameters"]["trained"]
    assert one.stored + one.head == summary["parameters"]["sent"]


def test_every_kind_can_be_planned(tiny_bert: Path):
    adapters = parse_adapters("vblora,lora:8,ffa-lora:8,lora-xs:4,uni-lora:512,bank-only")
    found = plan_adapters(str(tiny_bert), 3, adapters, {}).adapters
    assert [one.spec.kind for one in found.values()] == [str(keys["adapter"]) for keys in adapters.values()]
    assert found["uni-lora:512"].stored == 512
    assert found["bank-only"].up_bytes_steady < found["vblora"].up_bytes_steady
    assert found["ffa-lora:8"].float32_bytes < found["lora:8"].float32_bytes


def test_a_client_sends_and_receives_in_every_round():
    one = plan_adapters("gpt2", None, parse_adapters("vblora"), {}).adapters["vblora"]
    assert one.client_bytes(1) == one.up_bytes_first + one.down_bytes
    assert one.client_bytes(3) == one.up_bytes_first + 2 * one.up_bytes_steady + 3 * one.down_bytes
    slow, fast = (Federation(1, 3, link) for link in ("8kbit", "8 Mbit/s"))
    assert one.hours(slow) == pytest.approx(one.client_bytes(3) / 1000 / 3600)
    assert one.hours(slow) == pytest.approx(1000 * one.hours(fast))


def test_what_fits_a_device():
    """A 7B base has room in 8 GiB in 4 bits only; beside LoRA r64 only if most is computed twice."""
    found = plan_adapters("llama-2-7b", None, parse_adapters("vblora,lora:64"), {}, Device(8)).adapters
    fitting = found["vblora"].fitting
    assert fitting
    assert {training.quantize for training, _ in fitting} == {"4bit"}
    assert all(memory.device <= 8 * 2**30 for _, memory in fitting)
    assert not fitting[0][0].checkpointing
    assert all(training.checkpointing for training, _ in found["lora:64"].fitting or ())
    assert plan_adapters("gpt2", None, parse_adapters("vblora"), {}).adapters["vblora"].fitting is None


@pytest.mark.parametrize(
    ("link", "bits"),
    [("20mbit", 20e6), ("20 mbit", 20e6), ("1.5 Gbit/s", 1.5e9), ("500kbps", 5e5), ("9600bit", 9600)],
)
def test_speeds_of_a_link(link: str, bits: float):
    assert Federation(1, 1, link).bits_per_second == bits


@pytest.mark.parametrize("link", ["", "fast", "20", "20 MB/s", "-1mbit", "0mbit", "20mbit/h"])
def test_what_is_no_speed(link: str):
    with pytest.raises(ConfigError, match="expected a number with kbit, mbit or gbit"):
        Federation(1, 1, link)


# --- Adapters by name -----------------------------------------------------------------------------


def test_adapters_by_name():
    assert parse_adapters(" vblora, LoRA:8 ,uni-lora:4096") == {
        "vblora": {"adapter": "vblora"},
        "lora:8": {"adapter": "lora", "rank": 8},
        "uni-lora:4096": {"adapter": "uni-lora", "theta-length": 4096},
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "adapter '': kind is '', expected one of vblora, lora, ffa-lora"),
        ("vblora,", "adapter ''"),
        ("dora:8", "adapter 'dora:8': kind is 'dora'"),
        ("lora:eight,lora:0,lora:1.5", "rank is 'eight', .*rank is '0', .*rank is '1.5', expected 1 to 1024"),
        ("lora:8,vblora,lora:8", "'lora:8' is named twice"),
    ],
)
def test_adapters_that_cannot_be_read(text: str, told: str):
    with pytest.raises(ConfigError, match=told):
        parse_adapters(text)


# --- The paper ------------------------------------------------------------------------------------


def test_the_papers_table_counted_again():
    """Its formula where it holds, and what its other figures say in place of 1.5 numbers a row."""
    found = {
        (count.published.model, count.published.targets): (count.rows, count.counted, count.fits)
        for count in map(count_published, PUBLISHED)
    }
    assert found == {
        ("roberta-base", "query,value"): (576, 23_904, 0.75),
        ("roberta-base", "all-linear"): (2_592, 26_928, 1.5),
        ("roberta-large", "query,value"): (1_536, 25_344, 0.75),
        ("roberta-large", "all-linear"): (6_912, 33_408, 1.5),
        ("gpt2-medium", "all-linear"): (6_912, 75_904, 1.5),
        ("gpt2-large", "all-linear"): (12_960, 115_520, 3.0),
        ("llama-2-7b", "all-linear"): (39_040, 602_368, 6.0),
        ("llama-2-13b", "all-linear"): (91_680, 707_648, 6.0),
        ("mistral-7b", "all-linear"): (40_960, 606_208, 3.0),
        ("gemma-7b", "all-linear"): (48_832, 621_952, 3.0),
    }
    agreeing = [count for count in map(count_published, PUBLISHED) if count.agrees]
    assert [count.stated == count.counted for count in agreeing] == [True] * 3


# --- The command ----------------------------------------------------------------------------------


def test_plan_as_json(fedvb: Run, tiny_bert: Path):
    shown = fedvb("plan", "--model", tiny_bert, "--adapters", "vblora,lora:4", "--classes", "3", "--json")
    assert (shown.code, shown.err) == (0, "")
    adapters = json.loads(shown.out)["adapters"]
    assert list(adapters) == ["vblora", "lora:4"]
    for one in adapters.values():
        assert set(one) >= KEYS
        assert all(type(one[key]) is int and one[key] > 0 for key in KEYS)
    assert adapters["vblora"]["rows"] == 120


def test_plan_as_a_table(fedvb: Run, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    typed = ["--model", tiny_bert, "--rounds", "9", "--clients", "1000", "--link", "1 Mbit/s"]
    shown = fedvb("plan", *typed, "--num-vectors", "8", "--target-modules", "query,value")
    assert (shown.code, shown.err) == (0, "")
    for told in ("r 4, h 8, b 32, k 2", "a client, 9 rounds", "on 1 Mbit/s", "1,000 clients", "sends 1/"):
        assert told in shown.out
    memory = fedvb("plan", "--model", tiny_bert, "--device-memory", "0.7", "--batch-size", "2")
    assert "What fits 0.7 GiB, steps of 2 × 512 tokens, the fastest first:" in memory.out
    assert "all is kept" in memory.out
    published = fedvb("plan", "--paper")
    assert published.code == 0
    assert "llama-2-13b all" in published.out
    assert max(map(len, published.out.splitlines())) <= 100


@pytest.mark.parametrize("width", [50, 80, 300])
def test_no_number_and_no_name_is_cut(fedvb: Run, monkeypatch: pytest.MonkeyPatch, width: int):
    """Seven adapters: a row each, in 80 columns; a column each where there is room."""
    monkeypatch.setenv("COLUMNS", str(width))
    names = ["vblora", "lora:64", "ffa-lora:8", "lora-xs:32", "uni-lora:32768", "bank-only", "lora:8"]
    shown = fedvb("plan", "--model", "llama-2-13b", "--rank", "6", "--adapters", ",".join(names))
    assert (shown.code, shown.err) == (0, "")
    assert "…" not in shown.out
    figures = shown.out.split("sends 1/")[0]
    assert {*names, "188,284,928", "250,347,520"} <= set(figures.split())
    assert "r 6, h 2048, b 256, k 2" in figures
    assert "d 32768" in figures
    assert ("│" in figures) == (width == 300)
    if width == 80:
        assert max(map(len, figures.splitlines())) <= width


def test_what_is_sent_is_told_with_the_head_and_without(fedvb: Run):
    """On both sides, where there is one; and which rows have it in them."""
    typed = ["plan", "--model", "roberta-base", "--classes", "77", "--adapters", "vblora:90,lora:8"]
    shown, found = fedvb(*typed), json.loads(fedvb(*typed, "--json").out)["adapters"]
    lora, ours = found["lora:8"], found["vblora:90"]
    assert lora["head_float32_bytes"] == pytest.approx(4 * lora["head"], rel=1e-3)
    alone = lora["float32_bytes"] / ours["up_bytes_first"]
    whole = (lora["float32_bytes"] + lora["head_float32_bytes"]) / (
        ours["up_bytes_first"] + ours["head_up_bytes"]
    )
    told = " ".join(shown.out.split())
    assert f"1/{alone:,.0f} of lora:8 in float32 in round 1 without the head, 1/{whole:,.0f} with it." in told
    assert "a client, 10 rounds, head too" in told
    assert "10 clients, head too" in told
    without = fedvb("plan", "--model", "gpt2").out
    assert "head" not in without.split("Numbers stored")[0]


def test_the_papers_counts_as_json(fedvb: Run):
    shown = fedvb("plan", "--paper", "--json")
    assert (shown.code, shown.err) == (0, "")
    found = json.loads(shown.out)
    assert len(found) == len(PUBLISHED)
    assert found[0]["published"]["model"] == "roberta-base"
    assert (found[1]["counted"], found[1]["agrees"]) == (26_928, True)


@pytest.mark.parametrize("option", ["start", "alpha", "topk", "wire-feedback", "adapter"])
def test_a_plan_takes_no_option_that_it_does_not_heed(fedvb: Run, option: str):
    assert f"No such option '--{option}'" in fedvb("plan", "--model", "gpt2", f"--{option}", "1").err
    assert f"--{option} " not in fedvb("plan", "--help").out


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("", "--model: which one?"),
        ("--model llama-9", "no config of llama-9"),
        ("--model /nope/config.json", "/nope/config.json: no such file; expected a config.json, a folder"),
        ("--model gpt2 --adapters dora", "kind is 'dora', expected one of vblora"),
        ("--model gpt2 --rounds 0 --clients 0", "clients is 0, expected at least 1; rounds is 0"),
        ("--model gpt2 --link fast", "link is 'fast'"),
        ("--model gpt2 --device-memory 0 --batch-size 0", "device-memory is 0, expected GiB above 0; batch-"),
        ("--model gpt2 --target-modules nope", "'nope' fits no linear layer"),
        ("--model gpt2 --adapters lora:5000", "rank is '5000', expected 1 to 1024"),
        ("--model gpt2 --wire tiny", "wire is 'tiny'"),
        ("--model gpt2 --classes -1", "'--classes': -1 is not in the range x>=0"),
    ],
)
def test_bad_options_of_a_plan(fedvb: Run, typed: str, told: str):
    shown = fedvb("plan", *typed.split())
    assert shown.code == 2
    assert shown.err.startswith("fedvb: ")
    assert shown.err.count("\n") == 1
    assert told in shown.err
    assert shown.out == ""
