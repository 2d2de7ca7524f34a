"""Versions kept as what changed: rebuilt to the bit, anchored now and then, and honest about damage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from refleet.common.delta import Encoder, Input, plan
from refleet.common.deltas import DeltaFile, StoredDelta
from refleet.common.digest import tensor_digest
from refleet.common.errors import DamagedTensor, MalformedRecord
from refleet.common.folder_stamp import FolderStamp
from refleet.common.layout import in_body_order
from refleet.common.memory import POOLED_BYTES, Memory
from refleet.common.store import Store
from refleet.common.types import Manifest, TensorEntry, TensorSpec

Tensors = dict[str, NDArray[np.uint16]]
SHAPES = {"embed": (300, 64), "norm": (64,), "up": (64, 256), "tiny": (1,), "zero": (0, 4)}


def fresh(seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, 0.02, shape).astype(np.float16).view(np.uint16) for n, shape in SHAPES.items()}


def stepped(tensors: Tensors, seed: int, *, only: tuple[str, ...] = ("embed", "norm", "up", "tiny")) -> Tensors:
    rng = np.random.default_rng(seed)
    made = dict(tensors)
    for name in only:
        made[name] = tensors[name] ^ (rng.random(tensors[name].shape) < 0.05).astype(np.uint16)
        made[name].reshape(-1)[0] ^= 1
    return made


def manifest_of(tensors: Tensors) -> Manifest:
    return Manifest.of(
        TensorEntry(TensorSpec(name, "F16", tensor.shape), tensor_digest(tensor.tobytes()))
        for name, tensor in tensors.items()
    )


def put_whole(store: Store, tensors: Tensors) -> Manifest:
    manifest = manifest_of(tensors)
    with store.writing():
        with store.batch() as batch:
            for name, tensor in tensors.items():
                batch.add((tensor.tobytes(),), expect=manifest.by_name[name].digest)
        store.put_manifest(manifest)
    return manifest


def put_delta(store: Store, before: Tensors, after: Tensors) -> Manifest:
    base, target = manifest_of(before), manifest_of(after)
    tensors = [part.tensor for part in plan(target, base)]
    order = in_body_order(tensors)
    flat = [
        (after[t.spec.name].reshape(-1).view(np.uint8), before[t.spec.name].reshape(-1).view(np.uint8)) for t in order
    ]
    encoder = Encoder(Input("F16", new, old) for new, old in flat)
    with store.delta() as delta:
        for chunk in encoder.chunks():
            delta.write(chunk)
        delta.commit(StoredDelta.of(encoder.index(tensors, target=target, base=base), order, base))
        store.put_manifest(target)
    return target


def assert_holds(store: Store, tensors: Tensors) -> None:
    for entry in manifest_of(tensors).tensors:
        assert bytes(store.read(entry.digest, verify=True)) == tensors[entry.spec.name].tobytes(), entry.spec.name


def chain(store: Store, count: int) -> list[Tensors]:
    versions = [fresh(0)]
    put_whole(store, versions[0])
    for seed in range(1, count):
        only = ("embed", "norm", "up", "tiny") if seed % 3 else ("norm", "up")
        versions.append(stepped(versions[-1], seed, only=only))
        put_delta(store, versions[-2], versions[-1])
    return versions


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as made:
        yield made


def delta_files(store: Store) -> list[Path]:
    return sorted((store.root / "deltas").glob("*.delta"))


def test_every_version_of_a_chain_is_rebuilt_to_the_bit_also_after_a_restart(store: Store) -> None:
    versions = chain(store, 12)
    for tensors in (versions[7], versions[0], versions[11], versions[3]):
        assert_holds(store, tensors)
    with Store(store.root) as again:
        for tensors in reversed(versions):
            assert_holds(again, tensors)
        assert all(not again.missing(manifest_of(tensors)) for tensors in versions)


def test_a_tensor_that_returns_to_earlier_values_is_rebuilt_without_going_in_circles(store: Store) -> None:
    one, two = fresh(0), stepped(fresh(0), 1, only=("norm",))
    put_whole(store, {**one, "norm": one["norm"] + 1})
    before = {**one, "norm": one["norm"] + 1}
    for after in (one, two, one, two, one):
        put_delta(store, before, after)
        before = after
    with Store(store.root) as again:
        assert_holds(again, two)
        assert_holds(again, one)


def test_collecting_keeps_deltas_that_another_process_added_meanwhile(store: Store) -> None:
    versions = [fresh(0)]
    put_whole(store, versions[0])
    with Store(store.root) as waiting:  # say, for the lock of a publish that runs
        versions.append(stepped(versions[0], 1, only=("norm",)))
        put_delta(store, *versions)
        waiting.collect({manifest_of(tensors).fingerprint for tensors in versions})
    with Store(store.root) as again:
        assert again.missing(manifest_of(versions[1])) == []


def test_a_version_costs_the_disk_what_changed(store: Store) -> None:
    versions = [fresh(0)]
    put_whole(store, versions[0])
    whole = store.size_bytes
    versions.append(stepped(versions[0], 1, only=("norm",)))
    put_delta(store, *versions)
    assert store.size_bytes - whole < 2000
    assert manifest_of(versions[1]).size_bytes > 60_000


def test_an_anchor_ends_the_chain_and_lets_what_it_replaces_go(store: Store) -> None:
    versions = chain(store, 9)
    last = manifest_of(versions[-1])
    assert store.anchor(last, every=20) == 0
    assert store.anchor(last, every=3) > 0
    assert store.anchor(last, every=3) == 0, "it is whole now"
    store.collect([last.fingerprint])
    assert delta_files(store) == []
    assert_holds(store, versions[-1])
    for tensors in versions[:-1]:
        assert store.missing(manifest_of(tensors))


def test_a_step_after_an_anchor_is_one_step_away_before_anything_went(store: Store) -> None:
    versions = chain(store, 9)
    assert store.anchor(manifest_of(versions[-1]), every=3) > 0
    after = put_delta(store, versions[-1], stepped(versions[-1], 99))
    assert store.anchor(after, every=2) == 0
    assert store.anchor(after, every=1) > 0


def test_retention_keeps_what_a_kept_version_is_rebuilt_from(store: Store) -> None:
    versions = chain(store, 8)
    store.collect([manifest_of(versions[5]).fingerprint])
    assert store.manifests() == [manifest_of(versions[5]).fingerprint]
    assert_holds(store, versions[5])
    with Store(store.root) as again:
        assert_holds(again, versions[5])
        assert again.missing(manifest_of(versions[7])), "newer deltas went"


def test_a_flipped_bit_in_a_stored_delta_is_found_and_heals(store: Store) -> None:
    versions = chain(store, 4)
    path = delta_files(store)[1]
    data = bytearray(path.read_bytes())
    data[40] ^= 4
    path.write_bytes(data)
    target = manifest_of(versions[3])
    with Store(store.root) as again:
        damaged = set()
        for entry in target.tensors:
            try:
                assert bytes(again.read(entry.digest, verify=True)) == versions[3][entry.spec.name].tobytes()
            except DamagedTensor as error:
                damaged.add(error.digest)
                again.forget(error.digest)
        assert damaged
        assert damaged <= {entry.digest for entry in again.missing(target)}
        put_whole(again, versions[3])
        assert_holds(again, versions[3])


def test_a_missing_base_is_found_and_heals(store: Store) -> None:
    versions = chain(store, 3)
    for pack in (store.root / "packs").glob("*.pack"):
        pack.unlink()
    with Store(store.root) as again:
        for entry in manifest_of(versions[2]).tensors:
            if entry.spec.size_bytes:
                with pytest.raises(DamagedTensor):
                    again.read(entry.digest, verify=True)
        put_whole(again, versions[0])
        with Store(store.root) as healed:
            assert_holds(healed, versions[2])


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_cut_file_counts_as_missing(store: Store, cut: int) -> None:
    versions = chain(store, 2)
    (path,) = delta_files(store)
    os.truncate(path, max(path.stat().st_size - cut, 0))
    with pytest.raises(MalformedRecord):
        DeltaFile.open(path)
    with Store(store.root) as again:
        assert again.missing(manifest_of(versions[1]))
        assert_holds(again, versions[0])
        assert [p.suffix for p in (store.root / "deltas").iterdir()] == [".damaged"]


def test_a_file_that_is_cut_while_it_is_known_is_found(store: Store) -> None:
    versions = chain(store, 2)
    (path,) = delta_files(store)
    os.truncate(path, 10)
    with pytest.raises(DamagedTensor):
        assert_holds(store, versions[1])


def test_what_was_not_committed_leaves_nothing(store: Store) -> None:
    with pytest.raises(KeyError), store.delta() as delta:
        delta.write(bytes(1000))
        raise KeyError
    assert delta_files(store) == []
    assert list((store.root / "temp").iterdir()) == []


def test_another_process_sees_new_deltas_and_misses_removed_ones(store: Store) -> None:
    with Store(store.root) as other:
        versions = chain(store, 3)
        assert_holds(other, versions[2])
        store.collect([manifest_of(versions[0]).fingerprint])
        other.memory.trim()
        assert_holds(other, versions[0])


def test_a_view_keeps_its_bytes_whatever_is_rebuilt_afterwards(store: Store) -> None:
    versions = chain(store, 6)
    views = {e.spec.name: store.read(e.digest, verify=True) for e in manifest_of(versions[5]).tensors}
    for tensors in versions[:5]:
        assert_holds(store, tensors)
    assert all(bytes(view) == versions[5][name].tobytes() for name, view in views.items())


def test_memory_is_used_again_only_when_nobody_looks_at_it() -> None:
    memory = Memory()
    first = memory.take(POOLED_BYTES)
    address = first.ctypes.data
    view = memoryview(first)[10:20]
    del first
    assert memory.take(POOLED_BYTES).ctypes.data != address
    del view
    assert address in {buffer.ctypes.data for buffer in (memory.take(POOLED_BYTES), memory.take(POOLED_BYTES))}


def test_memory_keeps_what_is_pinned() -> None:
    memory = Memory()
    one, two = memory.take(POOLED_BYTES), memory.take(POOLED_BYTES)
    memory.put({b"1": one, b"2": two})
    memory.pin([b"1"])
    with memory.pinned([b"2"]):
        memory.trim()
        assert memory.get(b"2") is two
    memory.trim()
    assert memory.get(b"1") is one
    assert memory.get(b"2") is None
    del one, two
    memory.pin(())
    memory.trim(free=True)
    assert memory.size_bytes == 0


def test_a_version_is_loaded_by_one_look_at_each_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that changed last in different versions lie in different files."""
    versions = [fresh(0)]
    put_whole(store, versions[0])
    for number in range(1, 7):
        versions.append(
            stepped(versions[-1], number, only=("embed", "up") if number % 2 else ("embed", "norm", "tiny"))
        )
        put_delta(store, *versions[-2:])
    real, looks = DeltaFile.reading, []

    def reading(self: DeltaFile) -> Any:
        looks.append(self.name)
        return real(self)

    monkeypatch.setattr(DeltaFile, "reading", reading)
    with Store(store.root) as again:
        again.load(manifest_of(versions[6]).digests)
        assert looks == sorted(set(looks)) and len(looks) == 6
        assert_holds(again, versions[6])
        assert len(looks) == 6
    for one, other in ((2, 6), (6, 2)):  # what one is rebuilt through is wanted too
        with Store(store.root) as again:
            again.load(manifest_of(versions[one]).digests | manifest_of(versions[other]).digests)
            looks.clear()
            assert_holds(again, versions[one])
            assert_holds(again, versions[other])
            assert looks == []


