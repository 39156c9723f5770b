"""Many runs of one study, side by side: which settings learn best, over seeds.

Needs neither Flower nor the data libraries. A study is a JSON file, `{"base": {...}, "runs": [{...}, ...],
"seeds": [0, 1, 2]}`; the objects hold keys of a config (`fedvb simulate --help`, with dashes). A machine
with a GPU and little else trains what another one prepared:

    python -m simulations.bench.learning study.json --texts DIR --prepare         # where the data is
    python -m simulations.bench.learning study.json --texts DIR --processes 10 --json results.json
    python -m simulations.bench.learning other.json --rates results.json          # at the best rates found
    python -m simulations.bench.learning --table results.json --plot scores.png   # what --json left
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fl_client.assembly import assemble, load_texts, save_texts
from fl_client.base import find_device, load_base
from fl_client.serve import answer
from fl_client.settings import SiteSettings
from fl_server.plot import read_history
from fl_server.rounds import run_rounds
from fl_server.settings import ServerSettings
from simulations.bench.origin import commit_of_code, read_results, retold_commands, with_rates
from simulations.bench.pool import in_processes
from simulations.bench.rivals import comparisons, tables
from simulations.compare.results import trace
from simulations.config import default_config
from simulations.direct import DirectExchange
from vblora.errors import FedVBError, RunError
from vblora.files import write_atomic
from vblora.versions import installed_versions

__all__ = ["main", "read_study", "run_one", "table", "texts_file"]

Config = dict[str, Any]

STUDY = '{"base": {...}, "runs": [{...}, ...], "seeds": [0, ...]} with keys of a config'
DIED = "its process died; fewer --processes if memory was short"
MEMORY = 0.9  # of a GPU, for all tensors of the processes that share it; CUDA itself takes some for each


def read_study(path: Path) -> list[Config]:
    """All runs of a study, one config for each setting and seed.

    Raises:
        RunError: the file is no study, or a key is none of a config.
    """
    try:
        study = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not readable ({error}), expected a study: {STUDY}") from error
    if faults := list(_study_faults(study)):
        raise RunError(f"{path}: {'; '.join(faults)}; expected {STUDY}")
    seeds = study.get("seeds", [0])
    # Seed by seed, so that a study that is cut short has tried every setting.
    return [{**study.get("base", {}), "seed": seed, **run} for seed in seeds for run in study["runs"]]


def _study_faults(study: Any) -> Iterator[str]:
    if not isinstance(study, dict):
        yield "not an object"
        return
    if unknown := sorted(study.keys() - {"base", "runs", "seeds"}):
        yield f"unknown parts: {', '.join(unknown)}"
    base, runs, seeds = study.get("base", {}), study.get("runs"), study.get("seeds", [0])
    configs = [base, *runs] if isinstance(runs, list) else [base]
    if not isinstance(runs, list) or not runs:
        yield "no list of runs"
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        yield f"seeds is {seeds!r}"
    if not all(isinstance(config, dict) for config in configs):
        yield "base or a run is not an object"
    elif unknown := sorted({key for config in configs for key in config} - default_config().keys()):
        yield f"unknown keys: {', '.join(unknown)}"


def run_one(config: Mapping[str, Any], texts: Path, model: str = "") -> dict[str, Any]:
    """Train one run on prepared texts; the summary with its config.

    Args:
        config: of the run.
        texts: folder of prepared texts.
        model: where the base lies, if elsewhere than the config says.
    """
    torch.set_num_threads(1)
    started = time.monotonic()
    settings = SiteSettings.from_run_config(config)
    prepared = load_texts(texts_file(texts, settings))
    device = find_device(settings.device)
    base = load_base(
        model or settings.model,
        prepared.labels,
        device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        seed=settings.data.seed,
    )
    site = assemble(settings, prepared, base)
    with tempfile.TemporaryDirectory() as out:
        server = ServerSettings.from_run_config({**config, "out": out})
        exchange = DirectExchange(partial(answer, site), server.clients)
        summary = run_rounds(exchange, server, _Silent())
        traced = trace(read_history(Path(out)))
    wall = time.monotonic() - started
    summary["versions"]["client"] |= _versions()
    return {"config": dict(config), **summary, **traced, "wall": wall, "device": _device_name()}


def _versions() -> dict[str, str]:
    """Of what trains; prepared texts know those of the machine that prepared them."""
    return {**installed_versions(("transformers", "numpy")), "torch": torch.__version__}


def prepare(configs: list[Config], texts: Path, model: str = "") -> None:
    """Write the texts that the runs need, each once."""
    from fl_client.opening import prepare_texts  # the data libraries are needed here alone

    for config in configs:
        settings = SiteSettings.from_run_config(config)
        target = texts_file(texts, settings)
        if not target.exists():
            save_texts(target, prepare_texts(replace(settings, model=model or settings.model)))
            print(
                f"{target}: {config.get('data')}, {config.get('partition')}, seed {config.get('seed')}",
                flush=True,
            )


def table(results: list[dict[str, Any]]) -> str:
    """One line a setting: mean and spread of the scores over seeds, bytes up; best first.

    Where clients were scored on their own texts, their mean (`own`) and spread follow, and `own` decides.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        key = json.dumps(
            {name: value for name, value in result["config"].items() if name != "seed"}, sort_keys=True
        )
        groups.setdefault(key, []).append(result)
    common = set.intersection(*(set(json.loads(key).items()) for key in groups)) if groups else set()
    own = bool(results) and all("own_last3" in run["score"] for run in results)
    better = -1 if results and results[0]["score"]["metric"] == "loss" else 1
    ranked = sorted(
        groups.items(), key=lambda item: -better * _mean(item[1], "own_last3" if own else "last3")
    )
    texts = bool(results) and all("texts" in run["score"] for run in results)
    before = f"{'own':>7} {'±':>6} {'spread':>6} " if own else ""
    after = f" {'BLEU':>6} {'ROUGE-L':>7}" if texts else ""
    lines = [f"{before}{'last3':>7} {'±':>6} {'best':>7}{after} {'up kB':>8} {'n':>2}  settings"]
    for key, runs in ranked:
        sent = statistics.mean(run["bytes"]["up_per_client_round"] for run in runs) / 1000
        differing = {name: value for name, value in json.loads(key).items() if (name, value) not in common}
        shown = " ".join(f"{name}={value}" for name, value in differing.items())
        lines.append(f"{_scores(runs, own, texts)} {sent:8.1f} {len(runs):2}  {shown}")
    return "\n".join(lines)


