"""Commands to run servers and sites with: `fedvb keys`, `server`, `site`, `trainer`, `status`, `watch`.

`server` and `site` are Flower's own SuperLink and SuperNode, with TLS and keys unless told otherwise.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vblora.errors import ConfigError, RunError

if TYPE_CHECKING:
    from fl_server.status import RunStatus

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Add them to the command line."""
    for command in (keys, server, site, trainer, status, watch):
        app.command()(command)


def keys(
    out: Annotated[Path, typer.Option(help="Folder of the keys; what is there stays.")],
    nodes: Annotated[int, typer.Option(help="Nodes in all; more than before adds the new ones.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address that nodes call the server by; may be given again."),
    ] = None,
    port: Annotated[int, typer.Option(help="Of the server.")] = 8000,
) -> None:
    """Make the keys of a federation: an authority, the server's certificate, one key a node.

    Prints what goes where, and the commands that let the nodes in. Keep
    ca.key off the server: it is needed only to make more certificates.
    """
    from fl_server.keys import CONNECTION, make_keys

    made = make_keys(out, nodes, host or ["localhost", "127.0.0.1"], port)
    print(f"made {', '.join(made.made) or 'nothing new'} in {out}")
    print(f"server    {out}/server.pem, server.key, ca.crt; good for {', '.join(made.hosts)}")
    print(f"site n    {out}/ca.crt, node-n: nothing else")
    print("let the nodes in, once the server runs:")
    for number in made.nodes:
        print(f"  FLWR_HOME={out}/flwr flwr supernode register {out}/node-{number}.pub {CONNECTION}")


def server(
    keys: Annotated[Path | None, typer.Option(help="Folder that fedvb keys made.")] = None,
    state: Annotated[Path, typer.Option(help="Folder of Flower's database and home.")] = Path("superlink"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, no keys: anyone may read, and join.")
    ] = False,
) -> None:
    """Run Flower's SuperLink, over TLS, open to registered nodes only."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    arguments = ["--host", host, "--port", str(port), "--database", str(state / "superlink.db")]
    if insecure:
        _warn_insecure()
        arguments += ["--insecure"]
    else:
        folder = _keys_folder(keys, "ca.crt", "server.pem", "server.key")
        arguments += [
            *("--ssl-ca-certfile", f"{folder}/ca.crt", "--ssl-certfile", f"{folder}/server.pem"),
            *("--ssl-keyfile", f"{folder}/server.key", "--enable-supernode-auth"),
        ]
    _become("flower-superlink", [*arguments, "--disable-runtime-dependency-installation"], state)


def site(
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the server.")],
    socket: Annotated[Path, typer.Option(help="Socket of this machine's fedvb trainer.")],
    key: Annotated[Path | None, typer.Option(help="Private key of this node, as node-1.")] = None,
    ca: Annotated[
        Path | None, typer.Option(help="Certificate of the authority; else ca.crt beside --key.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the site, in logs and histories; else its node id.")] = "",
    state: Annotated[Path, typer.Option(help="Folder of Flower's home.")] = Path("supernode"),
    port: Annotated[int, typer.Option(help="For Flower's own use on this machine; one a node.")] = 9094,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, no key: for a server that has none either.")
    ] = False,
) -> None:
    """Run Flower's SuperNode for this site, over TLS, with its key."""
    from fl_client.thin import checked_socket

    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    told = f'socket="{checked_socket(socket)}"' + (f' name="{name}"' if name else "")
    arguments = ["--superlink", superlink, "--port", str(port), "--node-config", told]
    if insecure:
        _warn_insecure()
        arguments += ["--insecure"]
    else:
        if key is None:
            raise ConfigError("--key: which key is this node's? fedvb keys makes them; or say --insecure")
        authority = ca or key.parent / "ca.crt"
        for file in (key, authority):
            if not file.is_file():
                raise RunError(f"{file}: no such file; expected what fedvb keys made for this site")
        arguments += ["--root-certificates", str(authority), "--auth-supernode-private-key", str(key)]
    _become("flower-supernode", arguments, state)


def _keys_folder(keys: Path | None, *names: str) -> Path:
    if keys is None:
        raise ConfigError("--keys: where are they? fedvb keys makes them; or say --insecure")
    for name in names:
        if not (keys / name).is_file():
            raise RunError(f"{keys}: has no {name}; expected a folder that fedvb keys made")
    return keys


def _warn_insecure() -> None:
    print(
        "fedvb: --insecure: updates travel in plain text, and whoever reaches the port may join; for tests on"
        " one machine",
        file=sys.stderr,
    )


