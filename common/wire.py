"""Records <-> msgpack bytes, on the wire and on disk.

A record is the msgpack array [tag, format, field, field, ...] in the order of its dataclass; nested facts are arrays
without tag. Decoding is strict and follows the dataclass: each value is read as its field's type or refused at once, so
no input makes it build more than a record of that class, nor nest deeper. Then the dataclass's own checks run. Anything
else is `MalformedRecord` or `LimitExceeded`. `tests/test_wire.py` holds golden bytes of every record.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from enum import IntEnum
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgpack

from .errors import LimitExceeded, MalformedRecord
from .limits import LIMITS
from .messages import Ack, Coming, Lease, Offer, Release, VerifyRequest, WorkerStatus
from .types import Index, Manifest, PayloadRef

FORMAT = 4
#: tag of each top-level record; further ones register themselves with `record`
_TAGS: dict[type, str] = {
    Release: "release",
    Coming: "coming",
    Offer: "offer",
    VerifyRequest: "verify",
    Index: "index",
    Manifest: "manifest",
    PayloadRef: "payload",
    Ack: "ack",
    WorkerStatus: "worker",
    Lease: "lease",
}
#: first bytes of msgpack items
_NIL = 0xC0
_CONTAINERS = frozenset([*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF])

T = TypeVar("T")
Encode = Callable[[Any], Any]


def record(tag: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: makes a frozen dataclass a top-level record (used by state files)."""

    def register(cls: type[T]) -> type[T]:
        assert tag not in _TAGS.values(), tag
        _TAGS[cls] = tag
        return cls

    return register


def pack(value: object) -> bytes:
    """The record's bytes; equal values give equal bytes.

    Lone surrogates in free text (file names that are not UTF-8 get into error messages that way) are written as
    `\\udcff`; names can't hold any. Raises: TypeError, ValueError or OverflowError for a value that no reader would
    take, which is a mistake of the caller.
    """
    kind: Any = type(value)
    body = _encoder(kind)(value)
    return bytes(msgpack.packb([_TAGS[kind], FORMAT, *body], use_bin_type=True, unicode_errors="backslashreplace"))


def unpack(data: bytes, kind: type[T], *, max_bytes: int = LIMITS.record_bytes) -> T:
    """The record of class `kind` in `data`.

    Raises: LimitExceeded for more than `max_bytes`, MalformedRecord for anything that is not exactly such a record.
    """
    found = unpack_any(data, (kind,), max_bytes=max_bytes)
    assert isinstance(found, kind)
    return found


def unpack_any(data: bytes, kinds: tuple[type, ...], *, max_bytes: int = LIMITS.record_bytes) -> object:
    """Like `unpack` for a stream that carries records of several kinds."""
    if len(data) > max_bytes:
        raise LimitExceeded(f"a record of {len(data)} bytes exceeds the limit of {max_bytes}")
    try:
        return _read_record(_Reader(data), kinds)
    except _Mismatch as error:
        raise MalformedRecord(f"not a refleet record: {error}") from None
    except (msgpack.OutOfData, IndexError):
        raise MalformedRecord(f"not a refleet record: it ends early, after {len(data)} bytes") from None
    except (ValueError, msgpack.UnpackException) as error:
        raise MalformedRecord(f"not a refleet record: {type(error).__name__}: {str(error)[:80]}") from None


def _read_record(reader: _Reader, kinds: tuple[type, ...]) -> object:
    count = reader.array()
    if count < 2:
        raise _Mismatch("neither tag nor format")
    tag = reader.value()
    kind = next((k for k in kinds if _TAGS[k] == tag), None)
    if kind is None:
        raise MalformedRecord(f"expected a record {' or '.join(_TAGS[k] for k in kinds)}, found {str(tag)[:40]!r}")
    found = reader.value()
    if type(found) is not int or found != FORMAT:
        raise MalformedRecord(
            f"record {tag!r} has format {str(found)[:20]}, this refleet reads format {FORMAT}",
            next="run the same refleet version on publisher and workers",
        )
    try:
        value = _fields_decoder(kind)(reader, count - 2)
    except _Mismatch as error:
        raise MalformedRecord(f"record {tag!r}: {error}") from None
    if reader.tell() != len(reader.data):
        raise MalformedRecord(f"record {tag!r}: {len(reader.data) - reader.tell()} bytes too many")
    return value


class _Mismatch(Exception):
    """Internal: a value that its field can't hold."""


