"""Records that must change nothing: forged, replayed, outdated, foreign, malformed. Each is refused and reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hostile import OTHER_STORE, Outsider, forged, next_order
from refleet.common import wire
from refleet.common.errors import DeadlineExceeded, StaleEpoch
from refleet.common.limits import LIMITS
from refleet.common.messages import Ack, Evidence, Release, Serving
from refleet.common.signing import SigningKey, seal
from refleet.publisher import Publisher
from refleet.publisher.fleet import WorkerView, fleet
from refleet.publisher.published import Published
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.worker import Worker
from world import World, checkpoint, holds, reason, served

Until = Callable[..., None]


@dataclass
class Scene:
    """A worker that serves v2 and still has v1 on its disk: what a forged rollback would need."""

    world: World
    outsider: Outsider
    publisher: Publisher
    worker: Worker
    one: Published
    two: Published
    until: Until
    written: int
    first_refusals: int = 0

    @classmethod
    def of(
        cls,
        world: World,
        until: Until,
        *,
        key: SigningKey | None = None,
        trust: Path | None = None,
        answer: bool = True,
    ) -> Scene:  # fmt: skip
        publisher, worker = world.publisher(key=key, answer=answer), world.worker(trust=trust)
        one = publisher.publish(checkpoint(1), version="v1")
        one.wait(workers=1, timeout_s=20)
        two = publisher.publish(checkpoint(2), version="v2")
        two.wait(workers=1, timeout_s=20)
        assert isinstance(worker.engine, MemoryEngine)
        return cls(world, Outsider(world.carrier), publisher, worker, one, two, until, len(worker.engine.written))

    @property
    def view(self) -> WorkerView:
        return next(w for w in fleet(self.world.carrier.stream()).workers if w.id == self.worker.id)

    @property
    def to_v1(self) -> Release:
        """What would make the worker serve v1 without a byte of payload, if it were believed."""
        release = self.two.release
        epoch, seq = next_order(release)
        return Release(
            release.model, release.publisher, epoch, seq, "rollback", "v1", self.one.release.fingerprint,
            release.fingerprint, None, 0, release.total_tensors, 0, release.full_bytes, 0, "", False,
        )  # fmt: skip

    def refused(self, *codes: str) -> None:
        """The worker reported exactly these refusals, and nothing else happened."""
        engine = self.worker.engine
        assert isinstance(engine, MemoryEngine)
        wanted = self.first_refusals + len(codes)

        def shown() -> bool:
            status = self.view.status
            return status is not None and status.refused >= wanted

        self.until(shown, f"{codes} reported; so far {self.told()}")
        status = self.view.status
        assert status is not None
        assert status.refused == wanted, self.told()
        assert status.last_refusal is not None
        assert status.last_refusal.code == codes[-1]
        assert [e.failure.code for e in self.told()[self.first_refusals :] if e.failure] == list(codes)
        assert self.view.to_dict()["last_refusal"] == status.last_refusal.what
        assert served(self.worker) == Serving("v2", *self.two.release.order, self.two.release.fingerprint)
        assert holds(self.worker, checkpoint(2))
        assert len(engine.written) == self.written, "the engine was touched"
        assert status.state == "SERVING"
        self.first_refusals = wanted

    def told(self):  # type: ignore[no-untyped-def]
        return [e for e in self.world.events[self.worker.id] if e.text.startswith("refused a record")]

    def target_is_v2(self) -> None:
        """Whoever only looks at the log sees through it, too."""
        assert fleet(self.world.carrier.stream()).target == self.two.release

    def goes_on(self) -> None:
        """An honest release is served afterwards."""
        self.publisher.publish(checkpoint(3), version="v3").wait(workers=1, timeout_s=20)
        assert holds(self.worker, checkpoint(3))


def trust_file(folder: Path, key: SigningKey) -> Path:
    path = folder / "trusted"
    path.write_text(key.public_text + "\n")
    return path


def test_a_release_without_a_trusted_signature_is_refused(world: World, until: Until, tmp_path: Path) -> None:
    """I6, I9: everything else about these records is right, checksums included."""
    key, stranger = SigningKey.new(), SigningKey.new()
    scene = Scene.of(world, until, key=key, trust=trust_file(tmp_path, key))
    assert scene.view.status.signed  # type: ignore[union-attr]
    data = wire.pack(scene.to_v1)
    for seq, record, code in (
        (3, seal(data, None), "BadSignature"),
        (4, seal(data, stranger), "UnknownKey"),
        (5, seal(data, key)[:-1] + b"\0", "BadSignature"),
    ):
        scene.outsider.log((1, seq), record)
        scene.refused(code)
    scene.goes_on()


def test_a_forged_release_is_not_mistaken_for_a_newer_one(small_world: World, until: Until, tmp_path: Path) -> None:
    """The workers refuse it, so waiting for the real one goes on."""
    world, key = small_world, SigningKey.new()
    scene = Scene.of(world, until, key=key, trust=trust_file(tmp_path, key))
    world.stop("w0")
    published = scene.publisher.publish(checkpoint(3), version="v3")
    scene.outsider.log((1, 4), forged(scene.to_v1, seq=4))
    worker = world.worker("w0", trust=trust_file(tmp_path, key))
    assert published.wait(workers=1, timeout_s=20)["w0"].version == "v3"
    assert holds(worker, checkpoint(3))


def test_an_offer_without_a_trusted_signature_is_refused(small_world: World, until: Until, tmp_path: Path) -> None:
    key = SigningKey.new()
    scene = Scene.of(small_world, until, key=key, trust=trust_file(tmp_path, key))
    assert scene.one.release.payload is not None
    scene.outsider.offer(scene.publisher, scene.one.release.payload)
    scene.refused("BadSignature")


def test_a_replayed_release_is_refused(world: World, until: Until) -> None:
    """The publisher's own bytes, signature and all, at another place in the log."""
    scene = Scene.of(world, until)
    scene.outsider.log((1, 3), scene.publisher.book.release_bytes(scene.one.release))
    scene.refused("MalformedRecord")
    scene.target_is_v2()
    assert "1-1: copied from elsewhere" in scene.view.status.last_refusal.what  # type: ignore[union-attr]
    scene.goes_on()


