"""Commands to run a server with: `fedvb keys`, `server`, `status`, `watch`. A site's are in `edge.py`.

`server` is Flower's own SuperLink behind our gate, with TLS and keys unless told otherwise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulations.flower_programs import environment, make_home, require_free, warn_insecure
from vblora.errors import ConfigError

if TYPE_CHECKING:
    from fl_client.trainer_pb2 import TrainerStatus
    from fl_server.status import RunStatus

__all__ = ["add_commands"]

ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where this machine finds a server that listens everywhere
SOON = 30  # days before a certificate ends in which the server says so


def add_commands(app: typer.Typer) -> None:
    """Add them to the command line."""
    for command in (keys, server, status, watch):
        app.command()(command)


def keys(
    out: Annotated[Path, typer.Option(help="Folder of the keys; what is there stays.")],
    nodes: Annotated[int, typer.Option(help="Nodes in all; more than before adds the new ones.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address that nodes call the server by; may be given again."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="INTEGER", help="Of the server; else 8000.")
    ] = None,
) -> None:
    """Make the keys of a federation: an authority, the server's certificate, one key a node.

    Prints what goes where, and the commands that let the nodes in. Keep
    ca.key off the server: it is needed only to make more certificates.
    """
    from fl_server.keys import CONNECTION, make_keys

    made = make_keys(out, nodes, host or [], port)
    print(f"made {', '.join(made.made) or 'nothing new'} in {out}")
    print(f"server    {out}/server.pem, server.key, ca.crt; good for {', '.join(made.hosts)}")
    print(f"site n    {out}/ca.crt, node-n: nothing else")
    print("let the nodes in, on the server's machine, once it runs (STATE is of fedvb server):")
    for number in made.nodes:
        print(f"  FLWR_HOME=STATE/flwr flwr supernode register {out}/node-{number}.pub {CONNECTION}")


def server(
    keys: Annotated[Path | None, typer.Option(help="Folder that fedvb keys made.")] = None,
    state: Annotated[Path, typer.Option(help="Folder of Flower's database and home.")] = Path("superlink"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="INTEGER", help="Port to listen on.")] = 8000,
    operators: Annotated[
        list[str] | None,
        typer.Option(
            help="Address or network that may start runs and let nodes in, beside this machine; may be given "
            "again."
        ),
    ] = None,
    requests: Annotated[
        float, typer.Option(help="Of nodes behind one address, a second; more has to wait.")
    ] = 50.0,
    megabytes: Annotated[
        float, typer.Option(help="From nodes behind one address, a minute; more has to wait.")
    ] = 6000.0,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, no keys: anyone may read, and join.")
    ] = False,
) -> None:
    """Run Flower's SuperLink, over TLS, open to registered nodes only.

    Runs are started, and nodes let in, from this machine alone, or from
    where --operators says; FLWR_HOME=STATE/flwr tells Flower's commands
    where it is.
    """
    from fl_server.gate import GateSettings
    from fl_server.keys import write_connection
    from simulations.superlink import run_superlink
    from vblora.files import alone

    settings = GateSettings(tuple(operators or ()), requests, megabytes)
    arguments = ["--host", host, "--port", str(port), "--database", str(state / "superlink.db")]
    arguments += ["--insecure"] if insecure else list(_secured(keys))
    if insecure:
        warn_insecure()
    require_free(host, port)
    make_home(state)
    with alone(state / "lock", f"--state {state}", "server", "end that one, or name another folder"):
        variables = environment(state)
        if _is_ours(state / "flwr"):
            authority = None if insecure or keys is None else keys / "ca.crt"
            write_connection(state / "flwr", ANYWHERE.get(host, host), port, authority)
        else:
            del variables["FLWR_HOME"]
        os.environ.update(variables)
        run_superlink([*arguments, "--disable-runtime-dependency-installation"], settings)


def _is_ours(home: Path) -> bool:
    """Whether Flower's home is the server's own, not somebody's who may have connections of his own there."""
    named = os.environ.get("FLWR_HOME")
    return named is None or Path(named).expanduser().resolve() == home.resolve()


def _secured(folder: Path | None) -> Iterator[str]:
    """Arguments for TLS and for nodes' keys, once the keys are known to be in order."""
    from fl_server.keys import check_server_keys

    if folder is None:
        raise ConfigError("--keys: where are they? fedvb keys makes them; or say --insecure")
    left = check_server_keys(folder) - datetime.now(UTC)
    if left.days < SOON:
        print(
            f"fedvb: {folder}/server.pem ends in {left.days} days; fedvb keys makes another", file=sys.stderr
        )
    yield from ("--ssl-ca-certfile", f"{folder}/ca.crt", "--ssl-certfile", f"{folder}/server.pem")
    yield from ("--ssl-keyfile", f"{folder}/server.key", "--enable-supernode-auth")


