"""`refleet verify --deep` on engines with a serialized form, and what acks say of how a version was applied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cli_runs import Cli
from refleet.common.digest import digest_of
from refleet.common.errors import StoreFull
from refleet.common.limits import LIMITS
from refleet.common.messages import Evidence, Verified
from refleet.publisher.verify import Verification, verify
from refleet.worker.engine import StagedVersion
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.prove import NO_FORM
from world import World, checkpoint, holds, reason, served

Until = Callable[..., None]


class Serialized(MemoryEngine):
    """Has a serialized form: its tensors and `extra`, which no tensor shows. `broken`: can't be serialized."""

    extra = b""
    broken = False
    asked = 0

    def apply(self, staged: StagedVersion, changed: frozenset[str]) -> None:
        super().apply(staged, changed)
        self.applied = f"refitted {len(changed)} tensors in place"

    def content_digest(self) -> bytes | None:
        self.asked += 1
        if self.broken:
            raise RuntimeError("out of host memory")
        return digest_of(*self.tensors.values(), self.extra)


def answered(found: Verification, worker: str = "w0") -> Verified:
    verified = found.answers[worker].verified
    assert verified is not None
    return verified


# ---------------------------------------------------------------------- one worker


def test_a_deep_verification_tells_the_digest_of_the_engine_and_an_ordinary_one_does_not_even_ask(world: World) -> None:
    engine, publisher = Serialized(), world.publisher()
    world.worker(engine=engine)
    publisher.publish(checkpoint(1), version="v1").wait(workers=1)
    stream = world.carrier.stream()
    plain = verify(stream, timeout_s=20)
    assert plain.ok
    assert (answered(plain).engine, answered(plain).note, engine.asked) == (None, "", 0)
    for _ in range(2):
        deep = verify(stream, deep=True, timeout_s=20)
        assert deep.ok
        assert (answered(deep).engine, answered(deep).note) == (engine.content_digest(), "")


def test_an_engine_that_changed_where_no_tensor_shows_it_is_found_and_put_right(small_world: World) -> None:
    engine, publisher = Serialized(), small_world.publisher()
    worker = small_world.worker(engine=engine)
    publisher.publish(checkpoint(1), version="v1").wait(workers=1)
    stream = small_world.carrier.stream()
    assert verify(stream, deep=True, timeout_s=20).ok
    engine.extra = b"a weight that is no tensor of the version"
    assert verify(stream, timeout_s=20).ok, "reading back the tensors does not show it"
    found = verify(stream, deep=True, timeout_s=20)
    assert not found.ok
    assert found.answers["w0"].failure.code == "DigestMismatch"  # type: ignore[union-attr]
    assert (answered(found).ok, answered(found).engine, answered(found).note) == (False, engine.content_digest(), "")
    assert "QUARANTINED" in [event.state for event in small_world.events["w0"]]
    engine.extra = b""  # what applying it again would do to a real one
    worker.wait("v1", timeout_s=20)
    assert verify(stream, deep=True, timeout_s=20).ok


def test_the_digest_belongs_to_one_build_and_one_version_and_survives_a_restart(small_world: World) -> None:
    engine, publisher = Serialized(), small_world.publisher()
    small_world.worker(engine=engine)
    stream = small_world.carrier.stream()
    for number in (1, 2):
        publisher.publish(checkpoint(number), version=f"v{number}").wait(workers=1)
        assert verify(stream, deep=True, timeout_s=20).ok
    small_world.stop("w0")
    rebuilt = Serialized(build="another build")
    rebuilt.extra = b"other kernels"
    small_world.worker(engine=rebuilt).wait("v2", timeout_s=20)
    assert verify(stream, deep=True, timeout_s=20).ok
    small_world.stop("w0")
    changed = Serialized()
    changed.extra = b"other kernels"
    small_world.worker(engine=changed).wait("v2", timeout_s=20)
    assert not verify(stream, deep=True, timeout_s=20).ok


