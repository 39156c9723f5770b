"""Commands to run a site with: `fedvb trainer`, `site`.

`site` is Flower's own SuperNode, with TLS and a key unless told otherwise.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from simulations.flower_programs import become, make_home, require_free, warn_insecure
from vblora.errors import ConfigError, raise_faults

__all__ = ["add_commands"]

LONGEST_NAME = 64
NOT_OPTIONS = ("state", "socket", "max_length", "train_seconds", "max_steps", "log_json")


def add_commands(app: typer.Typer) -> None:
    """Add them to the command line."""
    for command in (trainer, site):
        app.command()(command)


def trainer(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Base model: a local folder, a hub id, or minilm.")],
    data: Annotated[
        str,
        typer.Option(help="This site's text: a csv/tsv/json/jsonl/parquet/txt file, or a folder of them."),
    ],
    state: Annotated[Path, typer.Option(help="Folder for what must outlive a restart; of one trainer.")],
    socket: Annotated[
        Path | None, typer.Option(help="Unix socket to answer on; else trainer.sock in --state.")
    ] = None,
    labels: Annotated[
        str, typer.Option(help="All classes by comma, the same at every site; else the run's, or the data's.")
    ] = "",
    task: Annotated[str, typer.Option(help="classification, causal-lm, or auto.")] = "auto",
    text_column: Annotated[str, typer.Option(help="Column of the text, if not a usual name.")] = "",
    label_column: Annotated[str, typer.Option(help="Column of the label, if not a usual name.")] = "",
    eval_split: Annotated[str, typer.Option(help="Held-out files to score on: dev, test, dev+test.")] = "",
    max_examples: Annotated[int, typer.Option(help="Training texts at most; 0 is all.")] = 0,
    eval_examples: Annotated[int, typer.Option(help="Held-out texts at most; 0 is all.")] = 0,
    max_length: Annotated[int, typer.Option(help="Tokens of a text at most, as in the run.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the base: auto, own (the files'), float32, bfloat16, float16.")
    ] = "auto",
    quantize: Annotated[str, typer.Option(help="Of the base: none, 4bit, 8bit; else as the run says.")] = "",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Keep no inputs that are cheap to make again: less memory.")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute each block twice: much less memory, slower.")
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Replay steps: faster where batches are small.")
    ] = False,
    accumulate: Annotated[
        int, typer.Option(min=0, help="Pieces that a step's texts are passed in; 0 leaves it to the run.")
    ] = 0,
    start: Annotated[
        str, typer.Option(help="Adapter that the run goes on from: the same files as the server's.")
    ] = "",
    train_seconds: Annotated[
        float, typer.Option(help="Of a round at most; then it sends what it has. 0 leaves it to the run.")
    ] = 0.0,
    max_steps: Annotated[int, typer.Option(help="Steps of a round at most; 0 leaves it to the run.")] = 0,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log JSON, an object a line, instead of text.")
    ] = False,
) -> None:
    """Keep model and data loaded at a site, and train when its SuperNode is asked to.

    Texts never leave this process: what it answers are counts, sums of
    losses, and updates. fedvb site takes the same --socket.
    """
    from fl_client.discreet import shut_out_others

    shut_out_others()  # before the seconds that the next two take
    from fl_client.resident import Budget
    from fl_client.trainer import run_trainer

    if data == "docstrings":
        raise ConfigError("--data docstrings: a site trains on its own text; expected a file or a folder")
    budget = Budget(train_seconds, max_steps)
    _log_lines(log_json)
    own: dict[str, Any] = {
        name.replace("_", "-"): value
        for name, value in context.params.items()
        if name not in NOT_OPTIONS and value not in ("", "auto", 0)
    }
    run_trainer(own, state, socket, {"max-length": max_length}, budget)


def site(
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the server.")],
    socket: Annotated[Path | None, typer.Option(help="Socket of this machine's fedvb trainer.")] = None,
    key: Annotated[Path | None, typer.Option(help="Private key of this node, as node-1.")] = None,
    ca: Annotated[
        Path | None, typer.Option(help="Certificate of the authority; else ca.crt beside --key.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the site, in logs and histories; else its node id.")] = "",
    state: Annotated[Path, typer.Option(help="Folder of Flower's home.")] = Path("supernode"),
    port: Annotated[
        int,
        typer.Option(
            min=1, max=65535, metavar="INTEGER", help="For Flower's own use on this machine; one a node."
        ),
    ] = 9094,
    model: Annotated[str, typer.Option(help="Base model, to train with where no trainer runs.")] = "",
    data: Annotated[str, typer.Option(help="Texts, to train on where no trainer runs.")] = "",
    labels: Annotated[str, typer.Option(help="All classes by comma, where no trainer runs.")] = "",
    text_column: Annotated[str, typer.Option(help="As fedvb trainer's, where none runs.")] = "",
    label_column: Annotated[str, typer.Option(help="As fedvb trainer's, where none runs.")] = "",
    eval_split: Annotated[str, typer.Option(help="As fedvb trainer's, where none runs.")] = "",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, no key: for a server that has none either.")
    ] = False,
) -> None:
    """Run Flower's SuperNode for this site, over TLS, with its key.

    With --model and --data it trains by itself where no trainer answers,
    which loads the model for every message anew.
    """
    from fl_client.thin import checked_socket
    from fl_server.keys import check_node_keys

    told = {"name": name, "model": model, "data": data, "labels": labels}
    told |= {"text-column": text_column, "label-column": label_column, "eval-split": eval_split}
    if socket is not None:
        told["socket"] = str(checked_socket(socket))
    if data:
        told["state"] = str((state / "memory").absolute())
    raise_faults("site", _faults(told, superlink))
    config = " ".join(f'{key}="{value}"' for key, value in told.items() if value)
    arguments = ["--superlink", superlink, "--port", str(port), "--node-config", config]
    if insecure:
        warn_insecure()
        arguments += ["--insecure"]
    else:
        if key is None:
            raise ConfigError("--key: which key is this node's? fedvb keys makes them; or say --insecure")
        authority = ca or key.parent / "ca.crt"
        check_node_keys(key, authority)
        arguments += ["--root-certificates", str(authority), "--auth-supernode-private-key", str(key)]
    require_free("127.0.0.1", port)
    make_home(state)
    become("flower-supernode", arguments, state)


def _faults(told: dict[str, str], superlink: str) -> Iterator[str]:
    if not told.get("socket") and not told["data"]:
        yield "neither --socket nor --data; name the socket of fedvb trainer, or what to train on without one"
    if bool(told["data"]) != bool(told["model"]):
        yield "--model and --data go together"
    if len(told["name"]) > LONGEST_NAME:
        yield f"--name has {len(told['name'])} characters, expected {LONGEST_NAME} at most"
    for name, value in told.items():
        if any(character in '"\\' or not character.isprintable() for character in value):
            yield f"--{name} is {value!r:.80}, expected no quotes, backslashes or control characters"
    host, _, port = superlink.rpartition(":")
    if not host or not port.isdecimal():
        yield f"--superlink is {superlink!r:.80}, expected HOST:PORT, as fed.example.org:8000"


class _JsonLines(logging.Formatter):
    """A log record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)


def _log_lines(as_json: bool) -> None:
    """Log to standard error, a line an event: what journald and a terminal both want."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(_JsonLines() if as_json else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("fedvb").setLevel(logging.INFO)
