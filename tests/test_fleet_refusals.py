"""What is refused, what fails, and who hears why: on both sides of the whole path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from refleet.common.errors import (
    DeadlineExceeded,
    IncompatibleCheckpoint,
    PublisherBusy,
    StaleEpoch,
    UnknownVersion,
    UsageError,
    VersionExists,
    WorkerFailed,
)
from refleet.common.messages import Evidence, Failure
from refleet.common.signing import SigningKey, Trust
from refleet.common.types import Manifest, TensorSpec
from refleet.publisher import claim
from refleet.publisher.fleet import Fleet, WorkerView
from refleet.publisher.verify import verify
from refleet.publisher.wait import _check_refusal
from refleet.worker.memory_engine import MemoryEngine
from world import World, checkpoint, holds, reason, served

Until = Callable[..., None]


# ---------------------------------------------------------------------- refusals on the publishing side


def test_the_same_version_id_never_changes_its_meaning(small_world: World) -> None:
    publisher = small_world.publisher()
    first = publisher.publish(checkpoint(1), version="step-1")
    error = reason(lambda: publisher.publish(checkpoint(2), version="step-1"))
    assert isinstance(error, VersionExists)
    assert "step-1" in error.serving
    again = publisher.publish(checkpoint(1), version="step-1")
    assert again.already
    assert again.release == first.release
    assert len(publisher.book.releases()) == 1


def test_a_trainer_that_counts_from_zero_again_does_not_rewrite_history(small_world: World) -> None:
    publisher = small_world.publisher()
    for n in range(3):
        publisher.publish(checkpoint(n), version=f"step-{n}")
    publisher.close()
    restarted = small_world.publisher()
    assert isinstance(reason(lambda: restarted.publish(checkpoint(50), version="step-0")), VersionExists)
    assert restarted.publish(checkpoint(51), version="run2-step-0").release.seq == 4
    assert restarted.publish(checkpoint(52)).release.version == "v5", "a free id is found when none is given"


def test_other_shapes_are_refused_by_name_and_nothing_is_published(small_world: World) -> None:
    publisher = small_world.publisher()
    publisher.publish(checkpoint(1), version="v1")
    other = checkpoint(2) | {"layer.0.bias": torch.zeros(255, dtype=torch.float16)}
    error = reason(lambda: publisher.publish(other, version="v2"))
    assert isinstance(error, IncompatibleCheckpoint)
    assert "layer.0.bias" in str(error)
    assert "256" in str(error)
    assert "255" in str(error)
    assert [r.version for r in publisher.book.releases()] == ["v1"]
    assert publisher.publish(checkpoint(2), version="v2").release.seq == 2, "the id is still free"


def test_an_unknown_rollback_names_what_there_is(small_world: World) -> None:
    publisher = small_world.publisher(keep=1)
    for n in range(3):
        publisher.publish(checkpoint(n), version=f"v{n}")
    assert isinstance(reason(lambda: publisher.rollback("nope")), UnknownVersion)
    past = reason(lambda: publisher.rollback("v0"))
    assert isinstance(past, UnknownVersion)
    assert "retention" in str(past)
    assert "v2" in past.next


def test_a_second_store_is_refused_until_it_takes_over_and_then_the_first_one_stops(world: World) -> None:
    """I13."""
    first, second = world.publisher("one"), world.publisher("two")
    worker = world.worker()
    first.publish(checkpoint(1), version="v1").wait(workers=1)
    busy = reason(lambda: second.publish(checkpoint(2), version="x1"))
    assert isinstance(busy, PublisherBusy)
    assert "one" in str(busy)
    third = world.publisher("two", take_over=True)
    taken = third.publish(checkpoint(2), version="x1")
    assert taken.release.epoch == 2
    taken.wait(workers=1)
    assert isinstance(reason(lambda: first.publish(checkpoint(3), version="v2")), StaleEpoch)
    assert holds(worker, checkpoint(2))


def test_two_commands_on_one_store_are_one_publisher(world: World) -> None:
    serving, command = world.publisher(), world.publisher(answer=False)
    worker = world.worker()
    serving.publish(checkpoint(1), version="v1").wait(workers=1)
    command.publish(checkpoint(2), version="v2").wait(workers=1)
    serving.rollback("v1").wait(workers=1)
    assert [(r.epoch, r.seq) for r in serving.book.releases()] == [(1, 1), (1, 2), (1, 3)]
    assert holds(worker, checkpoint(1))


# ---------------------------------------------------------------------- refusals on the serving side


def test_a_version_that_the_engine_can_not_hold_is_refused_before_payload_moves(world: World) -> None:
    """I17: a worker of another architecture."""
    publisher = world.publisher()
    other = world.worker("other", engine=MemoryEngine([TensorSpec("something.else", "F32", (3,))]))
    published = publisher.publish(checkpoint(1), version="v1")
    error = reason(lambda: published.wait(workers=1, timeout_s=20))
    assert isinstance(error, WorkerFailed)
    assert "something.else" in str(error)
    assert served(other) is None
    assert other.store.size_bytes < 10_000, "no tensor was staged"
    assert [a.evidence for a in world.acks("other")] == [Evidence.NONE]


def test_a_failed_apply_leaves_the_previous_version_serving_bit_for_bit(world: World) -> None:
    """I5."""
    engine, publisher = MemoryEngine(), world.publisher()
    worker = world.worker(engine=engine)
    first = checkpoint(1)
    publisher.publish(first, version="v1").wait(workers=1)
    engine.fail_after = 2
    bad = publisher.publish(checkpoint(2), version="v2")
    error = reason(lambda: bad.wait(workers=1, timeout_s=20))
    assert isinstance(error, WorkerFailed)
    assert "serves v1" in error.serving
    assert holds(worker, first)
    assert served(worker).version == "v1"  # type: ignore[union-attr]
    publisher.publish(checkpoint(3), version="v3").wait(workers=1)
    assert holds(worker, checkpoint(3)), "the next release is applied"


class LyingEngine(MemoryEngine):
    """Writes other bytes than it was given, from the second version on, and can't be restored either if `for_good`."""

    lies, for_good = False, False

    def apply(self, staged, changed):  # type: ignore[no-untyped-def]
        super().apply(staged, changed)
        if self.lies:
            name = next(iter(sorted(changed)))
            self.tensors[name] = bytes(len(self.tensors[name]))
            self.lies = self.for_good


