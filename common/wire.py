"""Records <-> msgpack bytes, on the wire and on disk.

A record is the msgpack array [tag, format, field, field, ...] in the order of its dataclass; nested facts are arrays
without tag. Decoding is strict: exact length, exact types, every `max_*` limit of msgpack set, then the dataclass's own
checks. Anything else is `MalformedRecord` or `LimitExceeded`. `tests/test_wire.py` holds golden bytes of every record.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import IntEnum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgpack

from .errors import LimitExceeded, MalformedRecord
from .limits import LIMITS
from .types import Ack, Index, Lease, Manifest, Offer, PayloadRef, Release, VerifyRequest, WorkerStatus

FORMAT = 1
#: tag of each top-level record; further ones register themselves with `record`
_TAGS: dict[type, str] = {
    Release: "release",
    Offer: "offer",
    VerifyRequest: "verify",
    Index: "index",
    Manifest: "manifest",
    PayloadRef: "payload",
    Ack: "ack",
    WorkerStatus: "worker",
    Lease: "lease",
}

T = TypeVar("T")
Convert = Callable[[Any], Any]


def record(tag: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: makes a frozen dataclass a top-level record (used by state files)."""

    def register(cls: type[T]) -> type[T]:
        assert tag not in _TAGS.values(), tag
        _TAGS[cls] = tag
        return cls

    return register


def pack(value: object) -> bytes:
    """The record's bytes; deterministic."""
    kind: Any = type(value)
    body = _encoder(kind)(value)
    return bytes(msgpack.packb([_TAGS[kind], FORMAT, *body], use_bin_type=True))


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
    items = _parse(data)
    if not isinstance(items, list) or len(items) < 2:
        raise MalformedRecord("not a refleet record")
    kind = next((k for k in kinds if _TAGS[k] == items[0]), None)
    if kind is None:
        names = " or ".join(_TAGS[k] for k in kinds)
        raise MalformedRecord(f"expected a record {names}, found {str(items[0])[:40]!r}")
    if items[1] != FORMAT or isinstance(items[1], bool):
        raise MalformedRecord(
            f"record {items[0]!r} has format {str(items[1])[:20]}, this refleet reads format {FORMAT}",
            next="run the same refleet version on publisher and workers",
        )
    try:
        return _decoder(kind)(items[2:])
    except _Mismatch as error:
        raise MalformedRecord(f"record {items[0]!r}: {error}") from None


def _parse(data: bytes) -> Any:
    n = len(data)
    try:
        return msgpack.unpackb(
            data, raw=False, use_list=True, strict_map_key=True,
            max_str_len=n, max_bin_len=n, max_array_len=n, max_map_len=n, max_ext_len=0,
        )  # fmt: skip
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise MalformedRecord(f"not a refleet record: {type(error).__name__}: {str(error)[:80]}") from None


class _Mismatch(Exception):
    """Internal: a value that its field can't hold."""


@cache
def _encoder(kind: Any) -> Convert:
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        parts = [(f.name, _encoder(hints[f.name])) for f in fields(kind)]
        return lambda value: [encode(getattr(value, name)) for name, encode in parts]
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        encode_item = _encoder(args[0])
        return lambda value: [encode_item(item) for item in value]
    if origin in (Union, types.UnionType):
        encode_some = _encoder(next(a for a in args if a is not type(None)))
        return lambda value: None if value is None else encode_some(value)
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return int
    return lambda value: value


@cache
def _decoder(kind: Any) -> Convert:
    if is_dataclass(kind):
        return _dataclass_decoder(kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        decode_item = _decoder(args[0])

        def decode_tuple(value: Any) -> Any:
            if type(value) is not list:
                raise _Mismatch(f"expected a list, found {type(value).__name__}")
            return tuple(decode_item(item) for item in value)

        return decode_tuple
    if origin in (Union, types.UnionType):
        decode_some = _decoder(next(a for a in args if a is not type(None)))
        return lambda value: None if value is None else decode_some(value)
    if origin is dict:
        return _map_decoder(_decoder(args[0]), _decoder(args[1]))
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        members = {int(member): member for member in kind}

        def decode_enum(value: Any) -> Any:
            if type(value) is not int or value not in members:
                raise _Mismatch(f"no {kind.__name__} {str(value)[:20]}")
            return members[value]

        return decode_enum

    def decode_plain(value: Any) -> Any:
        if type(value) is not kind:
            raise _Mismatch(f"expected {kind.__name__}, found {type(value).__name__}")
        return value

    return decode_plain


def _dataclass_decoder(kind: Any) -> Convert:
    hints = get_type_hints(kind)
    parts = [(f.name, _decoder(hints[f.name])) for f in fields(kind)]

    def decode(value: Any) -> Any:
        if type(value) is not list or len(value) != len(parts):
            raise _Mismatch(f"{kind.__name__} needs {len(parts)} fields")
        try:
            arguments = [decode_field(item) for (_, decode_field), item in zip(parts, value, strict=True)]
            return kind(*arguments)
        except ValueError as error:  # the dataclass's own checks
            raise _Mismatch(f"{kind.__name__}: {error}") from None

    return decode


def _map_decoder(decode_key: Convert, decode_value: Convert) -> Convert:
    def decode(value: Any) -> Any:
        if type(value) is not dict:
            raise _Mismatch(f"expected a map, found {type(value).__name__}")
        return {decode_key(k): decode_value(v) for k, v in value.items()}

    return decode
