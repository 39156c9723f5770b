from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Scalar(_message.Message):
    __slots__ = ("flag", "number", "real", "text")
    FLAG_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    flag: bool
    number: int
    real: float
    text: str
    def __init__(self, flag: _Optional[bool] = ..., number: _Optional[int] = ..., real: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...

class Question(_message.Message):
    __slots__ = ("protocol", "kind", "blob", "config", "run")
    class ConfigEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scalar
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ...) -> None: ...
    class RunEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scalar
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    kind: str
    blob: bytes
    config: _containers.MessageMap[str, Scalar]
    run: _containers.MessageMap[str, Scalar]
    def __init__(self, protocol: _Optional[int] = ..., kind: _Optional[str] = ..., blob: _Optional[bytes] = ..., config: _Optional[_Mapping[str, Scalar]] = ..., run: _Optional[_Mapping[str, Scalar]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("blob", "metrics", "text", "error")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scalar
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ...) -> None: ...
    BLOB_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    blob: bytes
    metrics: _containers.MessageMap[str, Scalar]
    text: str
    error: str
    def __init__(self, blob: _Optional[bytes] = ..., metrics: _Optional[_Mapping[str, Scalar]] = ..., text: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TrainerStatus(_message.Message):
    __slots__ = ("protocol", "pid", "model", "data", "bases_loaded", "answered", "busy", "done", "steps", "gpu_bytes", "gpu_peak_bytes", "last")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    BASES_LOADED_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GPU_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    pid: int
    model: str
    data: str
    bases_loaded: int
    answered: int
    busy: str
    done: int
    steps: int
    gpu_bytes: int
    gpu_peak_bytes: int
    last: str
    def __init__(self, protocol: _Optional[int] = ..., pid: _Optional[int] = ..., model: _Optional[str] = ..., data: _Optional[str] = ..., bases_loaded: _Optional[int] = ..., answered: _Optional[int] = ..., busy: _Optional[str] = ..., done: _Optional[int] = ..., steps: _Optional[int] = ..., gpu_bytes: _Optional[int] = ..., gpu_peak_bytes: _Optional[int] = ..., last: _Optional[str] = ...) -> None: ...