def test_an_engine_that_holds_other_bytes_is_caught_by_reading_back_and_restored(small_world: World) -> None:
    """I4: no ack says REFITTED on hope."""
    engine, publisher = LyingEngine(), small_world.publisher()
    worker = small_world.worker(engine=engine)
    publisher.publish(checkpoint(1), version="v1").wait(workers=1)
    engine.lies = True
    bad = publisher.publish(checkpoint(2), version="v2")
    assert "RefitFailed" in str(reason(lambda: bad.wait(workers=1, timeout_s=20)))
    assert holds(worker, checkpoint(1))
    best = max(a.evidence for a in small_world.acks("w0") if a.order == bad.release.order)
    assert best == Evidence.STAGED


def test_an_engine_that_can_not_be_restored_is_quarantined(small_world: World, until: Until) -> None:
    engine, publisher = LyingEngine(), small_world.publisher()
    worker = small_world.worker(engine=engine)
    publisher.publish(checkpoint(1), version="v1").wait(workers=1)
    engine.lies = engine.for_good = True
    bad = publisher.publish(checkpoint(2), version="v2")
    assert "Quarantined" in str(reason(lambda: bad.wait(workers=1, timeout_s=20)))
    assert served(worker) is None
    until(lambda: worker.board.status.state == "QUARANTINED", "v1 could not be applied again either")
    assert world_refuses_requests(worker)
    engine.lies = engine.for_good = False
    publisher.publish(checkpoint(3), version="v3").wait(workers=1)
    assert holds(worker, checkpoint(3)), "a complete, proven version ends the quarantine"


def world_refuses_requests(worker) -> bool:  # type: ignore[no-untyped-def]
    def ask() -> None:
        with worker.serving(timeout_s=1):
            pass

    return reason(ask).code == "NotServing"


class MoodyEngine(MemoryEngine):
    """Answers its probe differently each time, from when `moody` is set."""

    moody, answers = False, 0

    def probe(self) -> bytes | None:
        self.answers += 1
        return bytes([self.answers % 256] * 32) if self.moody else super().probe()


def test_a_probe_that_differs_from_the_first_time_is_refused(small_world: World) -> None:
    """I8: the same build and fingerprint must answer bit for bit as before."""
    engine, publisher = MoodyEngine(), small_world.publisher()
    worker = small_world.worker(engine=engine)
    publisher.publish(checkpoint(1), version="v1").wait(workers=1)
    publisher.publish(checkpoint(2), version="v2").wait(workers=1)
    honest = engine.probe

    class Once:
        def __call__(self) -> bytes | None:
            engine.probe = honest  # type: ignore[method-assign]
            return b"?" * 32

    engine.probe = Once()  # type: ignore[method-assign]
    back = publisher.rollback("v1")
    assert "ProbeMismatch" in str(reason(lambda: back.wait(workers=1, timeout_s=20)))
    assert holds(worker, checkpoint(2))
    assert served(worker).version == "v2"  # type: ignore[union-attr]


# ---------------------------------------------------------------------- verify


def test_verify_passes_on_honest_engines_and_names_the_first_differing_tensor(world: World) -> None:
    publisher = world.publisher()
    honest, engine = world.worker("honest"), MemoryEngine()
    touched = world.worker("touched", engine=engine)
    publisher.publish(checkpoint(1), version="v1").wait(workers=2)
    stream = world.carrier.stream()
    assert verify(stream, timeout_s=20).ok
    engine.tensors["layer.0.weight"] = bytes(len(engine.tensors["layer.0.weight"]))
    result = verify(stream, timeout_s=20)
    assert not result.ok
    assert result.answers["honest"].verified.ok  # type: ignore[union-attr]
    assert result.answers["touched"].verified.first_bad == "layer.0.weight"  # type: ignore[union-attr]
    touched.wait("v1", timeout_s=20)
    assert holds(touched, checkpoint(1)), "it applied the version again by itself"
    assert verify(stream, timeout_s=20).ok
    assert served(honest) is not None


