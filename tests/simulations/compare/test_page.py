"""The report and its pictures: whole in one file, the same each time, told in words too."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from simulations.compare.files import unreported, write_files
from simulations.compare.page import page
from simulations.compare.plots import DARK, by_bytes, by_round, by_section, svg
from simulations.compare.results import compared
from simulations.compare.tables import verdict
from tests.simulations.compare.made import made_comparison, made_outcome, made_result

VOID = {"meta", "img", "source", "br"}


class Reader(HTMLParser):
    """Keeps what a page is made of, and sees that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report() -> str:
    return page(made_outcome(Path("cmp")), "fedvb compare --data '<b>reviews</b>.csv'")


def test_the_report_needs_nothing_else(report: str):
    """No address, no script, no file: pictures are in it."""
    reader = Reader()
    reader.feed(report)
    assert reader.open == []
    assert not re.search(r"(?:src|href|srcset|url)\s*=?\s*[\"'(]+(?!data:)", report)
    assert "http://" not in report
    assert "https://" not in report
    assert "script" not in {tag for tag, _ in reader.elements}


def test_the_report_can_be_read_by_all(report: str):
    reader = Reader()
    reader.feed(report)
    images = [attributes for tag, attributes in reader.elements if tag == "img"]
    assert len(images) == 3
    for image in images:
        assert "lora:8 float32" in str(image["alt"])
    assert [tag for tag, _ in reader.elements].count("source") == 3  # the same for dark pages
    assert 'name="viewport"' in report
    for tag, attributes in reader.elements:
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    tables = [attributes for _, attributes in reader.elements if attributes.get("class") == "scroll"]
    assert tables
    assert all(table["tabindex"] == "0" and table["aria-label"] for table in tables)


def test_the_report_tells_verdict_protocol_and_rates(report: str):
    for told in (
        "lora:8 came to 98% of lora:8 float32&#x27;s accuracy",
        "&lt;b&gt;reviews&lt;/b&gt;.csv",
        "Chosen for each adapter alike: 0.5, 1, 2 times its default rate",
        "seed 1000",
        "broke off",
        "0.016, at the edge",
        "CPU; runs at a time: 2, processes of each: 1, threads of each: 1. torch 2.13.0.",
    ):
        assert told in report
    assert "<b>" not in report
    assert "$" not in re.sub(r"base64,[^\"]*", "", report)


def test_how_texts_are_dealt_is_told_where_nobody_chose():
    outcome = made_outcome(Path("cmp"))
    protocol = replace(outcome.protocol, base={**outcome.protocol.base, "partition": "auto"})
    assert "dealt by dirichlet:0.5; " in page(replace(outcome, protocol=protocol), "fedvb compare")


def test_what_was_skipped_is_said():
    outcome = made_outcome(Path("cmp"), tune=0)
    assert "Skipped: rates were not tuned." in page(outcome, "fedvb compare")
    assert outcome.verdict[-1].startswith("Rates were not tuned: ")
    assert made_outcome(Path("cmp")).verdict == verdict(outcome.comparison)


def test_each_row_shows_its_own_sections_around_its_middle():
    groups = {
        "lora:8": [made_result(0, [0.5, 0.8], 900, rows=300.0, head=100.0, frame=50.0)],
        "vblora": [made_result(0, [0.5, 0.8], 200, bank=60.0, head=40.0)],
    }
    figure = by_section(compared(groups, "lora:8", "accuracy"))
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in figure.axes[0].patches]
    middles = {size: round(middle, 3) for middle, size in bars}
    assert len(bars) == 5
    assert middles[100.0] == 1
    assert middles[300.0] > 1 > middles[50.0]
    assert middles[60.0] + middles[40.0] == pytest.approx(0)


def test_many_names_below_a_picture_leave_it_its_height():
    """And lines that share a colour have different markers."""
    few, rise = made_comparison(), [0.5, 0.7, 0.8]
    many = compared(
        {f"vblora:{place} wire=smallest": [made_result(0, rise, 1000)] for place in range(1, 14)},
        "",
        "accuracy",
    )
    heights = []
    for figure in (by_bytes(few), by_bytes(many)):
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] > 0.8 * heights[0]
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}) == 13


@pytest.mark.parametrize("draw", [by_round, by_bytes, by_section])
def test_a_picture_is_the_same_each_time(draw):
    drawing = svg(draw(made_comparison(), DARK))
    assert drawing == svg(draw(made_comparison(), DARK))
    assert "<svg" in drawing
    names = r"xmlns(:\w+)?=\"[^\"]*\"|<!DOCTYPE[^>]*>|<metadata>.*</metadata>"
    assert "http" not in re.sub(names, "", drawing, flags=re.DOTALL)


def test_all_files_of_a_comparison(tmp_path: Path):
    write_files(made_outcome(tmp_path), "fedvb compare")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("comparison.json", "comparison.md", "report.html"),
        *("score-by-round.png", "score-by-bytes.png", "bytes-by-part.png"),
    }
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["baseline"] == "lora:8 float32"
    assert content["protocol"]["config"]["out"] == str(tmp_path)
    assert content["protocol"]["trials"]["vblora"][2] == {"rate": 0.016, "scores": [0.72], "chosen": True}
    assert content["verdict"][0].startswith("lora:8 came to 98%")
    table = (tmp_path / "comparison.md").read_text()
    assert table.startswith("```sh\nfedvb compare\n```\n")
    assert "| vblora | 0.7800 ± 0.0000 |" in table
    for name in ("score-by-round.png", "score-by-bytes.png", "bytes-by-part.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_runs_of_adapters_that_were_not_named_again_are_told(tmp_path: Path):
    for name in ("vblora", "lora-8", "lora-8-float32", "lora-xs-32"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert unreported(made_outcome(tmp_path).protocol) == ["lora-xs-32"]
    assert unreported(made_outcome(tmp_path / "none").protocol) == []
