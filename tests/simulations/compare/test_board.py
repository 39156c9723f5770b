"""What a terminal shows while a comparison is at work."""

from __future__ import annotations

import io

from rich.console import Console

from simulations.compare.board import Board
from simulations.compare.protocol import Planned


def planned(name: str, tuning: bool = False) -> Planned:
    return Planned(name, 0.002, 0, tuning, {"rounds": 4, "out": name})


def test_lines_of_runs_where_nobody_watches():
    file = io.StringIO()
    first, second = planned("lora:8", tuning=True), planned("[vblora]")
    with Board(Console(file=file, width=80), 2, 60) as board:
        board.run_started(first)
        board.run_started(second)
        board.round_done(first, 0)
        board.run_ended(first, "")
        board.run_ended(second, "out of memory")
    assert file.getvalue().splitlines() == [
        "   1/2  tuning lora:8, rate 0.002, seed 0: 0 s",
        "   2/2  [vblora], rate 0.002, seed 0: not finished: out of memory",
    ]


def test_what_is_at_work_and_the_time_left():
    console = Console(file=io.StringIO(), width=80)
    board = Board(console, 3, 90)
    run = planned("lora:8")
    board.run_started(run)
    for number in range(3):
        board.round_done(run, number)
    with console.capture() as shown:
        console.print(board._picture())
    head, line = shown.get().splitlines()
    assert head.startswith("0 of 3 runs ")
    assert head.rstrip().endswith(" 90 s left")  # as was thought: no run's worth is done yet
    assert line == "lora:8, rate 0.002, seed 0: round 2/4"
