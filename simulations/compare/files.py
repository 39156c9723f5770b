"""What a comparison leaves: `comparison.json`, Markdown tables, pictures, the report."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from simulations.compare.page import page
from simulations.compare.plots import by_bytes, by_round, by_section, save_png
from simulations.compare.protocol import Protocol
from simulations.compare.results import as_json
from simulations.compare.study import Outcome
from simulations.compare.tables import columns, markdown, section_cells
from vblora.files import write_atomic

__all__ = ["unreported", "write_files"]

PICTURES = {"score-by-round.png": by_round, "score-by-bytes.png": by_bytes, "bytes-by-part.png": by_section}


def write_files(outcome: Outcome, command: str) -> None:
    """Write all files into the comparison's directory, each whole or not at all."""
    out = outcome.protocol.out
    write_atomic(out / "comparison.json", json.dumps(_content(outcome, command), indent=1) + "\n")
    write_atomic(out / "comparison.md", _tables(outcome, command))
    for name, draw in PICTURES.items():
        save_png(draw(outcome.comparison), out / name)
    write_atomic(out / "report.html", page(outcome, command))


def unreported(protocol: Protocol) -> list[str]:
    """Folders of runs that lie there of adapters that were not named this time."""
    named = {protocol.folder(name) for name in protocol.contenders}
    return sorted(path.name for path in (protocol.out / "runs").glob("*") if path not in named)


def _content(outcome: Outcome, command: str) -> dict[str, Any]:
    protocol = outcome.protocol
    return {
        "verdict": outcome.verdict,
        **as_json(outcome.comparison),
        "protocol": {
            "command": command,
            "config": {**protocol.base, "out": str(protocol.out)},
            "contenders": {name: asdict(contender) for name, contender in protocol.contenders.items()},
            "seeds": protocol.seeds,
            "tune": protocol.tune,
            "trials": {name: [asdict(trial) for trial in tried] for name, tried in outcome.trials.items()},
        },
        "machine": dict(outcome.machine),
    }


def _tables(outcome: Outcome, command: str) -> str:
    comparison = outcome.comparison
    shown = columns(comparison)
    scores = markdown(list(shown), [[show(row) for show in shown.values()] for row in comparison.rows])
    told = "\n".join(f"- {line}" for line in outcome.verdict)
    return f"```sh\n{command}\n```\n\n{told}\n\n{scores}\n\n{markdown(*section_cells(comparison))}\n"
