"""Payloads that came early and go wrong: that costs the early bytes, and is never shown as a failure of a release."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import refleet.worker.early
from early_scene import CHUNK, FIRST, SECOND, Reads, Slow, early_bytes, quiet
from hostile import Outsider
from processes import Processes
from refleet.common.errors import CheckpointChanged
from refleet.common.signing import SigningKey
from refleet.publisher import Publisher
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.worker import Worker
from safetensors.torch import save_file
from servers import Server
from world import World, holds, served

Until = Callable[..., None]
FAKE = "f" * 32  # a payload that no release names


def kept(worker: Worker) -> set[Path]:
    """What the worker's store holds of versions, but for what was written whole in the background."""
    return {path for name in ("deltas", "manifests") for path in (worker.store.root / name).iterdir()}


@pytest.mark.usefixtures("small_chunks")
def test_a_bit_flipped_in_an_early_chunk_costs_that_chunk_only(
    small_world: World, slow: Callable[..., Slow], until: Until
) -> None:
    publisher, worker = small_world.publisher(), small_world.worker()
    publisher.publish(FIRST, version="v1").wait(workers=1, timeout_s=20)

    def spoil(number: int, chunk: memoryview) -> None:
        if number == 3:
            chunk[99] ^= 1

    reads, before, gate = Reads(worker, spoil=spoil), early_bytes(worker), slow(publisher)
    published = gate.publish(SECOND, "v2")
    until(lambda: early_bytes(worker) - before == 8 * CHUNK, "it came early")
    gate.go.set()
    published.result(60).wait(workers=1, timeout_s=20)
    assert reads.fetched == Counter([3])
    assert holds(worker, SECOND)
    assert quiet(small_world)


@pytest.mark.usefixtures("small_chunks")
def test_a_payload_that_is_never_released_leaves_no_trace(
    small_world: World, slow: Callable[..., Slow], until: Until
) -> None:
    publisher, worker = small_world.publisher(), small_world.worker()
    publisher.publish(FIRST, version="v1").wait(workers=1, timeout_s=20)
    until(lambda: not worker._pursuit.upkeep.busy, "the version is written whole")
    before, there = early_bytes(worker), kept(worker)
    gate, changing = slow(publisher), {name: tensor.clone() for name, tensor in SECOND.items()}
    published = gate.publish(changing, "v2")
    until(lambda: early_bytes(worker) - before == 8 * CHUNK, "it came early")
    changing["layer.0.weight"] += 1  # a trainer that goes on
    gate.go.set()
    with pytest.raises(CheckpointChanged):
        published.result(60)
    assert served(worker).version == "v1"  # type: ignore[union-attr]
    assert kept(worker) == there
    until(lambda: not list((worker.store.root / "temp").iterdir()), "no file in the making is left")
    before = early_bytes(worker)
    publisher.publish(SECOND, version="v2").wait(workers=1, timeout_s=20)
    assert holds(worker, SECOND)
    assert quiet(small_world)


@pytest.mark.usefixtures("small_chunks")
def test_a_newer_announcement_replaces_the_older_one_and_a_release_of_the_older_is_fetched(
    small_world: World, slow: Callable[..., Slow], until: Until
) -> None:
    publisher, worker = small_world.publisher(), small_world.worker()
    one = publisher.publish(FIRST, version="v1")
    one.wait(workers=1, timeout_s=20)
    outsider, reads = Outsider(small_world.carrier), Reads(worker)
    before, gate = early_bytes(worker), slow(publisher)
    published = gate.publish(SECOND, "v2")
    until(lambda: early_bytes(worker) - before == 8 * CHUNK, "it came early")
    outsider.coming(publisher, FAKE, base=one.release.fingerprint, chunk_bytes=CHUNK)
    outsider.put(FAKE, [bytes(CHUNK)] * 3)
    until(lambda: early_bytes(worker) - before == 11 * CHUNK, "the other one came early")
    gate.go.set()
    release = published.result(60).release
    published.result().wait(workers=1, timeout_s=20)
    assert release.payload is not None
    assert set(reads.fetched) == set(range(release.payload.body_chunks))
    assert holds(worker, SECOND)
    assert quiet(small_world)
    assert worker._pursuit.early._arrival is None, "what no release named is forgotten"


