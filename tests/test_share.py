"""Several workers of one host that share what they receive. When one of them dies or hangs: test_share_faults.py."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from carriers import InMemory
from early_scene import Reads, early_bytes
from refleet.common.derived import Derived
from refleet.common.errors import StoreBusy, UnknownVersion, UsageError
from refleet.common.messages import Evidence
from refleet.common.store import Store
from refleet.publisher import Publisher
from refleet.worker import cli, stage, staging
from refleet.worker.export import opened, take
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.staging import Staging
from refleet.worker.worker import Worker
from stored import flip, flip_tensor
from world import World, checkpoint, holds, served

Until = Callable[..., None]
FIRST = checkpoint(1)
SECOND = checkpoint(2, change=0.3, base=FIRST)
THIRD = checkpoint(3, change=0.3, base=SECOND)
STATES = {"v1": FIRST, "v2": SECOND, "v3": THIRD}


def host(world: World) -> Path:
    return world.folder / "host"


def content(world: World) -> Path:
    """Where the workers' tensors lie."""
    return host(world) / world.model


def join(world: World, *names: str, **options: object) -> list[Worker]:
    """Workers that share."""
    return [world.worker(name, share=host(world), **options) for name in names]


def publish(world: World, publisher: Publisher, *versions: str) -> None:
    for version in versions:
        published = publisher.publish(STATES[version], version=version)
        published.wait(workers=len(world.workers), timeout_s=20)


def received(*workers: Worker) -> int:
    """Payload bytes since their start."""
    return sum(worker.board.received_total for worker in workers)


def keeps_only_what_it_serves(folder: Path, worker: Worker) -> bool:
    serving = served(worker)
    return serving is not None and [path.name for path in (folder / "manifests").iterdir()] == [
        serving.fingerprint.hex()
    ]


def images(worker: Worker) -> list[Path]:
    folder: Path = worker.store.memory.folder  # type: ignore[attr-defined]
    return sorted(folder.iterdir()) if folder.exists() else []


def held(world: World) -> set[bytes]:
    """Fingerprints of the versions that are kept."""
    return {bytes.fromhex(path.name) for path in (content(world) / "manifests").iterdir()}


def fingerprint(publisher: Publisher, version: str) -> bytes:
    return publisher.book.manifest_of(version).fingerprint


# ---------------------------------------------------------------------- once for all


@pytest.mark.usefixtures("small_chunks")
def test_a_version_is_received_staged_and_kept_once_for_all(world: World) -> None:
    publisher, workers = world.publisher(), join(world, "w0", "w1", "w2")
    reads = [Reads(worker) for worker in workers]
    for version in ("v1", "v2"):
        before = received(*workers)
        published = publisher.publish(STATES[version], version=version)
        acks = published.wait(workers=3, timeout_s=20)
        assert published.release.payload_bytes > 0
        assert sorted(ack.payload_bytes for ack in acks.values()) == [0, 0, published.release.payload_bytes]
        assert received(*workers) - before == published.release.payload_bytes
        assert all(holds(worker, STATES[version]) for worker in workers)
        told = [ack for worker in workers for ack in world.acks(worker.id) if ack.version == version]
        assert len([ack for ack in told if ack.evidence == Evidence.RECEIVED]) == 1
        assert len([ack for ack in told if ack.evidence == Evidence.STAGED]) == 3
    chunks = sum((each.early + each.fetched for each in reads), Counter[int]())
    assert set(chunks.values()) <= {1, 2}, "each chunk of the two payloads left the server once"
    for worker in workers:
        assert not {"packs", "deltas", "manifests"} & {path.name for path in worker.store.root.iterdir()}
    assert len({worker.store.memory.size_bytes for worker in workers}) == 1
    model_bytes = sum(tensor.nbytes for tensor in SECOND.values())
    there = sum(path.stat().st_size for path in images(workers[0]))
    assert model_bytes < there < 3 * model_bytes, "what is served, and what was served before, for all three"


def test_a_rollback_moves_no_byte(world: World) -> None:
    publisher, workers = world.publisher(), join(world, "w0", "w1")
    publish(world, publisher, "v1", "v2")
    before = received(*workers)
    acks = publisher.rollback("v1").wait(workers=2, timeout_s=20)
    assert [ack.payload_bytes for ack in acks.values()] == [0, 0] and received(*workers) == before
    assert all(holds(worker, FIRST) for worker in workers)


