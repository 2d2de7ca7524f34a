"""Several processes and threads on one store."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from refleet.common import folder_stamp
from refleet.common.digest import tensor_digest
from refleet.common.errors import DamagedTensor, StoreBusy
from refleet.common.records import locked
from refleet.common.store import Store
from refleet.common.types import Manifest
from stored import (
    MIB,
    collect,
    content,
    go_on,
    manifest_of,
    noise,
    packs,
    put,
    run,
    running,
    start,
    temp_files,
    told,
    version,
)

WRITE_SLOWLY = """
store = Store(sys.argv[1])
manifest = manifest_of(version(2))
with store.writing():
    with store.batch() as batch:
        batch.add((version(2)["layer.1"],))
        print("ready", flush=True)
        sys.stdin.readline()
        for data in version(2).values():
            batch.add((data,))
    print("committed", flush=True)
    sys.stdin.readline()
    store.put_manifest(manifest)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as store:
        yield store


# what one process writes, the others find


def test_versions_put_in_by_another_process_are_found(store: Store) -> None:
    first = manifest_of(version(1))
    assert not store.has(tensor_digest(version(1)["embed"])) and len(store.missing(first)) == 5
    assert run("put(Store(sys.argv[1]), version(1))", store.root)[0] == 0
    assert store.has(tensor_digest(version(1)["embed"])) and store.missing(first) == []
    assert store.manifests() == [first.fingerprint] and content(store, first) == version(1)


def test_a_change_right_after_a_look_is_not_missed(store: Store, tmp_path: Path) -> None:
    aside = Store(tmp_path / "aside", pack_bytes=1)
    with aside.batch() as batch:
        digests = [batch.add((bytes([n]),)) for n in range(3)]
    folder, now_ns = store.root / "packs", time.time_ns()
    for pack, digest in zip(packs(aside), digests, strict=True):
        pack.rename(folder / pack.name)
        os.utime(folder, ns=(now_ns, now_ns))  # older kernels stamp folders with a clock that ticks every few ms
        assert store.has(digest)


def test_a_miss_in_a_folder_that_rests_costs_no_listing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, version(1))
    monkeypatch.setattr(folder_stamp, "_SETTLED_NS", -1_000_000_000)  # as if the folder had rested
    assert not store.has(bytes(32))
    listed: list[Path] = []
    real = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path) or real(path))
    for _ in range(10):
        assert not store.has(bytes(32))
    assert listed == []
    put(Store(store.root), version(2))
    assert store.has(tensor_digest(version(2)["scale"]))


@pytest.mark.parametrize("mapped", [True, False])
def test_a_reader_lives_through_the_compaction_of_another_process(store: Store, mapped: bool) -> None:
    put(store, version(1))
    kept = put(store, {"x": version(1)["scale"]})
    digest = kept.by_name["x"].digest
    view = store.read(digest, verify=True) if mapped else None
    before = packs(store)
    collect(Store(store.root), kept)
    assert packs(store) != before
    assert view is None or view == version(1)["scale"]
    assert store.read(digest, verify=True) == version(1)["scale"]


def test_a_tensor_that_another_process_removed_is_missing(store: Store) -> None:
    put(store, version(1))
    collect(Store(store.root))
    with pytest.raises(DamagedTensor, match="missing"):
        store.read(tensor_digest(version(1)["embed"]), verify=False)
    assert not store.has(tensor_digest(version(1)["embed"]))


def test_a_writer_does_not_count_on_tensors_that_another_process_removed(store: Store) -> None:
    put(store, version(1))
    collect(Store(store.root))
    assert content(store, put(store, version(1))) == version(1)
    collect(Store(store.root))
    with store.batch() as batch:  # alone, without `writing` around it
        digest = batch.add((version(1)["embed"],))
    assert store.read(digest, verify=True) == version(1)["embed"]


# retention and writers


