from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChannelRequest(_message.Message):
    __slots__ = ("channel", "counter")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    channel: str
    counter: int
    def __init__(self, channel: _Optional[str] = ..., counter: _Optional[int] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("keys", "channel", "manifest")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    keys: str
    channel: str
    manifest: str
    def __init__(self, keys: _Optional[str] = ..., channel: _Optional[str] = ..., manifest: _Optional[str] = ...) -> None: ...

class Want(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("wants", "compress")
    WANTS_FIELD_NUMBER: _ClassVar[int]
    COMPRESS_FIELD_NUMBER: _ClassVar[int]
    wants: _containers.RepeatedCompositeFieldContainer[Want]
    compress: bool
    def __init__(self, wants: _Optional[_Iterable[_Union[Want, _Mapping]]] = ..., compress: _Optional[bool] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("digest", "offset", "data", "zstandard")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    ZSTANDARD_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    data: bytes
    zstandard: bool
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., zstandard: _Optional[bool] = ...) -> None: ...

class InstallReport(_message.Message):
    __slots__ = ("device", "version", "outcome", "detail", "accuracy_before", "accuracy_after")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_BEFORE_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_AFTER_FIELD_NUMBER: _ClassVar[int]
    device: str
    version: int
    outcome: str
    detail: str
    accuracy_before: float
    accuracy_after: float
    def __init__(self, device: _Optional[str] = ..., version: _Optional[int] = ..., outcome: _Optional[str] = ..., detail: _Optional[str] = ..., accuracy_before: _Optional[float] = ..., accuracy_after: _Optional[float] = ...) -> None: ...

class Received(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Piece(_message.Message):
    __slots__ = ("data", "size")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    size: int
    def __init__(self, data: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class Given(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Question(_message.Message):
    __slots__ = ("key", "attempt", "offset")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    key: str
    attempt: int
    offset: int
    def __init__(self, key: _Optional[str] = ..., attempt: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...
