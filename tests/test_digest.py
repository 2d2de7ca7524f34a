"""Digests: what they are made of, and what they notice."""

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import xxhash
from blake3 import blake3
from refleet.common import digest
from refleet.common.digest import LEAF_BYTES, digest_of, matching, tensor_digest, tensor_digest_of

SIZES = [0, 1, 16, 240, 241, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 5 * LEAF_BYTES, 5 * LEAF_BYTES + 77]


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def by_hand(data: bytes) -> bytes:
    leaves = b"".join(xxhash.xxh3_128(data[n : n + LEAF_BYTES]).digest() for n in range(0, len(data), LEAF_BYTES))
    return blake3(b"refleet tensor 1\0" + leaves + struct.pack("<Q", len(data))).digest()


@pytest.mark.parametrize("size", SIZES)
def test_a_tensor_digest_is_blake3_of_the_leaves_and_the_size(size: int) -> None:
    assert tensor_digest(noise(size)) == by_hand(noise(size))


@pytest.mark.parametrize("piece", [1000, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 3 * LEAF_BYTES])
def test_it_does_not_depend_on_how_the_bytes_were_cut(piece: int) -> None:
    data = noise(5 * LEAF_BYTES + 77)
    blocks = [bytearray(data[n : n + piece]) for n in range(0, len(data), piece)]
    assert tensor_digest_of(iter(blocks)) == tensor_digest(b"", *blocks, memoryview(b"")) == by_hand(data)


def test_blocks_may_be_reused_when_the_next_one_is_asked_for() -> None:
    data, buffer = noise(3 * LEAF_BYTES + 5), bytearray(1000)

    def blocks():  # type: ignore[no-untyped-def]
        for n in range(0, len(data), len(buffer)):
            part = data[n : n + len(buffer)]
            buffer[: len(part)] = part
            yield memoryview(buffer)[: len(part)]

    assert tensor_digest_of(blocks()) == by_hand(data)


def test_every_bit_and_every_place_counts() -> None:
    data = np.frombuffer(noise(3 * LEAF_BYTES + 333), np.uint8)
    seen = {tensor_digest(data)}
    for at in np.random.default_rng(1).integers(data.size * 8, size=200):
        flipped = data.copy()
        flipped[at // 8] ^= 1 << int(at) % 8
        seen.add(tensor_digest(flipped))
    for moved in (data[1:], data[:-1], np.roll(data, 1), np.roll(data, LEAF_BYTES), np.append(data, np.uint8(0))):
        seen.add(tensor_digest(np.ascontiguousarray(moved)))
    assert len(seen) == 206


def test_known_digests_never_change() -> None:
    # Recorded once: stores and logs out there are named by these.
    assert tensor_digest().hex() == "9c7712134307b8dc4a263998aefff602628b820eee20ac131b2a8bdad5632932"
    known = bytes(range(256)) * 1025
    assert tensor_digest(known).hex() == "444b6127f2976a7cb86b4932ee8ce09a86be83dc2c411767bb7afd27a42aadf7"


def test_tensors_of_any_shape_and_strides_of_their_buffers_are_matched_in_order() -> None:
    tensors = [np.arange(n, dtype=np.float32).reshape(-1, 1) for n in (1, 70_000, 3)]
    digests = [tensor_digest(tensor) for tensor in tensors]
    assert matching(tensors, digests) == [True, True, True]
    assert matching(tensors, [digests[0], digests[2], digests[2]]) == [True, False, True]


def test_many_small_tensors_are_hashed_in_few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[int] = []

    def counted(task: Callable[[Any], Any], items: Iterable[Any], *, threads: int) -> Iterator[Any]:
        for item in items:
            tasks.append(len(item))
            yield task(item)

    monkeypatch.setattr(digest, "in_order", counted)
    tensors = [n.to_bytes(4, "little") for n in range(1000)] + [bytes(3 << 20), b"after"]
    digests = [tensor_digest(tensor) for tensor in tensors]
    digests[777] = digests[776]
    assert matching(tensors, digests) == [n != 777 for n in range(1002)]
    assert sum(tasks) == 1002
    assert len(tasks) < 10


def test_a_blake3_digest_is_of_the_concatenated_bytes() -> None:
    assert digest_of(b"abc") == digest_of(b"a", b"", memoryview(b"bc")) == blake3(b"abc").digest()
    assert digest_of() == digest_of(b"") != digest_of(b"\0")