def status(
    place: Annotated[Path, typer.Argument(help="Run directory, or the socket or folder of a trainer.")],
    follow: Annotated[
        bool, typer.Option("--follow", help="Of a trainer: go on telling what it is at, until Ctrl-C.")
    ] = False,
) -> None:
    """Tell where a run is and what its clients did, or what a trainer is at."""
    socket = place / "trainer.sock" if place.is_dir() else place
    if socket.is_socket():
        from fl_client.thin import trainer_status, watch_trainer

        _print_trainer(trainer_status(socket))
        for told in watch_trainer(socket) if follow else ():
            print(_at_work(told), flush=True)
    elif follow:
        raise ConfigError(f"--follow: {place} is no trainer's; fedvb watch follows runs")
    else:
        from fl_server.status import read_status

        _print_run(read_status(place))


def watch(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    tensorboard: Annotated[Path | None, typer.Option(help="Write TensorBoard's scalars here.")] = None,
    prometheus: Annotated[
        int | None,
        typer.Option(min=1, max=65535, metavar="INTEGER", help="Serve Prometheus' metrics on this port."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve them on.")] = "127.0.0.1",
    once: Annotated[bool, typer.Option("--once", help="Tell what is there, and end.")] = False,
) -> None:
    """Publish a run's rounds while they come; needs the extra "monitor" of fed-vblora."""
    from simulations import watch as publish

    if tensorboard is None and prometheus is None:
        raise ConfigError("watch: where to? name --tensorboard DIR, --prometheus PORT, or both")
    sinks = [publish.tensorboard(tensorboard)] if tensorboard else []
    sinks += [publish.prometheus(prometheus, host)] if prometheus is not None else []
    told = publish.watch(run, sinks, follow=not once)
    print(f"{told} rounds")


def _at_work(found: TrainerStatus) -> str:
    if not found.busy:
        return "idle"
    return f"{found.busy}, step {found.done} of {found.steps}" if found.steps else found.busy


def _print_trainer(found: TrainerStatus) -> None:
    facts = {
        "trainer": f"process {found.pid}, {_at_work(found)}",
        "model": found.model,
        "data": found.data,
        "so far": f"{found.answered} answers, {found.bases_loaded} times a base was loaded",
    }
    if found.last:
        facts["last"] = found.last
    if found.gpu_peak_bytes:
        facts["GPU"] = f"{found.gpu_bytes / 2**30:.2f} GiB, at most {found.gpu_peak_bytes / 2**30:.2f} GiB"
    for name, fact in facts.items():
        print(f"{name:<9}{fact}")


def _print_run(found: RunStatus) -> None:
    done = "nothing" if found.round is None else f"round {found.round}"
    heard = f", last heard of {_ago(found.heard)}" if found.heard and found.phase != "finished" else ""
    print(f"{'run':<9}{found.phase}" + (f": {found.why}" if found.why else "") + heard)
    print(f"{'on disk':<9}{done}" + (f" of {found.rounds}" if found.rounds is not None else ""))
    shown = {"score": found.score, "train loss": found.train_loss}
    print(f"{'last':<9}" + (", ".join(f"{k} {v:.4f}" for k, v in shown.items() if v is not None) or "-"))
    print(f"{'bytes':<9}{found.up:,} up, {found.down:,} down; {found.missing} replies never came")
    if not found.clients:
        return
    columns = f"{'last seen':>14}{'replies':>9}{'bytes':>13}{'rejected':>10}{'clipped':>9}"
    print(f"\n{'client':<20}{columns}  last reason")
    for name, client in found.clients.items():
        counts = f"{client.replies:>9}{client.sent:>13,}{client.rejected:>10}{client.clipped:>9}"
        print(f"{name:<20}{_ago(client.seen):>14}{counts}  {client.reason}".rstrip())


def _ago(time: datetime | None) -> str:
    if time is None:
        return "never"
    seconds = max(0.0, (datetime.now(UTC) - time).total_seconds())  # clocks differ
    return f"{seconds:.0f} s ago" if seconds < 600 else f"{seconds / 60:.0f} min ago"