@pytest.mark.usefixtures("small_chunks")
def test_bytes_without_end_stop_at_what_the_model_can_take(
    small_world: World, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    """Where nothing is signed, anybody who may write to the server can announce."""
    monkeypatch.setattr(refleet.worker.early, "_SLACK_BYTES", 0)
    publisher, worker = small_world.publisher(), small_world.worker()
    one = publisher.publish(FIRST, version="v1")
    one.wait(workers=1, timeout_s=20)
    most, before, outsider = 2 * one.release.full_bytes, early_bytes(worker), Outsider(small_world.carrier)
    outsider.put(FAKE, [bytes(CHUNK)] * (2 * most // CHUNK))
    outsider.coming(publisher, FAKE, base=one.release.fingerprint, chunk_bytes=CHUNK)
    arrival = worker._pursuit.early
    until(lambda: arrival._arrival and arrival._arrival._ended, "it was given up")
    assert most - CHUNK < early_bytes(worker) - before <= most
    publisher.publish(SECOND, version="v2").wait(workers=1, timeout_s=20)
    assert holds(worker, SECOND)


@pytest.mark.usefixtures("small_chunks")
def test_a_disk_that_is_nearly_full_takes_nothing_early(
    small_world: World, monkeypatch: pytest.MonkeyPatch, slow: Callable[..., Slow], until: Until
) -> None:
    publisher, worker = small_world.publisher(), small_world.worker()
    publisher.publish(FIRST, version="v1").wait(workers=1, timeout_s=20)
    before, gate = early_bytes(worker), slow(publisher)

    class Disk:
        f_bavail, f_frsize = 5 * CHUNK, 1

    monkeypatch.setattr(refleet.worker.early.os, "fstatvfs", lambda _fd: Disk)
    published = gate.publish(SECOND, "v2")
    until(lambda: worker._pursuit.early._arrival and worker._pursuit.early._arrival._ended, "it was given up")
    assert early_bytes(worker) - before == 4 * CHUNK, "as much as there is must stay free, and a chunk"
    gate.go.set()
    published.result(60).wait(workers=1, timeout_s=20)
    assert holds(worker, SECOND)
    assert quiet(small_world)


@pytest.mark.parametrize("size", [CHUNK + 1, 0])
def test_a_chunk_of_another_size_than_announced_ends_it(small_world: World, until: Until, size: int) -> None:
    publisher, worker = small_world.publisher(), small_world.worker()
    one = publisher.publish(FIRST, version="v1")
    one.wait(workers=1, timeout_s=20)
    before, outsider, early = early_bytes(worker), Outsider(small_world.carrier), worker._pursuit.early
    outsider.put(FAKE, [bytes(CHUNK), bytes(size), bytes(CHUNK)])
    outsider.coming(publisher, FAKE, base=one.release.fingerprint, chunk_bytes=CHUNK)
    until(lambda: early._arrival and early._arrival._ended, "it was given up")
    assert early_bytes(worker) - before == CHUNK
    assert quiet(small_world)


def test_a_publisher_and_a_worker_that_die_in_the_middle_go_on_when_they_start_again(
    valkey: Server, tmp_path: Path, model: str, until: Until
) -> None:
    processes = Processes(tmp_path, model)
    processes.redis = valkey.url
    try:
        for version, state in (("v1", FIRST), ("v2", SECOND)):
            save_file(state, tmp_path / f"{version}.safetensors")
        worker = processes.worker("w0")
        processes.refleet("publish", tmp_path / "v1.safetensors", "--version", "v1", "--wait", "--timeout", "60")
        processes.end(worker)
        worker = processes.worker("w0", crash_at="worker.received-early")
        until(lambda: processes.status_of("w0") == "SERVING", "the worker serves v1 again", timeout_s=60)
        crashed = processes.run("publish", tmp_path / "v2.safetensors", crash_at="publisher.sent-chunk")
        assert crashed.returncode == -signal.SIGKILL, crashed.stderr
        assert worker.wait(60) == -signal.SIGKILL
        temp = processes.folder / "w0" / "state" / "temp"
        assert list(temp.iterdir()) == []
        processes.worker("w0")
        until(lambda: processes.status_of("w0") == "SERVING", "the worker serves v1 again", timeout_s=60)
        processes.refleet("publish", tmp_path / "v2.safetensors", "--version", "v2", "--wait", "--timeout", "60")
        assert processes.serving_of("w0") == "v2"
    finally:
        processes.close()


# ---------------------------------------------------------------------- announcements that are not believed


def test_an_announcement_without_a_trusted_signature_is_refused(
    small_world: World, tmp_path: Path, until: Until
) -> None:
    key, stranger = SigningKey.new(), SigningKey.new()
    (tmp_path / "trusted").write_text(key.public_text + "\n")
    publisher, worker = small_world.publisher(key=key), small_world.worker(trust=tmp_path / "trusted")
    base = publisher.publish(FIRST, version="v1").wait(workers=1, timeout_s=20)["w0"].fingerprint
    before, outsider = early_bytes(worker), Outsider(small_world.carrier)
    outsider.put(FAKE, [bytes(CHUNK)])
    for number, (by, code) in enumerate(((None, "BadSignature"), (stranger, "UnknownKey")), 1):
        outsider.coming(publisher, FAKE, base=base, chunk_bytes=CHUNK, key=by)
        until(lambda: worker.board.status.refused == number, "it is refused")  # noqa: B023 - called at once
        assert worker.board.status.last_refusal.code == code  # type: ignore[union-attr]
    outsider.coming(publisher, FAKE, base=base, chunk_bytes=CHUNK, key=key)
    until(lambda: early_bytes(worker) - before == CHUNK, "a signed one is believed")


def test_announcements_of_an_old_epoch_or_another_model_are_refused_and_old_ones_ignored(
    small_world: World, until: Until
) -> None:
    publisher, worker = small_world.publisher(), small_world.worker()
    base = publisher.publish(FIRST, version="v1").wait(workers=1, timeout_s=20)["w0"].fingerprint
    small_world.stop("w0")
    publisher.close()
    small_world.publishers.clear()
    publisher = small_world.publisher("other", take_over=True)
    worker = small_world.worker()
    publisher.publish(SECOND, version="v2").wait(workers=1, timeout_s=20)
    assert publisher.claim.lease().epoch == 2
    base, outsider = served(worker).fingerprint, Outsider(small_world.carrier)  # type: ignore[union-attr]
    outsider.put(FAKE, [bytes(CHUNK)])
    before = early_bytes(worker)
    outsider.coming(publisher, FAKE, base=base, chunk_bytes=CHUNK, epoch=1)
    until(lambda: worker.board.status.refused == 1, "it is refused")
    assert worker.board.status.last_refusal.code == "StaleEpoch"  # type: ignore[union-attr]
    outsider.coming(publisher, FAKE, base=base, chunk_bytes=CHUNK, model="another")
    until(lambda: worker.board.status.refused == 2, "it is refused")
    assert worker.board.status.last_refusal.code == "MalformedRecord"  # type: ignore[union-attr]
    assert early_bytes(worker) == before
    outsider.coming(publisher, FAKE, base=base, chunk_bytes=CHUNK)
    until(lambda: early_bytes(worker) - before == CHUNK, "one of this epoch is believed")
    small_world.stop("w0")
    worker = small_world.worker()
    worker.wait("v2", timeout_s=20)
    outsider.coming(publisher, "e" * 32, base=base, chunk_bytes=CHUNK)
    until(lambda: worker._pursuit.early._arrival, "a new one is believed")
    assert worker._pursuit.early._arrival.coming.payload_id == "e" * 32  # type: ignore[union-attr]
    assert early_bytes(worker) == 0, "what was announced before the worker's start is past"


# ---------------------------------------------------------------------- a replica to read from


@pytest.mark.usefixtures("small_chunks")
def test_a_replica_that_answers_late_is_waited_for(
    new_server: Callable[..., Server], tmp_path: Path, slow: Callable[..., Slow], until: Until
) -> None:
    primary = new_server(settings={"repl-diskless-sync-delay": "0"})
    replica = new_server(settings={"replicaof": f"127.0.0.1 {primary.port}"})
    with replica.client() as client:
        until(lambda: client.info("replication")["master_link_status"] == "up", "the replica follows its primary")
    engine, events = MemoryEngine(), []  # type: ignore[var-annotated]
    worker = Worker(
        primary.url, read_from=replica.url, model="m", engine=engine, state_dir=tmp_path / "w0", worker_id="w0",
        heartbeat_s=0.1, poll_s=0.1, on_event=events.append,
    )  # fmt: skip
    with Publisher(primary.url, model="m", store=tmp_path / "store") as publisher, worker:
        publisher.publish(FIRST, version="v1").wait(workers=1, timeout_s=20)
        before, reads, gate = early_bytes(worker), Reads(worker), slow(publisher)
        published = gate.publish(SECOND, "v2")
        until(lambda: early_bytes(worker) - before == 8 * CHUNK, "it came early")
        with replica.client() as client:
            client.execute_command("CLIENT", "PAUSE", "1500", "ALL")
        gate.go.set()
        release = published.result(60).release
        worker.wait("v2", timeout_s=20)
        assert holds(worker, SECOND)
        assert not reads.fetched
        assert release.payload is not None
        assert set(reads.early) >= set(range(release.payload.body_chunks))
        assert [event for event in events if event.failure] == []
