"""What a comparison says, and the tables it says it in."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulations.compare.results import Comparison, compared
from simulations.compare.scores import Interval, Reached
from simulations.compare.tables import columns, difference, few_columns, markdown, section_cells, verdict
from tests.simulations.compare.made import made_comparison, made_result


def test_the_verdict_names_the_cheapest_whoever_it_is():
    told = verdict(made_comparison())
    assert told[0] == "lora:8 came to 98% of lora:8 float32's accuracy with the fewest bytes: 20.0 kB."
    assert told[1:3] == ["Then lora:8 float32 with 200.0 kB.", "Most runs of vblora did not come there."]
    assert told[3] == (
        "vblora: accuracy 0.7800, −2.0 (−2.0 to −2.0) points against lora:8 float32, worse; "
        "1/100 of its bytes, 1/10 of lora:8's."
    )
    assert told[4].startswith("lora:8: accuracy 0.7950, −0.5 (")
    assert "no difference shown; 1/10 of its bytes." in told[4]
    assert "2 seeds" in told[-1]


def test_the_verdict_of_one_seed_says_so():
    groups = {
        "lora:8": [made_result(0, [0.5, 0.8, 0.8], 1000)],
        "vblora": [made_result(0, [0.5, 0.79, 0.81], 800)],
    }
    told = verdict(compared(groups, "lora:8", "accuracy"))
    assert told[0].startswith("vblora came to 98%")
    assert "difference shown" not in " ".join(told)
    assert "1.2" not in told[2]
    assert told[2].endswith("0.8 times its bytes.")
    assert told[-1].startswith("One seed:")


def test_a_baseline_that_learned_nothing_gives_no_winner():
    flat = [0.5, 0.5, 0.5, 0.5]
    groups = {name: [made_result(0, flat, sent)] for name, sent in (("lora:8", 1000), ("vblora", 10))}
    comparison = compared(groups, "lora:8", "accuracy")
    assert verdict(comparison)[0] == (
        "Before any training lora:8 was at 98% of its own accuracy: bytes to it tell nothing."
    )
    assert {columns(comparison)["to 98%"](row) for row in comparison.rows} == {"at the start"}


def seeds_of(scores: list[list[float]]) -> Comparison:
    """LoRA with these scores, seed by seed; VB-LoRA, at a hundredth of the bytes, as good after round 1."""
    rise = [0.5, 0.9, 0.9, 0.9]
    return compared(
        {
            "lora:8": [made_result(seed, own, 1000) for seed, own in enumerate(scores)],
            "vblora": [made_result(seed, rise, 10) for seed in range(len(scores))],
        },
        "lora:8",
        "accuracy",
    )


def test_no_winner_where_the_baseline_learned_nothing_in_most_seeds():
    flat, rise = [0.5, 0.5, 0.5, 0.5], [0.5, 0.8, 0.8, 0.8]
    assert verdict(seeds_of([flat, flat, rise]))[:2] == [
        "Before any training lora:8 was at 98% of its own accuracy in 2 of 3 seeds: "
        "bytes to it tell nothing.",
        "vblora: accuracy 0.9000, +30.0 (−13.0 to +73.0) points against lora:8, no difference shown; "
        "1/100 of its bytes.",
    ]


def test_a_seed_whose_baseline_learned_nothing_gives_no_bytes():
    """Neither nothing at all, nor the mean of that and what another seed took."""
    flat, rise = [0.5, 0.5, 0.5, 0.5], [0.5, 0.8, 0.8, 0.8]
    comparison = seeds_of([flat, rise])
    assert verdict(comparison)[:3] == [
        "vblora came to 98% of lora:8's accuracy with the fewest bytes: 10 B (1 of 1 seeds).",
        "Then lora:8 with 1.0 kB (1 of 1).",
        "Before any training lora:8 was at 98% of its own accuracy in 1 of 2 seeds: "
        "no bytes are counted there.",
    ]
    assert comparison.rows[1].targets[0.98] == Reached(1, 1, 10, at_start=1)
    falls = compared({"lora:8": [made_result(0, [0.5, 0.4, 0.4], 9)]}, "lora:8", "accuracy")
    assert falls.rows[0].targets[1.0] == Reached(0, 0, None, at_start=1)


def test_of_a_loss_points_are_not_told():
    groups = {"lora:8": [made_result(0, [2.0, 1.0], 1000)], "vblora": [made_result(0, [2.0, 1.1], 10)]}
    assert "to −0.5 points" not in columns(compared(groups, "lora:8", "loss"))


def test_without_a_baseline_there_is_no_verdict():
    comparison = compared({"vblora": [made_result(0, [0.1, 0.2], 9)]}, "lora:8", "accuracy")
    assert verdict(comparison) == ["No LoRA among the runs: nothing to compare with."]


def test_markdown():
    assert markdown(["a", "b"], [["x", "1"], ["y", "2"]]) == (
        "| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |"
    )


def test_columns_show_every_row():
    comparison = made_comparison()
    shown = columns(comparison)
    cells = {
        row.name: dict(zip(shown, (show(row) for show in shown.values()), strict=True))
        for row in comparison.rows
    }
    assert cells["vblora"] == {
        "adapter": "vblora",
        "accuracy, last three": "0.7800 ± 0.0000",
        "best": "0.7800",
        "against lora:8 float32": "−2.0 (−2.0 to −2.0)",
        "against lora:8": "−1.5 (−7.9 to +4.9)",
        "up": "500 B",
        "down": "500 B",
        "in all": "4.0 kB",
        "fewer than lora:8 float32": "100.0 ×",
        "fewer than lora:8": "10.0 ×",
        "to 95%": "2.0 kB",
        "to 98%": "not reached",
        "to 100%": "not reached",
        "to −0.5 points": "not reached",
        "seconds": "12",
        "memory": "500.0 MB",
    }
    assert cells["lora:8"]["to 100%"] == "1 of 2"
    assert cells["lora:8"]["against lora:8"] == ""
    assert cells["lora:8 float32"]["to −0.5 points"] == "200.0 kB"
    assert set(few_columns(comparison)) == {"adapter", "accuracy", "against LoRA", "in all", "to 98%"}


def test_bytes_by_section():
    headings, cells = section_cells(made_comparison())
    assert headings == ["adapter", "all", "rows", "frame"]
    assert cells[1] == ["vblora", "500 B", "400 B", "100 B"]


def test_what_goes_up_in_all_is_told_once():
    """Not rounded otherwise from one table to the next."""
    result = replace(made_result(0, [0.5, 0.8], 9, rows=64349.6, frame=0.1), up=64350)
    comparison = compared({"lora:8": [result]}, "lora:8", "accuracy")
    assert section_cells(comparison)[1][0][1] == columns(comparison)["up"](comparison.rows[0])


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (Interval(-0.0001, None, None, 1), "0.0"),
        (Interval(0.0001, -0.0104, 0.0004, 2), "0.0 (−1.0 to 0.0)"),
        (Interval(0.012, 0.0004, 0.024, 2), "+1.2 (0.0 to +2.4)"),
    ],
)
def test_no_difference_has_no_sign(found: Interval, shown: str):
    assert difference(found, "accuracy") == shown


def test_a_mean_of_fewer_than_three_evaluations_is_named_so():
    groups = {name: [made_result(0, [0.1, 0.4, 0.6], 10)] for name in ("lora:8", "vblora")}
    comparison = compared(groups, "lora:8", "accuracy")
    shown = columns(comparison)["accuracy, last two"]
    assert {shown(row) for row in comparison.rows} == {"0.5000"}
