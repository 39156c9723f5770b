"""The ClientApp's side of the socket that a resident trainer answers on. Needs neither torch nor Flower."""

from __future__ import annotations

import socket as sockets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grpc

from fl_client import trainer_pb2 as pb
from fl_client.questions import Answer, Question, Scalar
from fl_client.trainer_pb2_grpc import TrainerStub
from vblora.errors import RunError

__all__ = [
    "OPTIONS",
    "PROTOCOL",
    "ask_trainer",
    "checked_socket",
    "from_wire",
    "to_wire",
    "trainer_listens",
    "trainer_status",
    "watch_trainer",
]

PROTOCOL = 2  # raised with every change of trainer.proto or of what it means
LONGEST_PATH = 107  # bytes of the address of a Unix socket
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def checked_socket(path: Path) -> Path:
    """The absolute path of a socket.

    Raises:
        RunError: it is too long for a socket's address, or gRPC would read it as another.
    """
    absolute = path.expanduser().absolute()
    if "%" in str(absolute):
        raise RunError(f"socket {absolute}: the path has a %, which gRPC decodes; choose one without")
    if len(bytes(absolute)) > LONGEST_PATH:
        raise RunError(
            f"socket {absolute}: the path has {len(bytes(absolute))} bytes, expected {LONGEST_PATH} at most; "
            "choose a shorter one, as /run/fedvb/trainer.sock"
        )
    return absolute


def trainer_listens(path: Path) -> bool:
    """Whether somebody listens on a socket."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        try:
            probe.connect(str(checked_socket(path)))
        except OSError:
            return False
    return True


def ask_trainer(
    path: Path, question: Question, run: Mapping[str, Scalar], seconds: float | None = None
) -> Answer:
    """Hand a question to the trainer and wait for its answer; what fails is in `Answer.error`.

    Args:
        path: of its socket.
        question: for the one client of its site.
        run: the run config.
        seconds: after which nobody wants the answer any more; None waits for ever.
    """
    asked = pb.Question(
        protocol=PROTOCOL,
        kind=question.kind,
        blob=question.blob,
        config=to_wire(question.config),
        run=to_wire(run),
    )
    try:
        with _stub(path) as stub:
            found: pb.Answer = stub.Ask(asked, timeout=seconds)
    except grpc.RpcError as error:
        return Answer(question.client, error=f"trainer: {_reason(error)}")
    metrics = {name: value for name, value in from_wire(found.metrics).items() if not isinstance(value, str)}
    return Answer(question.client, found.blob, metrics, found.text, found.error)


def trainer_status(path: Path, timeout: float = 5.0) -> pb.TrainerStatus:
    """What a trainer holds and does.

    Raises:
        RunError: none answers.
    """
    try:
        with _stub(path) as stub:
            found: pb.TrainerStatus = stub.Status(pb.StatusRequest(), timeout=timeout)
    except grpc.RpcError as error:
        raise RunError(f"trainer at {path}: {_reason(error)}") from error
    return found


def watch_trainer(path: Path) -> Iterator[pb.TrainerStatus]:
    """What a trainer holds and does, again with every change, until it ends.

    Raises:
        RunError: none answers, or it ends.
    """
    try:
        with _stub(path) as stub:
            yield from stub.Watch(pb.StatusRequest())
    except grpc.RpcError as error:
        raise RunError(f"trainer at {path}: {_reason(error)}") from error


def to_wire(values: Mapping[str, Scalar]) -> dict[str, pb.Scalar]:
    """Scalars as protobuf holds them, each with its type."""
    return {name: _scalar(value) for name, value in values.items()}


def from_wire(values: Mapping[str, pb.Scalar]) -> dict[str, Scalar]:
    """What `to_wire` made."""
    found = {}
    for name, scalar in values.items():
        kind = scalar.WhichOneof("value")
        if kind is not None:
            value: Scalar = getattr(scalar, kind)
            found[name] = value
    return found


def _scalar(value: Scalar) -> pb.Scalar:
    if isinstance(value, bool):
        return pb.Scalar(flag=value)
    if isinstance(value, int):
        return pb.Scalar(number=value)
    return pb.Scalar(real=value) if isinstance(value, float) else pb.Scalar(text=value)


@contextmanager
def _stub(path: Path) -> Iterator[TrainerStub]:
    with grpc.insecure_channel(f"unix:{checked_socket(path)}", OPTIONS) as channel:
        yield TrainerStub(channel)  # type: ignore[no-untyped-call]


def _reason(error: grpc.RpcError) -> str:
    code = getattr(error, "code", lambda: None)()
    if code is grpc.StatusCode.UNAVAILABLE:
        return "it does not run, or died at work"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "it took longer than the server waits"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return "it is of another version; install the same fed-vblora on both sides and start it again"
    return " ".join(str(getattr(error, "details", lambda: None)() or "no reason given").split())
