"""Payloads that workers decode while they are written: by prefaces that nobody believes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from early_scene import CHUNK, FIRST, SECOND, Slow, early_bytes, quiet
from hypothesis import given, settings
from hypothesis import strategies as st
from refleet.common import preface
from refleet.common.delta import Encoder, Input
from refleet.common.digest import tensor_digest
from refleet.common.errors import MalformedRecord
from refleet.common.limits import LIMITS
from refleet.common.store import Store
from refleet.common.tensors import tensor_bytes
from refleet.worker import stage
from refleet.worker.early_decode import EarlyDecoder
from test_deltas import Tensors, fresh, manifest_of, put_whole, stepped
from world import World, holds

Until = Callable[..., None]
BEFORE, AFTER = fresh(0), stepped(fresh(0), 1)


def flat(tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.reshape(-1).view(np.uint8)


def body(before: Tensors, after: Tensors) -> bytes:
    """The whole body of a delta, as it travels."""
    numbers = {name: number for number, name in enumerate(manifest_of(before).by_name)}
    changed = sorted(name for name in after if after[name].size and (after[name] != before[name]).any())
    encoder = Encoder(Input("F16", flat(after[n]), flat(before[n]), numbers[n]) for n in changed)
    return b"".join(encoder.chunks())


BODY = body(BEFORE, AFTER)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("store")) as made:
        put_whole(made, BEFORE)
        yield made


def decoded(store: Store, data: bytes, *, cut: int) -> dict[bytes, bytes]:
    decoder = EarlyDecoder(manifest_of(BEFORE), store)
    for start in range(0, len(data), cut):
        decoder.feed(memoryview(data)[start : start + cut])
    return {digest: bytes(found) for digest, found in decoder.found.items()}


@pytest.mark.parametrize("cut", [1, 7, 1000, len(BODY)])
def test_a_body_is_decoded_however_it_is_cut(store: Store, cut: int) -> None:
    changed = [name for name, tensor in AFTER.items() if tensor.size and (tensor != BEFORE[name]).any()]
    assert len(changed) > 2
    wanted = {tensor_digest(AFTER[name].tobytes()): AFTER[name].tobytes() for name in changed}
    assert decoded(store, BODY, cut=cut) == wanted


def test_a_tensor_of_several_blocks_is_complete_with_the_last(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from refleet.common import delta

    monkeypatch.setattr(delta, "LIMITS", replace(LIMITS, block_bytes=4 << 10))
    data = body(BEFORE, AFTER)
    assert len(decoded(store, data, cut=500)) == len(decoded(store, BODY, cut=500))
    assert len(decoded(store, data[:-1], cut=500)) == len(decoded(store, BODY, cut=500)) - 1


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, len(BODY) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_never_gives_a_tensor_that_is_not_what_its_digest_says(store: Store, at: int, bit: int) -> None:
    data = bytearray(BODY)
    data[at] ^= 1 << bit
    for digest, found in decoded(store, bytes(data), cut=3000).items():
        assert tensor_digest(found) == digest


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), start=st.integers(0, 2000))
def test_any_bytes_end_the_decoding_at_most(store: Store, data: bytes, start: int) -> None:
    decoded(store, data, cut=50)
    decoded(store, BODY[:start] + data + BODY[start:], cut=5000)


def test_blocks_are_only_as_large_as_they_may_be(store: Store) -> None:
    decoder = EarlyDecoder(manifest_of(BEFORE), store)
    decoder.feed(memoryview(preface.SIZES.pack(LIMITS.block_bytes + LIMITS.preface_bytes + 1, 9)))
    decoder.feed(memoryview(BODY))
    assert decoder.found == {}
    assert len(decoder._rest) == 0


def test_a_tensor_is_filled_once(store: Store) -> None:
    """However often its blocks come: memory is bounded by the base."""
    decoder = EarlyDecoder(manifest_of(BEFORE), store)
    decoder.feed(memoryview(BODY))
    found = dict(decoder.found)
    decoder.feed(memoryview(BODY))
    assert decoder.found.keys() == found.keys()
    assert decoder._failed


@given(
    codec=st.integers(0, 9), size=st.integers(1, LIMITS.block_bytes), start=st.integers(0, 1 << 34),
    numbers=st.lists(st.integers(0, 99_999), max_size=50, unique=True).map(sorted), encoded=st.binary(max_size=50),
)  # fmt: skip
def test_what_a_preface_says_is_what_was_put_in(
    codec: int, size: int, start: int, numbers: list[int], encoded: bytes
) -> None:
    data = preface.packed(codec, size, numbers, start, len(encoded)) + encoded
    assert preface.SIZES.unpack_from(data)[0] == len(data)
    assert preface.behind(data) == encoded
    assert preface.unpacked(data) == preface.Preface(codec, size, tuple(numbers), start if numbers else 0)


def test_a_preface_is_small_whatever_is_in_the_block() -> None:
    data = preface.packed(3, 100, range(50_000), 0, 0)
    assert len(data) <= LIMITS.preface_bytes
    assert preface.unpacked(data).numbers == (), "not told: such a block is decoded when its index is there"


@pytest.mark.parametrize("data", [b"", b"\x01", preface.SIZES.pack(6, 5), preface.SIZES.pack(9, 100) + bytes(20)])
def test_a_damaged_preface_is_no_block(data: bytes) -> None:
    with pytest.raises(MalformedRecord):
        preface.behind(data)
    with pytest.raises(MalformedRecord):
        preface.unpacked(data)


# ---------------------------------------------------------------------- in a fleet


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the blocks that were decoded after their release."""
    seen: list[int] = []
    real = stage.decode

    def counted(place: Any, *arguments: Any, **options: Any) -> None:
        seen.append(place.block.size_bytes)
        real(place, *arguments, **options)

    monkeypatch.setattr(stage, "decode", counted)
    return seen


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("share", [False, True])
def test_what_was_decoded_before_the_last_chunk_was_sent_is_not_decoded_again(
    small_world: World, tmp_path: Path, slow: Callable[..., Slow], until: Until, decodes: list[int], share: bool
) -> None:
    shared = {"share": tmp_path / "share"} if share else {}
    publisher, worker = small_world.publisher(), small_world.worker(**shared)
    publisher.publish(FIRST, version="v1").wait(workers=1, timeout_s=20)
    decodes.clear()
    before, gate = early_bytes(worker), slow(publisher)
    published = gate.publish(SECOND, "v2")
    until(lambda: early_bytes(worker) - before == 8 * CHUNK, "half of it came")
    decoder = worker._pursuit.early._arrival._decoder  # type: ignore[union-attr]
    assert decoder is not None
    embed = bytes(tensor_bytes(SECOND["embed.weight"]))
    until(lambda: tensor_digest(embed) in decoder.found, "a tensor was decoded before the last chunk was sent")
    assert worker.board.status.target.version == "v1"  # type: ignore[union-attr]
    gate.go.set()
    published.result(60).wait(workers=1, timeout_s=20)
    assert holds(worker, SECOND)
    assert decodes == [], "all of it was decoded as it came"
    assert quiet(small_world)
    if share:
        other = small_world.worker("w1", **shared)
        other.wait("v2", timeout_s=20)
        assert holds(other, SECOND)
        assert decodes == []
        assert other.board.status.received_bytes == 0