# ---------------------------------------------------------------------- waiting


def test_waiting_names_who_is_missing(small_world: World) -> None:
    published = small_world.publisher().publish(checkpoint(1), version="v1")
    nobody = reason(lambda: published.wait(timeout_s=0.3))
    assert isinstance(nobody, DeadlineExceeded)
    assert "no worker" in str(nobody)
    small_world.worker("w7")
    error = reason(lambda: published.wait(workers=2, timeout_s=2))
    assert isinstance(error, DeadlineExceeded)
    assert "1 of 2" in str(error)


def test_evidence_names_are_checked(small_world: World) -> None:
    published = small_world.publisher().publish(checkpoint(1), version="v1")
    assert isinstance(reason(lambda: published.wait(evidence="HOPED")), UsageError)


def test_the_fingerprint_covers_every_tensor_and_matches_on_both_sides(small_world: World) -> None:
    publisher = small_world.publisher()
    worker = small_world.worker()
    published = publisher.publish(checkpoint(1), version="v1")
    published.wait(workers=1)
    manifest = worker.store.manifest(published.release.fingerprint)
    rebuilt = Manifest.of(manifest.tensors)
    assert rebuilt.fingerprint == published.release.fingerprint == served(worker).fingerprint  # type: ignore[union-attr]


def test_the_status_is_there_before_the_ack_that_it_belongs_to(world: World) -> None:
    """A script that reads `status` after `publish --wait` must not see the step before."""
    from refleet.publisher.fleet import fleet

    publisher, stream = world.publisher(), world.carrier.stream()
    world.worker(heartbeat_s=30)
    for n in range(5):
        published = publisher.publish(checkpoint(n), version=f"v{n}")
        published.wait(workers=1)
        (worker,) = fleet(stream).workers
        assert worker.status is not None
        assert worker.status.serving is not None
        assert (worker.state, worker.status.serving.version) == ("SERVING", f"v{n}")


def test_waiting_ends_at_once_with_the_reason_of_a_worker_that_refuses_the_release(small_world: World) -> None:
    trusted, other = SigningKey.new(), SigningKey.new()
    Trust.add(small_world.folder / "trusted", trusted.public_text)
    small_world.worker(trust=small_world.folder / "trusted")
    unsigned = small_world.publisher().publish(checkpoint(1), version="v1")
    error = reason(lambda: unsigned.wait(workers=1, timeout_s=60))
    assert isinstance(error, WorkerFailed)
    assert "BadSignature" in str(error)
    foreign = small_world.publisher(key=other).publish(checkpoint(2), version="v2")
    assert "UnknownKey" in str(reason(lambda: foreign.wait(workers=1, timeout_s=60)))
    small_world.publisher(key=trusted).publish(checkpoint(3), version="v3").wait(workers=1)


def test_what_a_worker_refused_at_this_place_before_the_log_was_lost_is_not_this_release(small_world: World) -> None:
    """The numbers of a forged entry come again when the server forgot it."""
    worker = small_world.worker()
    published = small_world.publisher().publish(checkpoint(1), version="v1")
    worker.wait("v1", timeout_s=20)
    order = published.release.order
    old = Failure("BadSignature", f"log entry {order[0]}-{order[1]}: an unsigned record", None)
    status = replace(worker.board.status, last_refusal=old)
    _check_refusal(published.release, WorkerView("w0", status, 0.0, None))
    refused = WorkerView("w0", replace(status, target=None), 0.0, None)
    assert isinstance(reason(lambda: _check_refusal(published.release, refused)), WorkerFailed)


def test_an_epoch_that_was_claimed_again_in_an_emptied_server_is_left_by_the_next_command(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I13, I14: workers believe the first store in that epoch, and must not be left without any."""
    first = small_world.publisher("first", answer=False)
    worker = small_world.worker()
    first.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    small_world.carrier.lose()
    with monkeypatch.context() as early:  # before the heartbeats are back
        early.setattr(claim, "fleet", lambda stream: Fleet(stream.model, None, ()))
        second = small_world.publisher("second", answer=False)
        refused = second.publish(checkpoint(2), version="v2")
    assert refused.release.epoch == 1, "the same epoch twice"
    assert isinstance(reason(lambda: refused.wait(workers=1, timeout_s=0.5)), DeadlineExceeded | WorkerFailed)
    published = small_world.publisher("second").publish(checkpoint(3), version="v3")
    assert published.release.epoch == 2
    published.wait(workers=1, timeout_s=20)
    assert holds(worker, checkpoint(3))
