"""Random records survive the wire; random bytes and spoiled records are refused, never anything else."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refleet.common import wire
from refleet.common.errors import LimitExceeded, MalformedRecord
from refleet.common.limits import LIMITS
from refleet.common.messages import (
    Ack,
    Evidence,
    Failure,
    Lease,
    Offer,
    Release,
    Serving,
    Verified,
    VerifyRequest,
    Want,
    WorkerStatus,
)
from refleet.common.signing import Envelope, open_envelope
from refleet.common.types import (
    DTYPE_BYTES,
    Block,
    DeltaTensor,
    Index,
    Manifest,
    PayloadRef,
    TensorEntry,
    TensorSpec,
    tensor_name_problem,
)
from test_wire import GOLDEN, RECORDS

quick = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])

digests = st.binary(min_size=32, max_size=32)
nonces = st.text("0123456789abcdef", min_size=32, max_size=32)
models = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
versions = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
names = texts.filter(lambda name: tensor_name_problem(name) is None)
orders = st.integers(1, (1 << 63) - 1)
counts = st.integers(0, (1 << 64) - 1)
times = st.integers(0, (1 << 47) - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
specs = st.builds(
    TensorSpec, names, st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 30), max_size=5).map(tuple)
)
servings = st.builds(Serving, versions, orders, orders, digests)
failures = st.builds(Failure, texts, texts, st.none() | texts)
wants = st.builds(Want, digests, st.lists(digests, max_size=3).map(tuple), st.lists(nonces, max_size=3).map(tuple))
manifests = st.lists(st.builds(TensorEntry, specs, digests), unique_by=lambda entry: entry.spec.name, max_size=6).map(
    Manifest.of
)


@st.composite
def payloads(draw: st.DrawFn, target: bytes | None = None) -> PayloadRef:
    body_bytes = draw(st.integers(0, 1 << 40))
    body_chunks = draw(st.integers(-(-body_bytes // LIMITS.chunk_bytes_max), body_bytes))
    index_bytes = draw(st.integers(1, LIMITS.index_bytes))
    base, index_digest = draw(st.none() | digests), draw(digests)
    return PayloadRef(
        draw(nonces), base, target or draw(digests), body_chunks, body_bytes,
        draw(st.integers(1, index_bytes)), index_bytes, index_digest,
    )  # fmt: skip


@st.composite
def releases(draw: st.DrawFn) -> Release:
    fingerprint = draw(digests)
    return Release(
        draw(models), draw(nonces), draw(orders), draw(orders), draw(st.sampled_from(["publish", "rollback"])),
        draw(versions), fingerprint, draw(st.none() | digests), draw(st.none() | payloads(fingerprint)),
        draw(counts), draw(counts), draw(counts), draw(counts), draw(times), draw(texts),
        draw(st.booleans()),
    )  # fmt: skip


@st.composite
def indexes(draw: st.DrawFn) -> Index:
    base = draw(st.none() | digests)
    tensors = []
    for spec in sorted(draw(st.lists(specs, unique_by=lambda s: s.name, max_size=5)), key=lambda s: s.name.encode()):
        carried = spec.size_bytes > 0 and draw(st.booleans())
        tensors.append(DeltaTensor(spec, draw(digests), carried, carried and base is not None and draw(st.booleans())))
    groups: dict[tuple[bool, str], int] = {}
    for tensor in tensors:
        if tensor.carried:
            groups[tensor.group] = groups.get(tensor.group, 0) + tensor.spec.size_bytes
    blocks = []
    for _, left in sorted(groups.items()):
        for start in range(0, left, LIMITS.block_bytes):
            size = min(left - start, LIMITS.block_bytes)
            blocks.append(Block(draw(st.integers(0, 9)), size, draw(st.integers(0, size))))
    body_bytes = sum(block.encoded_bytes for block in blocks)
    chunk_bytes = draw(st.integers(max(1, body_bytes // 4), LIMITS.chunk_bytes_max))
    chunks = tuple(draw(digests) for _ in range(-(-body_bytes // chunk_bytes)))
    removed = tuple(sorted(draw(st.sets(texts, max_size=3)), key=str.encode)) if base else ()
    return Index(base, draw(digests), tuple(tensors), tuple(blocks), chunk_bytes, body_bytes, chunks, removed)


acks = st.builds(
    Ack, versions, models, orders, orders, versions, st.sampled_from(Evidence), st.none() | digests,
    st.none() | versions, texts, counts, st.dictionaries(texts, floats, max_size=4), st.none() | digests,
    st.none() | failures,
    st.none() | st.builds(
        Verified, nonces, st.booleans(), counts, st.none() | texts, st.none() | digests, texts, st.none() | digests,
    ),
    texts,
)  # fmt: skip
statuses = st.builds(
    WorkerStatus, versions, texts, models, texts, st.none() | servings, st.none() | servings,
    st.sampled_from(Evidence), st.none() | failures, counts, counts, st.lists(digests, max_size=16).map(tuple),
    st.none() | wants, orders, counts, st.none() | failures, st.booleans(), texts,
    st.floats(0, 86400, exclude_min=True), times,
)  # fmt: skip
envelopes = st.builds(Envelope, st.none(), st.none(), st.binary()) | st.builds(
    Envelope, st.binary(min_size=8, max_size=8), st.binary(min_size=64, max_size=64), st.binary()
)
RANDOM = {
    Release: releases(),
    Offer: st.builds(Offer, models, nonces, orders, payloads()),
    VerifyRequest: st.builds(VerifyRequest, models, nonces, times, st.booleans()),
    Index: indexes(),
    Manifest: manifests,
    PayloadRef: payloads(),
    Ack: acks,
    WorkerStatus: statuses,
    Lease: st.builds(Lease, texts, st.integers(0, (1 << 63) - 1), texts, texts, counts),
    Envelope: envelopes,
}


def read_or_refuse(data: bytes, kind: type) -> None:
    """Either a record that is as good as any other, or one of the two errors."""
    try:
        found = wire.unpack(data, kind)
    except (MalformedRecord, LimitExceeded):
        return
    assert wire.unpack(wire.pack(found), kind) == found
    if isinstance(found, Manifest):
        assert len(found.fingerprint) == 32


@pytest.mark.parametrize("kind", RANDOM)
def test_any_valid_record_survives_the_wire(kind: type) -> None:
    @quick
    @given(RANDOM[kind])
    def survives(record: object) -> None:
        data = wire.pack(record)
        assert wire.unpack(data, kind, max_bytes=len(data)) == record
        assert wire.pack(wire.unpack(data, kind)) == data

    survives()


@quick
@given(st.binary(max_size=300), st.sampled_from(list(RANDOM)))
def test_random_bytes_are_refused_or_a_record(data: bytes, kind: type) -> None:
    read_or_refuse(data, kind)


@settings(quick, max_examples=1500)
@given(st.data())
def test_spoiled_golden_bytes_are_refused_or_a_record(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(RECORDS)))
    spoiled = bytearray.fromhex(GOLDEN[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(spoiled) - 1))
        spoiled[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(min_size=1, max_size=5))
    read_or_refuse(bytes(spoiled), type(RECORDS[name]))


scalars = (
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | texts | st.binary(max_size=40)
)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3))


@settings(quick, max_examples=1000)
@given(st.data())
def test_a_record_with_any_other_value_in_one_place_is_refused_or_a_record(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(RECORDS)))
    at: Any = msgpack.unpackb(bytes.fromhex(GOLDEN[name]))
    whole = at
    while True:
        step = data.draw(st.sampled_from(list(at) if isinstance(at, dict) else range(len(at))))
        if not at[step] or not isinstance(at[step], (list, dict)) or data.draw(st.booleans()):
            break
        at = at[step]
    at[step] = data.draw(trees)
    read_or_refuse(msgpack.packb(whole), type(RECORDS[name]))


@quick
@given(st.binary(max_size=200))
def test_random_bytes_are_no_envelope(data: bytes) -> None:
    with pytest.raises((MalformedRecord, LimitExceeded)):
        open_envelope(data, None)


@quick
@given(st.floats())
def test_a_float_is_finite_or_refused(value: float) -> None:
    spoiled = msgpack.unpackb(bytes.fromhex(GOLDEN["ack"]))
    spoiled[12] = {"fetch": value}
    if math.isfinite(value):
        assert wire.unpack(msgpack.packb(spoiled), Ack).timings_ms == {"fetch": value}
    else:
        with pytest.raises(MalformedRecord):
            wire.unpack(msgpack.packb(spoiled), Ack)