def _become(program: str, arguments: list[str], state: Path) -> None:
    """Turn this process into Flower's, with its home in `state` and no message to its makers."""
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.is_file() else shutil.which(program)
    if found is None:
        raise RunError(f"{program}: not found; pip install flwr")
    home = os.environ.get("FLWR_HOME", str((state / "flwr").absolute()))
    path = os.pathsep.join([str(Path(found).parent), os.environ.get("PATH", "")])  # Flower starts others
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    os.execve(found, [program, *arguments], {**quiet, **os.environ, "FLWR_HOME": home, "PATH": path})


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
    start: Annotated[
        str, typer.Option(help="Adapter that the run goes on from: the same files as the server's.")
    ] = "",
) -> None:
    """Keep model and data loaded at a site, and train when its SuperNode is asked to.

    Texts never leave this process: what it answers are counts, sums of
    losses, and updates. Give the SuperNode the socket:

      flower-supernode ... --node-config 'socket="DIR/trainer.sock" name="clinic-a"'
    """
    from fl_client.trainer import run_trainer

    if data == "docstrings":
        raise ConfigError("--data docstrings: a site trains on its own text; expected a file or a folder")
    log_lines()
    own: dict[str, Any] = {
        name.replace("_", "-"): value
        for name, value in context.params.items()
        if name not in ("state", "socket", "max_length") and value not in ("", "auto", 0)
    }
    run_trainer(own, state, socket, {"max-length": max_length})


def status(
    place: Annotated[Path, typer.Argument(help="Run directory, or the socket or folder of a trainer.")],
) -> None:
    """Tell where a run is and what its clients did, or what a trainer is at."""
    socket = place / "trainer.sock" if place.is_dir() else place
    if socket.is_socket():
        from fl_client.thin import trainer_status

        _print_trainer(trainer_status(socket))
    else:
        from fl_server.status import read_status

        _print_run(read_status(place))


def watch(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    tensorboard: Annotated[Path | None, typer.Option(help="Write TensorBoard's scalars here.")] = None,
    prometheus: Annotated[int | None, typer.Option(help="Serve Prometheus' metrics on this port.")] = None,
    host: Annotated[str, typer.Option(help="Address to serve them on.")] = "127.0.0.1",
    once: Annotated[bool, typer.Option("--once", help="Tell what is there, and end.")] = False,
) -> None:
    """Publish a run's rounds while they come: pip install 'fed-vblora[monitor]'."""
    from simulations import watch as publish

    if tensorboard is None and prometheus is None:
        raise ConfigError("watch: where to? name --tensorboard DIR, --prometheus PORT, or both")
    sinks = [publish.tensorboard(tensorboard)] if tensorboard else []
    sinks += [publish.prometheus(prometheus, host)] if prometheus is not None else []
    told = publish.watch(run, sinks, follow=not once)
    print(f"{told} rounds")


def _print_trainer(found: Any) -> None:
    busy = found.busy and f"{found.busy}, step {found.done} of {found.steps}"
    facts = {
        "trainer": f"process {found.pid}, {busy or 'idle'}",
        "model": found.model,
        "data": found.data,
        "so far": f"{found.answered} answers, {found.bases_loaded} times a base was loaded",
    }
    if found.gpu_peak_bytes:
        facts["GPU"] = f"{found.gpu_bytes / 2**30:.2f} GiB, at most {found.gpu_peak_bytes / 2**30:.2f} GiB"
    for name, fact in facts.items():
        print(f"{name:<9}{fact}")


def _print_run(found: RunStatus) -> None:
    done = "nothing" if found.round is None else f"round {found.round}"
    print(f"{'run':<9}{found.phase}" + (f": {found.why}" if found.why else ""))
    print(f"{'on disk':<9}{done}" + (f" of {found.rounds}" if found.rounds is not None else ""))
    shown = {"score": found.score, "train loss": found.train_loss}
    print(f"{'last':<9}" + (", ".join(f"{k} {v:.4f}" for k, v in shown.items() if v is not None) or "-"))
    print(f"{'bytes':<9}{found.up:,} up, {found.down:,} down; {found.missing} replies never came")
    if not found.clients:
        return
    now = datetime.now(UTC)
    print(f"\n{'client':<20}{'last seen':>12}{'replies':>9}{'rejected':>10}{'clipped':>9}  last reason")
    for name, client in found.clients.items():
        seen = f"{(now - client.seen).total_seconds():.0f} s ago" if client.seen else "never"
        counts = f"{client.replies:>9}{client.rejected:>10}{client.clipped:>9}"
        print(f"{name:<20}{seen:>12}{counts}  {client.reason}".rstrip())


def log_lines() -> None:
    """Log to standard error, a line an event: what journald and a terminal both want."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    logging.getLogger("fedvb").setLevel(logging.INFO)
