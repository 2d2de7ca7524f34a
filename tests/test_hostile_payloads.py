"""Payloads spoiled in the server. The worker refuses each by itself, asks for another, and gets to the release through
the publisher's answer; without one it serves what it served."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hostile import Chunks, craft, raw_lines
from payload_scene import Scene
from world import World

Until = Callable[..., None]


@pytest.fixture
def scene(world: World, until: Until) -> Scene:
    return Scene.of(world, until)


@pytest.fixture
def small_scene(small_world: World, until: Until) -> Scene:
    return Scene.of(small_world, until)


def flip_bit(chunks: Chunks) -> Chunks:
    data = chunks[0]
    return chunks | {0: data[:99] + bytes([data[99] ^ 1]) + data[100:]}


def flip_index_bit(chunks: Chunks) -> Chunks:
    last = max(chunks)
    return chunks | {last: chunks[last][:-1] + bytes([chunks[last][-1] ^ 1])}


SPOILED: dict[str, tuple[Callable[[Chunks], Chunks], str]] = {
    "a bit flipped": (flip_bit, "DigestMismatch"),
    "a chunk truncated": (lambda chunks: chunks | {0: chunks[0][:-1]}, "DigestMismatch"),
    "a chunk emptied": (lambda chunks: chunks | {0: b""}, "DigestMismatch"),
    "a chunk longer": (lambda chunks: chunks | {0: chunks[0] + b"\0"}, "DigestMismatch"),
    "chunks swapped": (lambda chunks: {0: chunks[1], 1: chunks[0]}, "DigestMismatch"),
    "a bit of the index flipped": (flip_index_bit, "DigestMismatch"),
    "the index truncated": (lambda chunks: chunks | {1: chunks[1][:-1]}, "DigestMismatch"),
    "the index huge": (lambda chunks: chunks | {1: chunks[1] * 5000}, "DigestMismatch"),
    "a chunk missing": (lambda chunks: {1: chunks[1]}, "StreamGap"),
    "the index missing": (lambda chunks: {0: chunks[0]}, "StreamGap"),
    "the payload gone": (lambda _chunks: {}, "StreamGap"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_payload_spoiled_in_the_server_is_refused_and_replaced(small_scene: Scene, how: str) -> None:
    """I9."""
    change, because = SPOILED[how]
    small_scene.outsider.edit(small_scene.ref.payload_id, change)
    small_scene.converges(small_scene.ref, because=because)


@pytest.mark.parametrize("how", ["a bit flipped", "a bit of the index flipped", "a chunk missing"])
def test_a_payload_spoiled_in_a_real_server_is_refused_and_replaced(scene: Scene, how: str) -> None:
    change, because = SPOILED[how]
    scene.outsider.edit(scene.ref.payload_id, change)
    scene.converges(scene.ref, because=because)


@pytest.mark.parametrize("how", ["a bit flipped", "chunks swapped", "a bit of the index flipped", "the payload gone"])
def test_without_an_honest_publisher_the_old_version_is_served_on(small_scene: Scene, how: str) -> None:
    change, because = SPOILED[how]
    small_scene.outsider.edit(small_scene.ref.payload_id, change)
    small_scene.stays(small_scene.ref, because=because)


def test_the_payload_of_another_version_under_this_payload_id_is_refused(small_scene: Scene) -> None:
    """Every digest in it is right, for another release."""
    scene = small_scene
    store = scene.publisher.store
    other = craft(
        scene.outsider, raw_lines(scene.publisher, store.manifest(scene.base), None), base=None, target=scene.base
    )
    stream = scene.world.carrier.stream()
    chunks = dict(enumerate(stream.chunks(other.payload_id, 0, 2, carrier=other.carrier)))
    scene.outsider.edit(scene.ref.payload_id, lambda _chunks: chunks)
    scene.converges(scene.ref, because="DigestMismatch")
