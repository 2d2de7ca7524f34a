"""The store in one process: tensors, versions, records."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refleet.common import manifests, wire
from refleet.common.digest import digest_of, tensor_digest
from refleet.common.errors import DamagedTensor, DigestMismatch, MalformedRecord, UnknownVersion
from refleet.common.store import Store
from stored import KIB, MIB, Tensors, content, manifest_of, noise, packs, put, temp_files, version


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as store:
        yield store


def reopened(store: Store) -> Store:
    store.close()
    return Store(store.root)


def add(store: Store, *data: bytes) -> list[bytes]:
    with store.batch() as batch:
        return [batch.add((each,)) for each in data]


# tensors


def test_a_version_comes_back_bit_for_bit_also_after_a_restart(store: Store) -> None:
    manifest = put(store, version(1))
    for each in (store, reopened(store)):
        assert each.manifests() == [manifest.fingerprint]
        assert each.manifest(manifest.fingerprint) == manifest
        assert each.missing(manifest) == []
        assert content(each, manifest) == version(1)


def test_a_digest_is_that_of_all_blocks_together(store: Store) -> None:
    data = noise("x", 3 * MIB)
    with store.batch() as batch:
        digest = batch.add(memoryview(data)[at : at + MIB] for at in range(0, len(data), MIB))
    assert digest == tensor_digest(data)
    assert store.read(digest, verify=True) == data


def test_blocks_may_be_arrays_of_any_type_and_shape_and_be_reused_by_their_owner(store: Store) -> None:
    ring = np.empty((4, 1000), np.float32)
    expected = b""

    def blocks() -> Iterator[memoryview]:
        nonlocal expected
        for n in range(40):
            ring[:] = np.random.default_rng(n).random(ring.shape)
            expected += ring.tobytes()
            yield ring.data
            ring[:] = -1  # a block is only lent until the next one is asked for

    with store.batch() as batch:
        digest = batch.add(blocks())
    assert store.read(digest, verify=True) == expected


def test_a_tensor_is_stored_once(store: Store) -> None:
    small, large = noise("small", 100), noise("large", 3 * MIB)
    add(store, small, large)
    size_bytes = store.size_bytes
    with store.batch() as batch:
        for data in (small, large):
            assert batch.add((data,)) == tensor_digest(data)
            assert batch.add((data,), expect=tensor_digest(data)) == tensor_digest(data)
    assert store.size_bytes == size_bytes and len(packs(store)) == 1


def test_a_tensor_is_stored_once_within_a_batch(store: Store) -> None:
    digests = add(store, *[noise("large", 3 * MIB)] * 5, *[noise("small", 10)] * 5, noise("last", 10))
    assert len(set(digests)) == 3
    assert store.size_bytes < 3 * MIB + KIB
    assert store.read(digests[-1], verify=True) == noise("last", 10)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("size", [100, 300 * KIB, 3 * MIB])
def test_bytes_other_than_expected_are_refused_and_the_batch_goes_on(store: Store, size: int, held: bool) -> None:
    right, wrong, other = noise("right", size), noise("wrong", size), noise("other", size)
    if held:
        add(store, right)
    with store.batch() as batch:
        batch.add((other,))
        with pytest.raises(DigestMismatch, match=tensor_digest(right).hex()):
            batch.add((wrong,), expect=tensor_digest(right))
        batch.add((right,), expect=tensor_digest(right))
    again = reopened(store)
    assert not again.has(tensor_digest(wrong))
    for data in (right, other):
        assert again.read(tensor_digest(data), verify=True) == data


@pytest.mark.parametrize("size", [100, 700 * KIB, 3 * MIB])
def test_a_source_that_fails_halfway_leaves_the_batch_as_it_was(store: Store, size: int) -> None:
    def failing() -> Iterator[bytes]:
        yield noise("half", size)
        yield noise("half", size)
        raise OSError(28, "somebody else's disk")

    with store.batch() as batch:
        first = batch.add((noise("first", 500),))
        with pytest.raises(OSError, match="somebody else's"):  # and not as a full store
            batch.add(failing())
        second = batch.add((noise("second", 300 * KIB),))
    again = reopened(store)
    assert again.read(first, verify=True) == noise("first", 500)
    assert again.read(second, verify=True) == noise("second", 300 * KIB)
    assert packs(again)[0].stat().st_size < 302 * KIB


def test_a_batch_that_fails_leaves_nothing(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), store.batch() as batch:
        digest = batch.add((noise("x", 2 * MIB),))
        raise KeyboardInterrupt
    assert not store.has(digest) and not reopened(store).has(digest)
    assert packs(store) == [] and temp_files(store) == []


def test_an_empty_batch_leaves_no_file(store: Store) -> None:
    with store.batch() as batch:
        batch.add(())
    assert packs(store) == [] and temp_files(store) == []


def test_a_long_batch_commits_on_the_way(tmp_path: Path) -> None:
    store = Store(tmp_path, pack_bytes=256 * KIB)
    with pytest.raises(KeyboardInterrupt), store.batch() as batch:
        digests = [batch.add((noise(str(n), 100 * KIB),)) for n in range(10)]
        assert batch.add((noise("0", 100 * KIB),)) == digests[0]  # in a pack that this batch filled before
        raise KeyboardInterrupt
    again = reopened(store)
    assert len(packs(again)) == 3
    assert [again.has(digest) for digest in digests] == [True] * 9 + [False]


def test_zero_size_tensors_need_no_object(store: Store) -> None:
    manifest = manifest_of({"a": b"", "b": b"x"})
    empty = tensor_digest(b"")
    assert [entry.spec.name for entry in store.missing(manifest)] == ["b"]
    assert store.has(empty) and bytes(store.read(empty, verify=True)) == b""
    assert add(store, b"") == [empty] and packs(store) == []
    store.forget(empty)
    assert store.has(empty)


def test_a_view_is_aligned_writable_and_private(store: Store) -> None:
    digests = add(store, noise("a", 1), noise("b", 4000), noise("c", 65))
    for digest in digests:
        array = np.frombuffer(store.read(digest, verify=False), np.uint8)
        assert array.ctypes.data % 64 == 0
    tensor = torch.frombuffer(store.read(digests[1], verify=False), dtype=torch.float32)  # would warn if read-only
    tensor.fill_(7)
    assert reopened(store).read(digests[1], verify=True) == noise("b", 4000)


def test_views_outlive_the_store(store: Store) -> None:
    (digest,) = add(store, noise("x", 5000))
    view = store.read(digest, verify=False)
    store.close()
    store.close()
    assert view == noise("x", 5000)


def test_a_digest_that_nobody_added_is_missing_by_name(store: Store) -> None:
    digest = tensor_digest(b"never")
    assert not store.has(digest)
    with pytest.raises(DamagedTensor, match=digest.hex()) as caught:
        store.read(digest, verify=False)
    assert caught.value.digest == digest


def test_many_tiny_tensors_take_seconds(store: Store) -> None:
    tensors: Tensors = {f"layers.{n}.scale": n.to_bytes(4, "little") for n in range(100_000)}
    manifest = manifest_of(tensors)
    started = time.monotonic()
    with store.writing():
        assert len(store.missing(manifest)) == len(tensors)
        with store.batch() as batch:
            for data in tensors.values():
                batch.add((data,))
        store.put_manifest(manifest)
    again = reopened(store)
    assert again.missing(again.manifest(manifest.fingerprint)) == []
    again.collect([manifest.fingerprint])
    assert time.monotonic() - started < 20
    assert len(packs(again)) == 1
    entry = manifest.by_name["layers.77777.scale"]
    assert again.read(entry.digest, verify=True) == (77777).to_bytes(4, "little")


# versions and records


def test_an_unknown_version_is_named(store: Store) -> None:
    with pytest.raises(UnknownVersion, match="deadbeef"):
        store.manifest(bytes.fromhex("deadbeef" * 8))


def test_records_are_set_replaced_listed_and_dropped(store: Store) -> None:
    for name, data in {
        "state/b": b"1",
        "state/a": b"",
        "state": b"2",
        "probe-1": bytes(5000),
        "state/a/x": b"3",
    }.items():
        store.put_record(name, b"before")
        store.put_record(name, data)
    again = reopened(store)
    assert again.records("state") == ["state", "state/a", "state/a/x", "state/b"]
    assert again.records("state/") == ["state/a", "state/a/x", "state/b"]
    assert again.record("state/b") == b"1" and again.record("state/a") == b"" and again.record("probe-1") == bytes(5000)
    again.drop_record("state/b")
    again.drop_record("state/b")
    assert again.record("state/b") is None and again.records("probe") == ["probe-1"]
    assert temp_files(again) == []


@pytest.mark.parametrize("name", ["", "..", "../id", "a/../b", "/a", "a//b", "a/", "a b", "a+b", ".a", "a\n"])
def test_a_record_name_can_not_leave_its_folder(store: Store, name: str) -> None:
    with pytest.raises(AssertionError):
        store.put_record(name, b"")


def test_the_id_is_made_once(store: Store, tmp_path: Path) -> None:
    assert len(store.id) == 32 and int(store.id, 16)
    assert reopened(store).id == store.id
    assert Store(tmp_path / "other").id != store.id


def test_a_store_of_another_format_is_refused(store: Store) -> None:
    data = b"refleet store 2 " + store.id.encode() + b"\n"
    (store.root / "id").write_bytes(digest_of(data) + data)
    with pytest.raises(MalformedRecord, match="another format"):
        Store(store.root)


def test_a_manifest_that_is_asked_for_again_is_not_unpacked_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = put(store, version(1))
    there = reopened(store)
    unpacked: list[int] = []
    unpack = wire.unpack

    def counted(data: bytes, *rest: Any, **more: Any) -> Any:
        unpacked.append(len(data))
        return unpack(data, *rest, **more)

    monkeypatch.setattr(wire, "unpack", counted)
    for each, times in ((store, 0), (there, 1)):  # it was put by one, and is read by the other
        unpacked.clear()
        assert each.manifest(here.fingerprint) is each.manifest(here.fingerprint)
        assert len(unpacked) == times


def test_only_so_many_tensors_of_manifests_stay_in_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "_REMEMBERED", 3 * len(version(1)))
    held = [put(store, version(number)) for number in range(5)]
    again = [store.manifest(manifest.fingerprint) is manifest for manifest in reversed(held)]
    assert again == [True, True, True, False, False]
    assert store.manifest(held[0].fingerprint) == held[0]