def test_other_content_under_an_accepted_order_is_refused(small_world: World, until: Until) -> None:
    """Only a server that lost the log takes such an entry at all."""
    world = small_world
    scene = Scene.of(world, until, answer=False)
    scene.outsider.lose("log")
    scene.refused("StreamReset")
    scene.outsider.log((1, 1), scene.publisher.book.release_bytes(scene.one.release))
    scene.refused("ReplayedRelease")
    scene.outsider.log((1, 2), forged(scene.to_v1, seq=2))
    scene.refused("ReplayedRelease")
    scene.goes_on()


def test_a_release_of_another_model_is_refused(small_world: World, until: Until) -> None:
    world = small_world
    scene = Scene.of(world, until)
    scene.outsider.log((1, 3), forged(scene.to_v1, model="other"))
    scene.refused("MalformedRecord")
    scene.target_is_v2()
    assert "model 'other'" in scene.view.status.last_refusal.what  # type: ignore[union-attr]
    scene.goes_on()


def test_a_second_publisher_within_one_epoch_is_refused(small_world: World, until: Until) -> None:
    """I13."""
    world = small_world
    scene = Scene.of(world, until)
    scene.outsider.log((1, 3), forged(scene.to_v1, publisher=OTHER_STORE))
    scene.refused("StaleEpoch")
    assert "second publisher" in scene.view.status.last_refusal.what  # type: ignore[union-attr]
    scene.goes_on()


def test_workers_refuse_an_older_epoch_by_themselves(world: World, until: Until) -> None:
    """I13: the server has forgotten log, epoch and lease, and lets the fenced-off publisher's release through."""
    scene = Scene.of(world, until, answer=False)
    taker = world.publisher("two", take_over=True, answer=False)
    scene.two = taker.publish(checkpoint(2), version="v2")
    scene.two.wait(workers=1, timeout_s=20)
    assert scene.two.release.epoch == 2
    scene.outsider.lose("log", "epoch", "lease")
    scene.refused("StreamReset")
    scene.outsider.log((1, 3), forged(scene.to_v1, epoch=1, seq=3))
    scene.refused("StaleEpoch")
    acked = len(world.acks("w0"))
    assert taker.publish(checkpoint(2), version="v2").already
    until(lambda: len(world.acks("w0")) > acked, "the true release, delivered again, is acknowledged again")
    assert isinstance(reason(lambda: scene.publisher.publish(checkpoint(3), version="v3")), StaleEpoch)