class _Reader:
    """Reads one msgpack item after the other. `value` gives only plain ones: a list or map is refused unread, which is
    what keeps a few bytes from becoming millions of objects."""

    __slots__ = ("_plain", "array", "data", "map", "tell")

    def __init__(self, data: bytes):
        n = len(data)
        unpacker = msgpack.Unpacker(
            raw=False, strict_map_key=True, max_buffer_size=max(n, 1),
            max_str_len=n, max_bin_len=n, max_array_len=n, max_map_len=n, max_ext_len=0,
        )  # fmt: skip
        unpacker.feed(data)
        self.data = data
        self._plain: Callable[[], Any] = unpacker.unpack
        self.array: Callable[[], int] = unpacker.read_array_header
        self.map: Callable[[], int] = unpacker.read_map_header
        self.tell: Callable[[], int] = unpacker.tell

    def value(self) -> Any:
        if self.data[self.tell()] in _CONTAINERS:  # IndexError: at the end
            raise _Mismatch("expected a plain value, found a list or map")
        return self._plain()

    def skip_nil(self) -> bool:
        if self.data[self.tell()] != _NIL:
            return False
        self._plain()
        return True


Decode = Callable[[_Reader], Any]


@cache
def _encoder(kind: Any) -> Encode:
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        parts = [(f.name, _encoder(hints[f.name])) for f in fields(kind)]
        return lambda value: [encode(getattr(value, name)) for name, encode in parts]
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        encode_item = _encoder(args[0])
        return lambda value: [encode_item(item) for item in value]
    if origin in (Union, types.UnionType):
        encode_some = _encoder(_some(args))
        return lambda value: None if value is None else encode_some(value)
    if origin is dict:
        encode_key, encode_item = _encoder(args[0]), _encoder(args[1])
        return lambda value: {encode_key(key): encode_item(value[key]) for key in sorted(value)}
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return lambda value: int(kind(value))
    return _finite if kind is float else _plain_encoder(kind)


def _plain_encoder(kind: type) -> Encode:
    def encode(value: Any) -> Any:
        if type(value) is not kind:  # else the mistake would show on another machine, as a malformed record
            raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
        return value

    return encode


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return float(value)


def _some(args: tuple[Any, ...]) -> Any:
    """X of `X | None`."""
    return next(a for a in args if a is not type(None))


@cache
def _decoder(kind: Any) -> Decode:
    if is_dataclass(kind):
        decode_fields = _fields_decoder(cast(Hashable, kind))
        return lambda reader: decode_fields(reader, reader.array())
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        decode_item = _decoder(args[0])
        # a declared count allocates nothing: the data ends first if it is a lie
        return lambda reader: tuple([decode_item(reader) for _ in range(reader.array())])
    if origin in (Union, types.UnionType):
        decode_some = _decoder(_some(args))
        return lambda reader: None if reader.skip_nil() else decode_some(reader)
    if origin is dict:
        return _map_decoder(_decoder(args[0]), _decoder(args[1]))
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return _enum_decoder(kind)
    return _float if kind is float else _plain_decoder(kind)


@cache
def _fields_decoder(kind: Any) -> Callable[[_Reader, int], Any]:
    """Reads the `count` fields that a list announced into a `kind`."""
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    decoders = [_decoder(hints[name]) for name in names]

    def decode(reader: _Reader, count: int) -> Any:
        if count != len(decoders):
            raise _Mismatch(f"{kind.__name__} has {len(decoders)} fields, not {count}")
        arguments: list[Any] = []
        try:
            for decode_field in decoders:
                arguments.append(decode_field(reader))  # noqa: PERF401  its length tells which field was refused
        except _Mismatch as error:
            raise _Mismatch(f"{names[len(arguments)]}: {error}") from None
        except ValueError as error:  # msgpack's: not a list where one belongs, bad UTF-8, an extension
            raise _Mismatch(f"{names[len(arguments)]}: unreadable ({str(error)[:80]})") from None
        try:
            return kind(*arguments)
        except ValueError as error:  # the dataclass's own checks
            raise _Mismatch(f"{kind.__name__}: {error}") from None

    return decode


def _plain_decoder(kind: type) -> Decode:
    def decode(reader: _Reader) -> Any:
        value = reader.value()
        if type(value) is not kind:
            raise _Mismatch(f"expected {kind.__name__}, found {type(value).__name__}")
        return value

    return decode


_any_float = _plain_decoder(float)


def _float(reader: _Reader) -> Any:
    value = _any_float(reader)
    if not math.isfinite(value):  # NaN compares false with every deadline, and is not JSON
        raise _Mismatch(f"{value} is not a finite number")
    return value


def _enum_decoder(kind: type[IntEnum]) -> Decode:
    members = {int(member): member for member in kind}

    def decode(reader: _Reader) -> Any:
        value = reader.value()
        if type(value) is not int or value not in members:
            raise _Mismatch(f"no {kind.__name__} {str(value)[:20]}")
        return members[value]

    return decode


def _map_decoder(decode_key: Decode, decode_value: Decode) -> Decode:
    def decode(reader: _Reader) -> Any:
        found: dict[Any, Any] = {}
        for _ in range(reader.map()):
            key = decode_key(reader)
            if key in found:
                raise _Mismatch(f"{str(key)[:40]!r} twice")
            found[key] = decode_value(reader)
        return found

    return decode