def test_retention_waits_for_a_writer_until_its_manifest_is_there(store: Store) -> None:
    gone, second = put(store, version(1)), manifest_of(version(2))
    with running(WRITE_SLOWLY, store) as writer:
        for step in ("in its batch", "between batch and manifest"):
            with pytest.raises(StoreBusy, match=f"pid {writer.pid}"):
                store.collect([])
            assert store.missing(gone) == [], step
            go_on(writer)
            assert step != "in its batch" or told(writer) == "committed"
        assert writer.wait(20) == 0
    collect(store, second)
    assert content(store, second) == version(2) and store.manifests() == [second.fingerprint]


def test_a_batch_alone_keeps_retention_out(store: Store) -> None:
    with store.batch() as batch:
        batch.add((noise("x", MIB),))
        with pytest.raises(StoreBusy):
            store.collect([])


def test_a_writer_waits_for_retention(store: Store) -> None:
    with (
        locked(store.root / "locks" / "objects", holder="collect"),
        pytest.raises(StoreBusy, match="collect"),
        store.writing(wait_s=0.05),
    ):
        pass
    with store.writing(), store.writing(), store.batch():
        pass


def test_the_pack_of_a_living_writer_is_left_alone_and_that_of_a_dead_one_removed(store: Store) -> None:
    with running(WRITE_SLOWLY, store) as writer:
        (temp,) = temp_files(store)
        Store(store.root)
        assert temp.exists()
        writer.kill()
        writer.wait()
        assert temp.exists()
        collect(store)
        assert temp_files(store) == []


def test_a_record_in_the_making_is_left_alone_by_retention(store: Store) -> None:
    with running("""
from refleet.common.records import TempFile
from pathlib import Path
with TempFile(Path(sys.argv[1]) / "temp") as temp:
    temp.write(b"x", at=0)
    print("ready", flush=True)
    sys.stdin.readline()
    temp.sync("record")
    temp.rename(Path(sys.argv[1]) / "records" / "state", "record")
""", store) as writer:  # fmt: skip
        collect(store)
        go_on(writer)
        assert writer.wait(20) == 0
    assert store.records("") == ["state"]


# all at once

PUT_MANY = """
store = Store(sys.argv[1], pack_bytes=500 * KIB)
for number in range(int(sys.argv[2]), 40, 2):
    put(store, version(number))
    store.put_record(f"done/{number}", b"")
"""


def test_writers_readers_and_retention_at_once_lose_nothing(store: Store) -> None:
    failures: list[BaseException] = []
    stop = threading.Event()

    def read(each: Store) -> None:
        try:
            while not stop.is_set():
                for fingerprint in each.manifests():
                    if fingerprint not in kept:
                        continue
                    for entry in each.manifest(fingerprint).tensors:
                        each.read(entry.digest, verify=True)
        except BaseException as error:
            failures.append(error)

    keep: list[Manifest] = [manifest_of(version(number)) for number in range(0, 40, 7)]
    kept = frozenset(manifest.fingerprint for manifest in keep)
    readers = [threading.Thread(target=read, args=(each,)) for each in (store, store, Store(store.root))]
    writers = [start(PUT_MANY, store.root, number) for number in (0, 1)]
    for reader in readers:
        reader.start()
    rounds = 0
    try:
        while any(writer.poll() is None for writer in writers):
            with suppress(StoreBusy):
                store.collect(kept, wait_s=0.5)
                rounds += 1
    finally:
        stop.set()
        for reader in readers:
            reader.join()
        for writer in writers:
            writer.communicate(timeout=60)
    assert failures == [] and [writer.returncode for writer in writers] == [0, 0] and rounds > 3
    collect(store, *keep)
    again = Store(store.root)
    assert len(again.records("done/")) == 40 and temp_files(again) == []
    for manifest, number in zip(keep, range(0, 40, 7), strict=True):
        assert content(again, manifest) == version(number)
    assert again.size_bytes < 2 * sum(manifest.size_bytes for manifest in keep)