def test_an_offer_of_an_older_epoch_is_refused(small_world: World, until: Until) -> None:
    world = small_world
    scene = Scene.of(world, until)
    taker = world.publisher("two", take_over=True)
    scene.two = taker.publish(checkpoint(2), version="v2")
    scene.two.wait(workers=1, timeout_s=20)
    assert scene.one.release.payload is not None
    scene.outsider.offer(taker, scene.one.release.payload, epoch=1)
    scene.refused("StaleEpoch")


def test_garbage_in_every_key_changes_nothing(world: World, until: Until) -> None:
    """I9, I19: also the publisher and `status` read past it."""
    scene = Scene.of(world, until)
    honest = scene.publisher.book.release_bytes(scene.two.release)
    garbage = [
        b"",
        b"\0",
        b"\xff" * 50,
        b"not a record",
        honest[:-1],
        honest + b"\0",
        b"\x93" * 2000,
        wire.pack(scene.to_v1),
    ]
    for number, data in enumerate(garbage):
        scene.outsider.log((1, 3 + number), data)
        scene.outsider.control(data)
        scene.outsider.ack("w0", data)
        scene.outsider.ack("ghost", data)
        scene.outsider.status(f"ghost-{number}", data)
    scene.outsider.log((1, 50), b"x" * (LIMITS.record_bytes + 200))
    count = 2 * len(garbage) + 1
    until(lambda: scene.view.status and scene.view.status.refused >= count, f"{count} refusals")
    assert scene.view.status.refused == count  # type: ignore[union-attr]
    assert {e.failure.code for e in scene.told() if e.failure} == {"MalformedRecord", "LimitExceeded"}
    assert served(scene.worker).version == "v2"  # type: ignore[union-attr]
    now = fleet(world.carrier.stream())
    assert now.target is not None
    assert now.target.version == "v2"
    assert [w.id for w in now.live] == ["w0"], "garbage is no worker"
    scene.goes_on()


def test_a_spoiled_end_of_the_log_does_not_stop_the_publisher(world: World, until: Until) -> None:
    """An entry far above the publisher's epoch: its next release gets an epoch above that."""
    scene = Scene.of(world, until)
    scene.outsider.log((99, 7), b"garbage")
    scene.refused("MalformedRecord")
    scene.goes_on()
    assert scene.publisher.target().epoch == 100  # type: ignore[union-attr]


def test_acks_that_do_not_fit_the_release_are_not_believed(small_world: World) -> None:
    """I4: in another's name, of another version's fingerprint, of another release."""
    world, outsider = small_world, Outsider(small_world.carrier)
    worker = world.worker()
    publisher = world.publisher()
    publisher.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    status = wire.pack(worker.board.status)
    world.stop("w0")
    outsider.status("w0", status)
    published = publisher.publish(checkpoint(2), version="v2")
    release = published.release
    honest = Ack(
        worker="w0", model=release.model, epoch=release.epoch, seq=release.seq, version="v2",
        evidence=Evidence.SERVING, fingerprint=release.fingerprint, serving="v2", engine_build="b", payload_bytes=0,
    )  # fmt: skip
    for wrong in (
        replace(honest, worker="w9"),
        replace(honest, fingerprint=b"?" * 32),
        replace(honest, seq=1),
        replace(honest, epoch=7),
        replace(honest, evidence=Evidence.STAGED),
    ):
        outsider.ack("w0", wire.pack(wrong))
    assert isinstance(reason(lambda: published.wait(workers=1, timeout_s=0.5)), DeadlineExceeded)
    outsider.ack("w0", wire.pack(honest))
    assert published.wait(workers=1, timeout_s=20), "the acks of this test are well-formed"
