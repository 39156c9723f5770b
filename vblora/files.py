"""Files: written whole or not at all, or locked; and one safetensors form for a state wherever it rests."""

from __future__ import annotations

import errno
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from vblora.errors import ModelError, RunError, StartError
from vblora.spec import Blueprint
from vblora.state import State, TopK, content_faults

__all__ = ["alone", "load_state", "read_tensors", "safetensors_bytes", "save_state", "write_atomic"]

FORMAT = "fedvb-state-1"
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"} | {
    f"{letter}{bits}": f"<{letter.lower()}{bits // 8}" for letter in "IU" for bits in (8, 16, 32, 64)
}
# Of a file that safetensors or JSON cannot read; of bfloat16 and smaller floats numpy knows nothing.
UNREADABLE = (OSError, SafetensorError, LookupError, ArithmeticError, TypeError, ValueError, AttributeError)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems
LENGTH = struct.Struct("<Q")  # of a safetensors header, in front of it


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; these are ordinary ones
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def alone(file: Path, where: str, who: str, fix: str) -> Iterator[None]:
    """Hold a lock file; who is killed lets go of it by dying. It is gone in the end, and so are the folders
    that were made for it, where nothing else came into them. A file system without locks keeps nobody out.

    Args:
        file: to lock.
        where, who, fix: for messages: the option or folder, what else may hold it, what helps.

    Raises:
        RunError: another process holds it, or it cannot be made.
    """
    made = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = _locked(file)
    except BlockingIOError:
        raise RunError(f"{where}: in use by another {who} (process {_holder(file)}); {fix}") from None
    except OSError as error:
        raise RunError(f"{where}: cannot be written to ({error.strerror}); {fix}") from error
    try:
        held.truncate(0)
        held.write(str(os.getpid()))
        held.flush()
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: see _locked
        held.close()
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _locked(file: Path) -> IO[str]:
    """The file, open and locked; another one where its holder removed it between the two."""
    from fcntl import LOCK_EX, LOCK_NB, flock  # not on every system

    while True:
        opened = file.open("a+")
        try:
            flock(opened, LOCK_EX | LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                opened.close()
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(file.stat(), os.fstat(opened.fileno())):
                return opened
        opened.close()


def _holder(file: Path) -> str:
    try:
        return file.read_text().strip() or "unknown"
    except OSError:  # just gone
        return "unknown"


def save_state(path: Path, state: State, blueprint: Blueprint) -> None:
    """Save a state with its blueprint, as one safetensors file, atomically."""
    tensors: dict[str, NDArray[Any]] = dict(state.dense)
    if state.topk is not None:
        tensors |= {"positions": state.topk.positions, "gaps": state.topk.gaps}
    metadata = {
        "format": FORMAT,
        "version": str(state.version),
        "digest": state.digest.hex(),
        "blueprint": blueprint.to_json(),
        "fingerprint": blueprint.fingerprint.hex(),
    }
    write_atomic(path, safetensors_bytes(tensors, metadata))


def safetensors_bytes(tensors: Mapping[str, NDArray[Any]], metadata: dict[str, str]) -> bytes:
    """A safetensors file: equal content, equal bytes.

    `save` alone would write an array of another memory order scrambled, and the metadata in random order.
    """
    content = save({name: np.ascontiguousarray(array) for name, array in tensors.items()}, metadata)
    (length,) = LENGTH.unpack_from(content)
    start = LENGTH.size + length
    header = json.dumps(json.loads(content[LENGTH.size : start]), sort_keys=True, separators=(",", ":"))
    encoded = header.encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8
    return LENGTH.pack(len(encoded)) + encoded + content[start:]


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """All tensors of a safetensors file by name; 16-bit floats, bfloat16 too, come as float32.

    Raises:
        StartError: the file is missing, damaged, or holds other numbers.
    """
    tensors: dict[str, NDArray[Any]] = {}
    try:
        found = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as error:
        raise StartError(f"{path}: not a readable safetensors file ({error})") from error
    for name, entry in found:
        if entry["dtype"] not in DTYPES:
            raise StartError(f"{path}: {name} is {entry['dtype']}, expected one of {', '.join(DTYPES)}")
        array = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        elif array.dtype.kind == "f":
            array = array.astype(np.float32)
        tensors[name] = array.reshape(entry["shape"])
    return tensors


def load_state(path: Path) -> tuple[State, Blueprint]:
    """Read what `save_state` wrote.

    Raises:
        RunError: the file is missing, damaged, or of another format.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if metadata.get("format") != FORMAT:
            raise RunError(f"{path}: format is {metadata.get('format')!r}, expected {FORMAT!r}")
        blueprint = Blueprint.from_json(metadata["blueprint"])
        for name, tensor in tensors.items():
            if tensor.dtype != (expected := np.int32 if name == "positions" else np.float32):
                raise RunError(f"{path}: {name} is {tensor.dtype}, expected {np.dtype(expected)}")
        topk = TopK(tensors.pop("positions"), tensors.pop("gaps")) if "positions" in tensors else None
        state = State(int(metadata["version"]), tensors, topk)
        found = state.digest.hex(), blueprint.fingerprint.hex()
        named = metadata["digest"], metadata["fingerprint"]
    except (*UNREADABLE, ModelError) as error:
        raise RunError(f"{path}: not a readable state file ({error})") from error
    if found != named:
        raise RunError(f"{path}: content does not match its digest; the file is damaged")
    if faults := list(content_faults(state.dense, state.topk, blueprint)):
        raise RunError(f"{path}: not a state of its own adapter: {'; '.join(faults)}")
    return state, blueprint