def _scores(runs: list[dict[str, Any]], own: bool, texts: bool) -> str:
    cells = [_cells(runs, "own_last3"), f"{_mean(runs, 'own_std'):6.4f}"] if own else []
    cells += [_cells(runs, "last3"), f"{_mean(runs, 'best'):7.4f}"]
    if texts:
        means = [statistics.mean(run["score"]["texts"][name] for run in runs) for name in ("bleu", "rouge_l")]
        cells += [f"{means[0]:6.2f} {means[1]:7.4f}"]
    return " ".join(cells)


def _mean(runs: list[dict[str, Any]], name: str) -> float:
    found: list[float] = [run["score"][name] for run in runs]
    return statistics.mean(found)


def _cells(runs: list[dict[str, Any]], name: str) -> str:
    """Mean and spread over seeds."""
    found = [run["score"][name] for run in runs]
    return f"{_mean(runs, name):7.4f} {statistics.stdev(found) if len(found) > 1 else 0.0:6.4f}"


def main(arguments: list[str] | None = None) -> None:
    """Run a study from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, nargs="?", help="JSON file of the study")
    parser.add_argument("--texts", type=Path, default=Path("texts"), help="folder of prepared texts")
    parser.add_argument("--prepare", action="store_true", help="write the prepared texts, train nothing")
    parser.add_argument("--model", default="", help="base model, where it lies elsewhere than the study says")
    parser.add_argument("--processes", type=_positive, default=1, help="runs at a time")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="stop waiting for runs after this time; 0 never"
    )
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument(
        "--rates",
        type=Path,
        action="append",
        default=[],
        help="results of a study of rates with eval-split train: run each method at its best",
    )
    parser.add_argument("--commit", default="", help="of this code, where git cannot tell")
    parser.add_argument(
        "--table",
        type=Path,
        action="append",
        help="print results against LoRA r8, in Markdown; train nothing",
    )
    parser.add_argument("--plot", type=Path, help="with --table: draw scores against bytes, a PNG")
    given = parser.parse_args(arguments)
    if given.study is None and not given.table:
        parser.error("which study? name its file, or --table and what --json left")
    try:
        if given.table:
            _tell(given.table, given.plot)
        else:
            _run(given)
    except FedVBError as error:
        parser.error(str(error))


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _run(given: argparse.Namespace) -> None:
    configs = read_study(given.study)
    if given.rates:
        configs = with_rates(configs, read_results(given.rates))
    if given.prepare:
        prepare(configs, given.texts, given.model)
        return
    origin = {
        "command": retold_commands(given.study, given.rates),
        "commit": given.commit or commit_of_code(),
    }
    if given.json is not None:
        _require_place(given.json)
    train = partial(_guarded, texts=given.texts, model=given.model)
    results = _run_all(configs, train, given.processes, given.seconds, given.json, origin)
    finished = [result for result in results if "error" not in result]
    print(f"{len(finished)} of {len(configs)} runs; torch {torch.__version__}, {_device_name()}")
    print(table(finished))
    print(f"\n{tables(finished)}")
    if len(finished) < len(configs):
        sys.exit(1)


def _require_place(target: Path) -> None:
    """See that results can be written, before hours are spent on them."""
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise RunError(f"--json: {target} cannot be written; expected a file in a folder that is there")


def _tell(files: list[Path], plot: Path | None) -> None:
    """Print what `--json` left, of one study or several of one protocol, and draw it."""
    found = read_results(files)
    print(tables(found))
    if plot is not None:
        from simulations.compare.plots import by_bytes, save_png

        for number, (_, comparison) in enumerate(comparisons(found)):
            save_png(by_bytes(comparison), plot.with_stem(f"{plot.stem}-{number}") if number else plot)


def _run_all(
    configs: list[Config],
    train: Callable[[Config], dict[str, Any]],
    processes: int,
    seconds: float,
    target: Path | None,
    origin: Mapping[str, str],
) -> list[dict[str, Any]]:
    """What each run came to, or its error; `target` holds it as it comes."""
    started = time.monotonic()
    results: list[dict[str, Any]] = []
    start = partial(_take_gpu, processes=min(processes, len(configs)))
    for config, result in in_processes(train, configs, processes, start, seconds):
        found = result or {"config": config, "error": DIED}
        found["origin"] = {**origin, "device": found.pop("device", "")}
        results.append(found)
        shown = found.get("error") or f"last3 {found['score']['last3']:.4f} best {found['score']['best']:.4f}"
        print(f"{time.monotonic() - started:6.0f} s  {shown}  {json.dumps(found['config'])}", flush=True)
        if target is not None:
            write_atomic(target, json.dumps(results))
    return results


def _take_gpu(number: int, processes: int) -> None:
    """Give a process one of the machine's GPUs, in turn, before CUDA looks, and a share of its memory.

    A run that chooses its own cohort would fill the GPU, and those beside it would run out of memory.
    """
    gpus = 1
    if "CUDA_VISIBLE_DEVICES" not in os.environ and (found := len(list(Path("/dev").glob("nvidia[0-9]*")))):
        os.environ["CUDA_VISIBLE_DEVICES"], gpus = str(number % found), found
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(MEMORY / -(-processes // gpus))
    torch.set_float32_matmul_precision("high")


def _guarded(config: Config, texts: Path, model: str) -> dict[str, Any]:
    """One bad setting must not end a study of hundreds."""
    warnings.simplefilter("ignore")
    try:
        return run_one(config, texts, model)
    except Exception as error:
        return {"config": config, "error": f"{type(error).__name__}: {error}"}


def texts_file(texts: Path, settings: SiteSettings) -> Path:
    """By the data and the model whose tokens they are."""
    key = repr((settings.data, settings.model))
    return texts / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


class _Silent:
    """An `Observer` that says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


if __name__ == "__main__":
    main(sys.argv[1:])