def test_an_engine_without_a_serialized_form_says_so(small_world: World) -> None:
    small_world.worker()
    small_world.publisher().publish(checkpoint(1), version="v1").wait(workers=1)
    found = verify(small_world.carrier.stream(), deep=True, timeout_s=20)
    assert found.ok
    assert (answered(found).engine, answered(found).note) == (None, NO_FORM)


def test_an_engine_that_can_not_be_serialized_fails_its_verification_and_not_the_worker(small_world: World) -> None:
    engine, publisher = Serialized(), small_world.publisher()
    worker = small_world.worker(engine=engine)
    publisher.publish(checkpoint(1), version="v1").wait(workers=1)
    engine.broken = True
    found = verify(small_world.carrier.stream(), deep=True, timeout_s=20)
    assert not found.ok
    assert "out of host memory" in str(found.answers["w0"].failure)
    engine.broken = False
    worker.wait("v1", timeout_s=20)
    assert worker.alive


def test_a_digest_of_the_wrong_length_fails_the_verification_and_not_the_worker(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Serialized()
    worker = small_world.worker(engine=engine)
    small_world.publisher().publish(checkpoint(1), version="v1").wait(workers=1)
    monkeypatch.setattr(engine, "content_digest", lambda: b"short")
    found = verify(small_world.carrier.stream(), deep=True, timeout_s=20)
    assert "must be 32 bytes" in str(found.answers["w0"].failure)
    assert worker.alive


def test_a_full_disk_does_not_fail_a_verification(small_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = small_world.worker(engine=Serialized())
    small_world.publisher().publish(checkpoint(1), version="v1").wait(workers=1)

    def full(name: str, data: bytes) -> None:
        raise StoreFull("no space left on device")

    monkeypatch.setattr(worker.store, "put_record", full)
    assert verify(small_world.carrier.stream(), deep=True, timeout_s=20).ok
    assert any("could not record the digest" in event.text for event in small_world.events["w0"])
    assert served(worker) is not None


def test_a_worker_that_serves_nothing_has_no_digest_and_says_why(small_world: World, until: Until) -> None:
    worker = small_world.worker(engine=Serialized())
    stream = small_world.carrier.stream()
    until(lambda: not worker._follower._first, "it reads the control stream")
    found = verify(stream, deep=True, timeout_s=20)
    assert not found.ok
    assert (answered(found).engine, answered(found).note) == (None, "nothing is served")


# ---------------------------------------------------------------------- a fleet


def fleet_of(world: World, *engines: Serialized) -> Verification:
    for number, engine in enumerate(engines):
        world.worker(f"w{number}", engine=engine)
    world.publisher().publish(checkpoint(1), version="v1").wait(workers=len(engines))
    return verify(world.carrier.stream(), deep=True, timeout_s=20)


def test_workers_of_one_build_and_version_must_hold_the_same_engine(small_world: World) -> None:
    engines = [Serialized(), Serialized(), Serialized()]
    engines[1].extra = b"made otherwise"
    found = fleet_of(small_world, *engines)
    assert all(verified.verified.ok for verified in found.answers.values())  # type: ignore[union-attr]
    assert found.disagree == (("w0", "w1", "w2"),)
    assert not found.ok


def test_workers_of_different_builds_may_hold_different_engines(small_world: World) -> None:
    engines = [Serialized(build="one"), Serialized(build="two"), Serialized(build="two")]
    engines[0].extra = b"other kernels"
    found = fleet_of(small_world, *engines)
    assert (found.ok, found.disagree) == (True, ())


def test_the_command_says_who_disagrees_and_fails_with_3(cli: Cli) -> None:
    first, second = Serialized(), Serialized()
    with cli.worker("w0", first), cli.worker("w1", second), cli.worker("w2", MemoryEngine(build="plain")):
        cli.ok("publish", *cli.steps(1), "--version", "v1", "--wait", "--workers", "3")
        agreed = cli.ok("verify", "--deep")
        assert (agreed["ok"], agreed["deep"], agreed["disagree"]) == (True, True, [])
        digests = {worker["id"]: (worker["engine"], worker["note"]) for worker in agreed["workers"]}
        whole = first.content_digest()
        assert whole is not None
        assert digests == {"w0": (whole.hex(), ""), "w1": (whole.hex(), ""), "w2": (None, NO_FORM)}
        said = cli.on("verify", "--deep")
        assert said.code == 0
        assert whole.hex()[:16] in said.out and "no serialized form" in said.out
        assert [line for line in said.out.splitlines() if len(line) > 80] == []
        assert "engine" not in cli.on("verify").out
        assert cli.ok("verify")["workers"][0]["engine"] is None
        cli.ok("publish", cli.save("2.safetensors", checkpoint(2)), "--version", "v2", "--wait", "--workers", "3")
        assert cli.ok("verify", "--deep")["disagree"] == []
        cli.ok("publish", cli.save("3.safetensors", checkpoint(3)), "--version", "v3", "--wait", "--workers", "3")
        second.extra = b"made otherwise"
        ran = cli.on("verify", "--deep", "--json")
        assert (ran.code, ran.json["ok"], ran.json["disagree"]) == (3, False, [["w0", "w1"]])
        said = cli.on("verify", "--deep")
        assert said.code == 3
        assert "w0, w1: same engine build and same version, but not the same engine" in said.out
        second.extra = b"and changed since"
        said = cli.on("verify", "--deep")
        assert said.code == 3
        assert "engine differs" in said.out


# ---------------------------------------------------------------------- how a version was applied


def told(world: World) -> list[tuple[Evidence, str]]:
    return [(ack.evidence, ack.applied) for ack in world.acks("w0")]


def test_an_ack_says_how_the_version_was_applied_from_the_step_on_in_which_it_was(small_world: World) -> None:
    engine, publisher = Serialized(), small_world.publisher()
    small_world.worker(engine=engine)
    publisher.publish(checkpoint(1), version="v1").wait(workers=1)
    assert told(small_world)[-3:] == [
        (Evidence.RECEIVED, ""), (Evidence.STAGED, ""), (Evidence.SERVING, "refitted 6 tensors in place"),
    ]  # fmt: skip
    engine.fail_after = 0
    bad = publisher.publish(checkpoint(2), version="v2")
    reason(lambda: bad.wait(workers=1, timeout_s=20))
    assert told(small_world)[-1] == (Evidence.NONE, engine.applied), "a failure says it, too"


@pytest.mark.parametrize("words", ["n" * 3 * LIMITS.message_bytes, "é" * LIMITS.message_bytes, "weights of \udcff.bin"])
def test_an_engine_of_many_or_odd_words_is_cut_short_and_serves(small_world: World, words: str) -> None:
    engine = MemoryEngine()
    engine.applied = words
    worker = small_world.worker(engine=engine)
    small_world.publisher().publish(checkpoint(1), version="v1").wait(workers=1)
    assert holds(worker, checkpoint(1))
    applied = told(small_world)[-1][1]
    assert applied and len(applied.encode()) <= LIMITS.message_bytes


def test_the_command_prints_and_reports_how_workers_applied_a_release(cli: Cli) -> None:
    first, second = cli.steps(2)
    with cli.worker("w0", Serialized()), cli.worker("w1"):
        published = cli.ok("publish", first, "--version", "v1", "--wait", "--workers", "2")
        assert [(w["id"], w["applied"]) for w in published["waited"]["workers"]] == [
            ("w0", "refitted 6 tensors in place"), ("w1", ""),
        ]  # fmt: skip
        said = cli.on("publish", second, "--version", "v2", "--wait", "--workers", "2")
    assert [line for line in said.out.splitlines() if line.startswith("w")] == ["w0: refitted 3 tensors in place"]