def test_who_joins_late_needs_neither_publisher_nor_payload(world: World, until: Until) -> None:
    publisher = world.publisher()
    join(world, "w0")
    publish(world, publisher, "v1", "v2")
    until(lambda: not publisher.book.payloads(), "the payloads are gone")
    publisher.close()
    world.publishers.clear()
    (late,) = join(world, "late")
    assert late.wait("v2", timeout_s=20)
    assert holds(late, SECOND) and received(late) == early_bytes(late) == 0


@pytest.mark.parametrize("who", [("w1",), ("w0", "w1", "w2")], ids=["one", "all"])
def test_restarted_workers_serve_from_their_disk_at_no_cost(world: World, who: tuple[str, ...]) -> None:
    publisher = world.publisher()
    join(world, "w0", "w1", "w2")
    publish(world, publisher, "v1", "v2")
    publisher.close()
    world.publishers.clear()
    for name in who:
        world.stop(name)
    again = join(world, *who)
    for worker in again:
        worker.wait("v2", timeout_s=20)
        assert holds(worker, SECOND)
    assert received(*again) == 0


def test_after_a_restart_of_all_one_rebuilds_for_all(
    small_world: World, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    world, publisher = small_world, small_world.publisher()
    join(world, "w0", "w1", "w2")
    publish(world, publisher, "v1", "v2")
    for name in ("w0", "w1", "w2"):
        world.stop(name)
    rebuilt: list[set[bytes]] = []
    entered, second = threading.Semaphore(0), threading.Event()
    rebuild, read = Derived._rebuild, Staging.rebuild

    def counted(self: Derived, wanted: set[bytes]) -> None:
        rebuilt.append(wanted)
        if len(rebuilt) == 1:
            assert all(entered.acquire(timeout=20) for _ in range(3)), "all three are at it"
            second.wait(0.5)  # for somebody who does not wait for the first
        second.set()
        rebuild(self, wanted)

    def entering(self: Staging, *args: object, **options: object) -> None:
        entered.release()
        read(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Derived, "_rebuild", counted)
    monkeypatch.setattr(Staging, "rebuild", entering)
    again = join(world, "w0", "w1", "w2")
    for worker in again:
        worker.wait("v2", timeout_s=20)
        assert holds(worker, SECOND)
    assert sum(map(len, rebuilt)) == len(set[bytes]().union(*rebuilt)), "each tensor once"


def test_nothing_is_left_in_shared_memory_when_all_have_ended(small_world: World) -> None:
    workers = join(small_world, "w0", "w1")
    publish(small_world, small_world.publisher(), "v1", "v2")
    assert images(workers[0])
    for name in ("w0", "w1"):
        small_world.stop(name)
    assert not workers[0].store.memory.folder.exists()  # type: ignore[attr-defined]


def test_a_host_without_room_in_shared_memory_shares_the_rest(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "no room")

    monkeypatch.setattr("os.posix_fallocate", full)
    workers = join(small_world, "w0", "w1")
    publish(small_world, small_world.publisher(), "v1", "v2")
    assert all(holds(worker, SECOND) for worker in workers) and not images(workers[0])


# ---------------------------------------------------------------------- what is kept


def test_what_a_worker_that_lags_needs_is_kept_by_all(small_world: World, until: Until) -> None:
    world, publisher = small_world, small_world.publisher(keep=1)
    join(world, "w0", "w1", keep=1)
    publish(world, publisher, "v1")
    world.stop("w1")
    publish(world, publisher, "v2", "v3")
    wanted = {fingerprint(publisher, "v3"), publisher.book.releases()[0].fingerprint}
    until(lambda: held(world) == wanted, "v2, which nobody wants, goes, and v1 stays")
    publisher.close()
    world.publishers.clear()
    world.carrier.lose("log")
    (lagging,) = join(world, "w1", keep=1)
    assert lagging.wait("v1", timeout_s=20) and holds(lagging, FIRST), "the log says nothing new"
    assert received(lagging) == 0


def test_what_a_worker_wanted_that_never_came_back_goes_after_a_while(
    small_world: World, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    world, publisher = small_world, small_world.publisher()
    workers = join(world, "w0", "w1", "w2", keep=1)
    publish(world, publisher, "v1")
    world.stop("w1")
    publish(world, publisher, "v2")
    both = {fingerprint(publisher, version) for version in ("v1", "v2")}
    until(lambda: held(world) == both, "what it wants stays")
    monkeypatch.setattr("refleet.common.store_folder.GONE_AFTER_S", -1.0)
    publish(world, publisher, "v3")
    until(lambda: held(world) == {fingerprint(publisher, "v3")}, "then no more")
    living = {worker.store.id for worker in workers if worker.id != "w1"}
    assert {path.name for path in (content(world) / "keepers").iterdir()} == living, "who lives is not forgotten"


def test_retention_keeps_what_another_worker_staged_meanwhile(small_world: World) -> None:
    """A worker's own picture of the folder may be older than what the others put there."""
    world, publisher = small_world, small_world.publisher()
    join(world, "w0")
    publish(world, publisher, "v1")
    with Store(world.folder / "other", shared=content(world)) as other:
        publish(world, publisher, "v2")
        newest = max((content(world) / "deltas").iterdir())
        other.collect([], wait_s=20)
        assert newest.exists()
    publisher.close()
    world.publishers.clear()
    world.stop("w0")
    (again,) = join(world, "w0")
    assert again.wait("v2", timeout_s=20) and holds(again, SECOND) and received(again) == 0


def test_retention_waits_while_another_worker_stages(small_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would take tensors that this delta builds on, between the look at them and the commit."""
    world, publisher = small_world, small_world.publisher()
    join(world, "w0")
    publish(world, publisher, "v1")
    said: list[str] = []
    fetch = stage.fetch_index

    def fetching(*args: object) -> object:
        try:
            with Store(world.folder / "other", shared=content(world)) as other:
                other.collect([])
        except StoreBusy as error:
            said.append(error.what)
        return fetch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "fetch_index", fetching)
    publish(world, publisher, "v2")
    assert len(said) == 1


def test_a_base_that_went_while_its_turn_was_awaited_is_no_failure(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, publisher = small_world, small_world.publisher()
    join(world, "w0")
    publish(world, publisher, "v1")
    world.stop("w0")
    publisher.publish(SECOND, version="v2")
    turn, gone = staging.turn, list[bytes]()

    def waiting(store: Store, name: str, **options: object) -> object:
        if name == "staging" and not gone:
            for path in (content(world) / "keepers").iterdir():
                if path.name != store.id:
                    path.unlink()  # as if w0 had not been seen for days
            with Store(world.folder / "other", shared=content(world)) as other:
                gone.extend(other.collect([]).removed_manifests)
        return turn(store, name, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(staging, "turn", waiting)
    (worker,) = join(world, "w1")
    assert worker.wait("v2", timeout_s=20) and holds(worker, SECOND)
    assert gone
    assert not [ack for ack in world.acks("w1") if ack.failure], "nothing failed"


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "private memory"])
def test_rot_in_memory_of_what_a_delta_builds_on_is_found_and_fetched(small_world: World, shared: bool) -> None:
    """The payload is not blamed for it."""
    world, publisher = small_world, small_world.publisher()
    worker = world.worker("w0", **({"share": host(world)} if shared else {}))
    publish(world, publisher, "v1")
    digest = publisher.book.manifest_of("v1").by_name["layer.0.weight"].digest
    if shared:
        data = bytes(worker.store.read(digest, verify=False))
        (path,) = images(worker)
        flip(path, path.read_bytes().find(data) + len(data) // 2)
    else:
        worker.store.read(digest, verify=False)[1000] ^= 1
    published = publisher.publish(SECOND, version="v2")
    published.wait(workers=1, timeout_s=20)
    assert holds(worker, SECOND)
    texts = [event.text for event in world.events["w0"]]
    assert any(text.startswith("healing") for text in texts)
    assert not any(text.startswith("refused a payload") for text in texts)


def test_rot_in_shared_memory_is_found_before_it_is_served(small_world: World) -> None:
    world, publisher = small_world, small_world.publisher()
    (worker,) = join(world, "w0")
    publish(world, publisher, "v1")
    data = bytes(worker.store.read(publisher.book.manifest_of("v1").by_name["embed.weight"].digest, verify=False))
    (path,) = images(worker)
    flip(path, path.read_bytes().find(data) + 11)
    (late,) = join(world, "late")
    late.wait("v1", timeout_s=20)
    assert holds(late, FIRST) and holds(worker, FIRST)
    (found,) = [event.failure for event in world.events["late"] if event.text.startswith("healing")]
    assert found is not None and found.tensor == "embed.weight"
    publish(world, publisher, "v2", "v3")
    assert holds(late, THIRD) and holds(worker, THIRD)


def test_rot_on_the_shared_disk_is_healed_by_one_for_all(small_world: World, until: Until) -> None:
    world, publisher = small_world, small_world.publisher()
    join(world, "w0", "w1")
    publish(world, publisher, "v1")
    packs = content(world) / "packs"
    until(lambda: list(packs.glob("*.pack")), "it lies there whole")
    for name in ("w0", "w1"):
        world.stop(name)

    class Place:  # what `flip_tensor` knows of a store
        root = content(world)

    flip_tensor(Place, FIRST["layer.0.weight"].numpy().tobytes())  # type: ignore[arg-type]
    again = join(world, "w0", "w1")
    for worker in again:
        worker.wait("v1", timeout_s=20)
        assert holds(worker, FIRST)


# ---------------------------------------------------------------------- others in the same folder


def test_workers_of_another_model_share_the_folder_and_nothing_in_it(
    small_world: World, tmp_path: Path, until: Until
) -> None:
    other = World(InMemory(f"{small_world.model}-2"), tmp_path / "second", f"{small_world.model}-2")
    other.folder.mkdir()
    try:
        mine, theirs = join(small_world, "w0", keep=1)[0], other.worker("w0", share=host(small_world), keep=1)
        one, two = small_world.publisher(), other.publisher()
        publish(small_world, one, "v1")
        two.publish(THIRD, version="v1").wait(workers=1, timeout_s=20)
        publish(small_world, one, "v2")
        two.publish(FIRST, version="v2").wait(workers=1, timeout_s=20)
        assert holds(mine, SECOND) and holds(theirs, FIRST)
        assert received(mine) > 0 and received(theirs) > 0
        for model, worker in ((small_world.model, mine), (other.model, theirs)):
            until(partial(keeps_only_what_it_serves, host(small_world) / model, worker), "each keeps its own")
        assert mine.store.memory.folder != theirs.store.memory.folder  # type: ignore[attr-defined]
    finally:
        other.close()


@pytest.mark.parametrize("which", ["a publisher's store", "another worker's state folder", "its own state folder"])
def test_a_folder_that_is_somebodys_own_is_not_shared(small_world: World, which: str) -> None:
    state = small_world.folder / "w0"
    if which == "a publisher's store":
        small_world.publisher()
        share = small_world.folder / "store"
    else:
        share = small_world.folder / "host"
        own = share / small_world.model
        if which == "its own state folder":
            small_world.folder.joinpath("w0").symlink_to(own)
        else:
            Store(own).close()
    with pytest.raises(UsageError, match="can't be shared"):
        small_world.worker("w0", share=share)
    assert not (state / "records").exists() or which != "a publisher's store"


@pytest.mark.parametrize("who", ["worker", "publisher"])
def test_a_folder_that_is_shared_is_nobodys_own(small_world: World, who: str) -> None:
    """Its retention would remove what the others keep."""
    join(small_world, "w0")
    with pytest.raises(UsageError, match="workers share the folder"):
        if who == "publisher":
            small_world.publisher("host")
        else:
            Worker(
                small_world.carrier.stream(),
                model=small_world.model,
                engine=MemoryEngine(),
                state_dir=content(small_world),
            )


@pytest.mark.parametrize("model", ["../m", "", "M", "a/b"])
def test_a_model_that_is_no_name_reaches_no_other_folder(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--model", model, "--engine", f"file:{tmp_path / 'x'}", "--state", str(tmp_path / "w0")]
    assert cli.execute([*words, "--share", str(tmp_path / "a" / "b")], {}) == 2
    assert "model name" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- export


def test_a_version_is_taken_out_of_a_state_folder_that_shares(small_world: World) -> None:
    world, publisher = small_world, small_world.publisher()
    join(world, "w0", "w1")
    publish(world, publisher, "v1", "v2")
    with opened(world.folder / "w1") as store:
        taken = take(store, None)
        assert taken.id == "v2"
        assert {name: bytes(data) for name, data in taken.tensors.items()} == world.workers["w0"].engine.tensors  # type: ignore[attr-defined]
        assert take(store, fingerprint(publisher, "v1").hex()[:12]).manifest.fingerprint == fingerprint(publisher, "v1")
        with pytest.raises(UnknownVersion):
            take(store, "v7")
    assert all(served(worker) for worker in world.workers.values())


def test_a_share_that_is_not_here_is_said_and_not_made(small_world: World) -> None:
    join(small_world, "w0")
    publish(small_world, small_world.publisher(), "v1")
    small_world.stop("w0")
    host(small_world).rename(small_world.folder / "moved")
    with pytest.raises(UsageError, match="which is not here"), opened(small_world.folder / "w0"):
        pass
    assert not host(small_world).exists()
