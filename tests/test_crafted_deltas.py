"""Deltas that somebody crafted and offers: consistent with themselves, and wrong. None gets near the engine."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from hostile import Line, craft, unchecked
from payload_scene import FIRST, SECOND, Scene
from refleet.common import codec, wire
from refleet.common.errors import WorkerFailed
from refleet.common.messages import Offer
from refleet.common.signing import seal
from refleet.common.types import PayloadRef
from world import World, holds, reason


@pytest.fixture
def scene(small_world: World, until: Callable[..., None]) -> Scene:
    return Scene.of(small_world, until)


def crafted_leaving_out(scene: Scene, name: str = "layer.0.weight") -> PayloadRef:
    lines = [line for line in scene.lines() if line.entry.spec.name != name]
    return craft(scene.outsider, lines, base=scene.base, target=scene.two.release.fingerprint)


def crafted_other_bytes(scene: Scene) -> PayloadRef:
    """The index promises the right digest of every tensor; one block decodes to a single flipped bit."""
    lines = scene.lines()
    number = next(n for n, line in enumerate(lines) if line.entry.spec.name == "layer.0.weight")
    ((codec_id, data),) = lines[number].blocks
    lines[number] = replace(lines[number], blocks=((codec_id, data[:-1] + bytes([data[-1] ^ 0x80])),))
    return craft(scene.outsider, lines, base=scene.base, target=scene.two.release.fingerprint)


def crafted_other_digest(scene: Scene) -> PayloadRef:
    """One tensor is another one, by digest and by bytes: whole in itself, and it leads elsewhere."""
    lines = scene.lines()
    number = next(n for n, line in enumerate(lines) if line.entry.spec.name == "layer.0.bias")
    before = scene.publisher.store.manifest(scene.base).by_name["layer.0.bias"]
    data = bytes(scene.publisher.store.read(before.digest, verify=True))
    lines[number] = Line(before, ((codec.RAW, data),))
    return craft(scene.outsider, lines, base=scene.base, target=scene.two.release.fingerprint)


def crafted_index_of_other_target(scene: Scene) -> PayloadRef:
    return craft(
        scene.outsider, scene.lines(), base=scene.base, target=b"?" * 32, claim_target=scene.two.release.fingerprint
    )


def crafted_wrong_base(scene: Scene) -> PayloadRef:
    """The reference names a base that the worker holds, the index another one."""
    return craft(
        scene.outsider, scene.lines(), base=b"?" * 32, target=scene.two.release.fingerprint, claim_base=scene.base
    )


def with_block(scene: Scene, codec_id: int, data: bytes) -> PayloadRef:
    lines = [
        replace(line, blocks=((codec_id, data),)) if line.entry.spec.name == "layer.0.weight" else line
        for line in scene.lines()
    ]
    return craft(scene.outsider, lines, base=scene.base, target=scene.two.release.fingerprint)


def bomb_frame() -> bytes:
    """A zstd frame of a few bytes that declares a terabyte."""
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", 1 << 40) + b"\x03\x00\x00\x00"


def crafted_bomb(scene: Scene) -> PayloadRef:
    frame = bomb_frame()
    plane = bytes(256 * 256)
    return with_block(scene, codec.ZSTD, b"\x01" + struct.pack("<I", len(frame)) + frame + plane * 3)


def crafted_unknown_codec(scene: Scene) -> PayloadRef:
    return with_block(scene, 77, b"whatever")


def crafted_sparse_garbage(scene: Scene) -> PayloadRef:
    return with_block(scene, codec.SPARSE, bytes(range(256)) * 8)


def crafted_raw_short(scene: Scene) -> PayloadRef:
    return with_block(scene, codec.RAW, bytes(1000))


CRAFTED: dict[str, tuple[Callable[[Scene], PayloadRef], str]] = {
    "a changed tensor left out": (crafted_leaving_out, "DigestMismatch"),
    "right digests, other bytes": (crafted_other_bytes, "DigestMismatch"),
    "another tensor, right in itself": (crafted_other_digest, "DigestMismatch"),
    "an index towards another version": (crafted_index_of_other_target, "DigestMismatch"),
    "a wrong base": (crafted_wrong_base, "DigestMismatch"),
    "a zstd bomb": (crafted_bomb, "LimitExceeded"),
    "an unknown codec": (crafted_unknown_codec, "MalformedRecord"),
    "sparse garbage": (crafted_sparse_garbage, "MalformedRecord"),
    "a short block": (crafted_raw_short, "MalformedRecord"),
}


@pytest.mark.parametrize("how", CRAFTED)
def test_a_crafted_delta_is_refused_and_an_honest_one_asked_for(scene: Scene, how: str) -> None:
    """I2, I9, I19."""
    make, because = CRAFTED[how]
    scene.converges(scene.only(make(scene)), because=because)


@pytest.mark.parametrize("how", CRAFTED)
def test_a_crafted_delta_never_gets_near_the_engine(scene: Scene, how: str) -> None:
    """I3."""
    make, because = CRAFTED[how]
    scene.stays(scene.only(make(scene)), because=because)


def test_a_delta_from_a_version_that_is_not_held_is_never_fetched(scene: Scene) -> None:
    ref = craft(scene.outsider, scene.lines(), base=b"?" * 32, target=scene.two.release.fingerprint)
    scene.only(ref)
    scene.publisher.close()
    scene.world.publishers.clear()
    worker = scene.world.worker(engine=scene.engine)
    scene.until(lambda: worker.board.status.want, "it asks for a delta from what it has")
    assert ref.payload_id not in worker.board.status.want.refused  # type: ignore[union-attr]
    assert scene.refusals == []
    assert holds(worker, FIRST)


@pytest.mark.parametrize("bytes_claimed", [1 << 40, 65 * (1 << 20)])
def test_an_offer_of_a_huge_index_is_refused_unread(scene: Scene, bytes_claimed: int) -> None:
    """I19."""
    ref = unchecked(scene.ref, index_bytes=bytes_claimed)
    offer = Offer(scene.publisher.model, scene.publisher.store.id, 1, scene.ref)
    scene.outsider.control(seal(wire.pack(unchecked(offer, payload=ref)), None))
    worker = scene.world.worker(engine=scene.engine)
    worker.wait("v2", timeout_s=20)
    assert worker.board.status.last_refusal.code == "MalformedRecord"  # type: ignore[union-attr]


def test_the_worker_outlives_many_bad_payloads(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """I12: however many were bad, the next honest one is taken; meanwhile the fleet is told of the failure."""
    monkeypatch.setattr("refleet.worker.staging._RETRY_S", 0.3)
    scene.world.carrier.stream().drop_payload(scene.ref.payload_id)
    scene.publisher.close()
    scene.world.publishers.clear()
    bad = [crafted_leaving_out(scene, name) for name in ("layer.0.weight", "layer.0.bias", "embed.weight") * 2]
    for ref in bad:
        scene.outsider.offer(scene.publisher, ref)
    worker = scene.world.worker(engine=scene.engine)
    scene.until(lambda: len(scene.refusals) == len(bad), "all of them refused")
    assert holds(worker, FIRST)
    two = replace(scene.two, stream=scene.world.carrier.stream())
    assert isinstance(reason(lambda: two.wait(workers=1, timeout_s=20)), WorkerFailed)
    with scene.world.publisher()._exclusive("answer"):
        pass
    worker.wait("v2", timeout_s=20)
    assert holds(worker, SECOND)