@pytest.mark.parametrize("number", range(4))
def test_what_can_not_be_loaded_is_found_by_who_reads_it(store: Store, number: int) -> None:
    versions = chain(store, 6)
    path = delta_files(store)[number]
    data = bytearray(path.read_bytes())
    for at in range(40, 60):
        data[at] ^= 0x55
    path.write_bytes(data)
    with Store(store.root) as again:
        target = manifest_of(versions[5])
        again.load(target.digests)
        read = {}
        for entry in target.tensors:
            with suppress(DamagedTensor):
                read[entry.spec.name] = bytes(again.read(entry.digest, verify=True))
        assert len(read) < len(target.tensors)
        assert all(data == versions[5][name].tobytes() for name, data in read.items())


def test_a_version_that_another_process_anchored_meanwhile_is_read_from_there(store: Store) -> None:
    versions = chain(store, 5)
    last = manifest_of(versions[-1])
    with Store(store.root) as other:
        assert not other.missing(last)
        store.anchor(last, every=2)
        store.collect([last.fingerprint])
        assert delta_files(store) == []
        assert_holds(other, versions[-1])


def test_a_collect_looks_at_its_folders_and_not_for_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    changed = FolderStamp.changed

    def counted(stamp: FolderStamp) -> bool:
        looks.append(stamp._folder)
        return changed(stamp)

    with Store(tmp_path / "store") as store:
        first = {f"layer.{n}": np.arange(8, dtype=np.uint16) + n for n in range(100)}
        second = {name: values ^ 1 for name, values in first.items()}
        put_whole(store, first)
        kept = put_delta(store, first, second)
        monkeypatch.setattr(FolderStamp, "changed", counted)
        store.collect({kept.fingerprint})
        assert len(looks) < 20
        assert_holds(store, second)
