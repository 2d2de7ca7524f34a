"""What `collect` removes, what it keeps, and what the disk gets back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from refleet.common.digest import tensor_digest
from refleet.common.store import Store
from stored import KIB, MIB, collect, content, manifest_of, noise, packs, put, version


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as store:
        yield store


def test_versions_kept_stay_whole_and_the_others_go(store: Store) -> None:
    manifests = [put(store, version(number)) for number in range(6)]
    collected = collect(store, manifests[3], manifests[5])
    assert set(collected.removed_manifests) == {manifests[n].fingerprint for n in (0, 1, 2, 4)}
    assert set(store.manifests()) == {manifests[n].fingerprint for n in (3, 5)}
    for each in (store, Store(store.root)):
        assert content(each, manifests[3]) == version(3) and content(each, manifests[5]) == version(5)
        assert not each.has(tensor_digest(version(4)["scale"]))
    assert store.size_bytes < 1.05 * sum(len(d) for d in {*version(3).values(), *version(5).values()})


def test_nothing_kept_leaves_nothing(store: Store) -> None:
    put(store, version(1))
    with store.batch() as batch:
        batch.add((noise("of no version", MIB),))
    collect(store)
    assert store.manifests() == [] and packs(store) == [] and store.size_bytes == 0


def test_a_version_not_held_may_be_kept(store: Store) -> None:
    held = put(store, version(1))
    assert collect(store, held, manifest_of(version(9))).removed_manifests == ()
    assert content(store, held) == version(1)


def test_collecting_again_changes_nothing(store: Store) -> None:
    manifests = [put(store, version(number)) for number in range(4)]
    collect(store, manifests[2])
    before = packs(store)
    assert collect(store, manifests[2]).freed_bytes == 0 and packs(store) == before


def test_young_versions_survive_within_the_grace(store: Store) -> None:
    old, young = put(store, version(1)), put(store, version(2))
    path = store.root / "manifests" / old.fingerprint.hex()
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 100))
    assert store.collect((), grace_s=60).removed_manifests == (old.fingerprint,)
    assert content(store, young) == version(2)


@pytest.mark.parametrize(("live_kib", "compacted"), [(60, True), (140, False)])
def test_a_pack_is_copied_when_less_than_half_of_it_lives(store: Store, live_kib: int, compacted: bool) -> None:
    live = {f"{n}": noise(f"live {n}", 20 * KIB) for n in range(live_kib // 20)}
    dead = {f"dead {n}": noise(f"dead {n}", 20 * KIB) for n in range(10 - live_kib // 20)}
    put(store, live | dead)
    kept = put(store, live)
    before = packs(store)
    view = store.read(kept.by_name["0"].digest, verify=False)
    collected = collect(store, kept)
    assert (packs(store) != before) is compacted
    assert (collected.freed_bytes > 130 * KIB) is compacted
    assert view == live["0"] and content(store, kept) == live and content(Store(store.root), kept) == live


def test_a_pack_of_tiny_tensors_is_not_copied_for_its_padding(store: Store) -> None:
    kept = put(store, {str(n): bytes([n]) for n in range(200)})
    before = packs(store)
    assert collect(store, kept).freed_bytes == 0 and packs(store) == before


def test_remains_of_many_packs_become_few_bounded_packs(tmp_path: Path) -> None:
    store = Store(tmp_path, pack_bytes=100 * KIB)
    live = {str(n): noise(f"live {n}", 30 * KIB) for n in range(12)}
    for name, data in live.items():
        put(store, {name: data, "dead": noise(f"dead {name}", 60 * KIB)})
    kept = put(store, live)
    assert len(packs(store)) == 12
    collect(store, kept)
    assert len(packs(store)) == 3 and all(path.stat().st_size < 200 * KIB for path in packs(store))
    assert content(store, kept) == live and content(Store(tmp_path), kept) == live


def test_two_copies_of_a_tensor_become_one(store: Store) -> None:
    data = {"x": noise("x", 100 * KIB)}
    kept = put(store, data)
    store.forget(tensor_digest(data["x"]))
    put(store, data)
    assert len(packs(store)) == 2
    collect(Store(store.root), kept)
    assert len(packs(store)) == 1 and content(Store(store.root), kept) == data
