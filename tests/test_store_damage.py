"""The store on a disk that lies: bit rot, cut files, damaged tables and records. It is named, and it heals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from refleet.common.digest import tensor_digest
from refleet.common.errors import DamagedTensor, MalformedRecord, UnknownVersion
from refleet.common.store import Store
from refleet.common.types import Manifest
from stored import KIB, MIB, collect, content, flip, flip_tensor, manifest_of, noise, packs, put, run, version

NAME = "layer.0"
DATA = version(1)[NAME]
DIGEST = tensor_digest(DATA)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as store:
        yield store


@pytest.fixture
def held(store: Store) -> Manifest:
    """A version in the store."""
    return put(store, version(1))


def heal(store: Store) -> None:
    store.forget(DIGEST)
    with store.batch() as batch:
        batch.add((DATA,), expect=DIGEST)


def assert_damaged(store: Store, *, verify: bool, how: str) -> None:
    with pytest.raises(DamagedTensor, match=how) as caught:
        store.read(DIGEST, verify=verify)
    assert caught.value.digest == DIGEST and DIGEST.hex() in str(caught.value)


def test_one_flipped_byte_is_named_and_the_rest_stays_good(store: Store, held: Manifest) -> None:
    store.read(DIGEST, verify=True)
    flip_tensor(store, DATA)
    for each in (store, Store(store.root)):
        assert_damaged(each, verify=True, how="no longer match")
        for name, data in version(1).items():
            assert name == NAME or each.read(tensor_digest(data), verify=True) == data


def new_packs_come_and_go(store: Store, held: Manifest) -> None:
    """Another process adds and removes packs, and `store` looks at both."""
    other = Store(store.root)
    put(other, {"dead": noise("dead", KIB)})
    assert store.has(tensor_digest(noise("dead", KIB)))
    collect(other, held)
    assert not store.has(bytes(32)) and not store.has(tensor_digest(noise("dead", KIB)))


def test_a_forgotten_tensor_is_missing_until_it_is_added_again(store: Store, held: Manifest) -> None:
    flip_tensor(store, DATA)
    store.forget(DIGEST)
    for _ in range(2):
        assert not store.has(DIGEST)
        assert [entry.spec.name for entry in store.missing(held)] == [NAME]
        assert_damaged(store, verify=False, how="missing")
        new_packs_come_and_go(store, held)
    assert put(store, version(1)) == held
    for each in (store, Store(store.root)):
        for _ in range(2):
            assert each.missing(held) == [] and content(each, held) == version(1)
            new_packs_come_and_go(each, held)
    assert len(packs(store)) == 2  # the damaged copy is still there


def test_healing_survives_restarts(store: Store, held: Manifest) -> None:
    for round_ in range(12):  # the names of later packs must keep sorting behind the earlier ones
        flip_tensor(store, DATA)
        assert_damaged(store, verify=True, how="no longer match")
        heal(store)
        store = Store(store.root)
        assert len(packs(store)) == 2 + round_
        assert content(store, held) == version(1)


def test_a_tensor_healed_by_another_process_is_read_from_its_new_place(store: Store, held: Manifest) -> None:
    store.read(DIGEST, verify=True)
    flip_tensor(store, DATA)
    heal(Store(store.root))
    assert store.read(DIGEST, verify=True) == DATA


def test_a_tensor_forgotten_here_and_healed_elsewhere_is_held_again(store: Store, held: Manifest) -> None:
    flip_tensor(store, DATA)
    store.forget(DIGEST)
    assert not store.has(DIGEST)
    heal(Store(store.root))
    assert store.has(DIGEST) and store.read(DIGEST, verify=True) == DATA


CUT_WHILE_READING = """
store = Store(sys.argv[1])
digest = tensor_digest(version(1)["layer.0"])
first = tensor_digest(version(1)["embed"])
if sys.argv[2] == "mapped":
    store.read(digest, verify=True)
(pack,) = packs(store)
import os
os.truncate(pack, int(sys.argv[3]))
for verify in (False, True):
    try:
        store.read(digest, verify=verify)
    except Exception as error:
        print(type(error).__name__, error.what)
print(bytes(store.read(first, verify=True)) == version(1)["embed"] if int(sys.argv[3]) else "")
"""


@pytest.mark.parametrize("when", ["mapped", "unmapped"])
@pytest.mark.parametrize("length", [0, 310 * KIB])
def test_a_pack_that_is_cut_under_a_reader_raises_and_does_not_kill_it(
    store: Store, held: Manifest, when: str, length: int
) -> None:
    code, output = run(CUT_WHILE_READING, store.root, when, length)  # a process of its own: it would die of SIGBUS
    assert code == 0
    damaged = "DamagedTensor a stored tensor is damaged: its file was cut\n"
    assert output == 2 * damaged + ("True\n" if length else "\n")


@pytest.mark.parametrize("length", [0, 1, 63, 64, 100 * KIB, -1])
def test_a_cut_pack_is_put_aside_at_the_next_start(store: Store, held: Manifest, length: int) -> None:
    (pack,) = packs(store)
    os.truncate(pack, length if length >= 0 else pack.stat().st_size + length)
    check_put_aside(store, held, pack)


@pytest.mark.parametrize("at", [-1, -17, -49, -64, -65, -64 - 48 * 5])  # magic, sum, count, offset, table
def test_a_pack_with_a_damaged_table_is_put_aside(store: Store, held: Manifest, at: int) -> None:
    (pack,) = packs(store)
    flip(pack, at)
    check_put_aside(store, held, pack)


def check_put_aside(store: Store, held: Manifest, pack: Path) -> None:
    damaged = pack.read_bytes()
    again = Store(store.root)
    assert {entry.spec.name for entry in again.missing(held)} == set(version(1)) - {"nothing"}
    aside = pack.with_name(f"{pack.name}.damaged")
    assert packs(again) == [] and aside.read_bytes() == damaged
    collect(again, held)
    assert aside.exists()  # something misses what it held
    put(again, version(1))
    assert content(Store(store.root), held) == version(1)
    collect(again, held)
    assert not aside.exists()


def test_a_pack_that_claims_an_enormous_table_allocates_nothing(store: Store, held: Manifest) -> None:
    (pack,) = packs(store)
    with pack.open("r+b") as file:
        file.seek(-56, os.SEEK_END)
        file.write((1 << 60).to_bytes(8, "little"))
    assert len(Store(store.root).missing(held)) == 5


# retention


def test_of_two_copies_retention_keeps_the_sound_one_though_it_is_older(store: Store, held: Manifest) -> None:
    store.forget(DIGEST)
    with store.batch() as batch:  # not damaged in truth: now there are two sound copies
        batch.add((DATA,))
        other = batch.add((noise("other", 400 * KIB),))
    newer = flip_tensor(store, DATA)
    assert newer == packs(store)[1]
    again = Store(store.root)
    assert_damaged(again, verify=True, how="no longer match")
    with_other = put(again, {"x": noise("other", 400 * KIB)})
    collect(again, held, with_other)
    for each in (again, Store(store.root)):
        assert content(each, held) == version(1)
        assert each.read(other, verify=True) == noise("other", 400 * KIB)


def test_retention_keeps_one_copy_of_what_was_healed(store: Store, held: Manifest) -> None:
    flip_tensor(store, DATA)
    heal(store)
    size_bytes = store.size_bytes
    collect(Store(store.root), held)
    again = Store(store.root)
    assert content(again, held) == version(1) and again.size_bytes <= size_bytes


def test_compaction_does_not_carry_damage_on(store: Store) -> None:
    small = put(store, {"a": DATA, "b": noise("b", 10 * KIB), "dead": noise("dead", MIB)})
    keep = {"a": DATA, "b": noise("b", 10 * KIB)}
    kept = put(store, keep)
    flip_tensor(store, DATA)
    assert collect(store, kept).removed_manifests == (small.fingerprint,)
    for each in (store, Store(store.root)):
        assert [entry.spec.name for entry in each.missing(kept)] == ["a"]
        assert each.read(kept.by_name["b"].digest, verify=True) == keep["b"]
    put(store, keep)
    assert content(store, kept) == keep


# manifests and records


@pytest.mark.parametrize("at", [0, 31, 32, 100, -1])
def test_a_damaged_manifest_is_an_unknown_version_that_heals(store: Store, held: Manifest, at: int) -> None:
    flip(store.root / "manifests" / held.fingerprint.hex(), at)
    with pytest.raises(UnknownVersion, match="its manifest is damaged"):
        store.manifest(held.fingerprint)
    assert store.manifests() == []
    put(store, version(1))
    assert store.manifest(held.fingerprint) == held
    assert len(list((store.root / "manifests").iterdir())) == 1


def test_a_manifest_under_another_name_is_not_used(store: Store, held: Manifest) -> None:
    other = manifest_of(version(2)).fingerprint
    (store.root / "manifests" / held.fingerprint.hex()).rename(store.root / "manifests" / other.hex())
    with pytest.raises(UnknownVersion):
        store.manifest(other)


def test_while_a_kept_manifest_is_damaged_no_tensor_is_removed(store: Store, held: Manifest) -> None:
    gone = put(store, version(2))
    flip(store.root / "manifests" / held.fingerprint.hex(), 40)
    for _ in range(2):
        collected = collect(store, held)
        assert collected.unreadable == (held.fingerprint,)
    assert store.manifests() == [] and store.missing(held) == [] and store.missing(gone) == []
    put(store, version(1))
    assert collect(store, held).unreadable == ()
    assert store.missing(held) == [] and len(store.missing(gone)) == 4
    flip(store.root / "manifests" / held.fingerprint.hex(), 40)
    assert collect(store).unreadable == ()  # nobody keeps it any more
    assert list((store.root / "manifests").iterdir()) == [] and packs(store) == []


@pytest.mark.parametrize("at", [0, 31, 32, -1])
def test_a_damaged_record_is_named(store: Store, at: int) -> None:
    store.put_record("state/main", b"some bytes")
    path = store.root / "records" / "state+main"
    flip(path, at)
    with pytest.raises(MalformedRecord, match="state\\+main"):
        store.record("state/main")
    store.put_record("state/main", b"other")
    assert store.record("state/main") == b"other"


@pytest.mark.parametrize("length", [0, 10, 32, 41])
def test_a_cut_record_is_named(store: Store, length: int) -> None:
    store.put_record("state", b"some bytes")
    os.truncate(store.root / "records" / "state", length)
    with pytest.raises(MalformedRecord, match="records/state"):
        store.record("state")


def test_an_enormous_record_is_refused_unread(store: Store) -> None:
    store.put_record("state", b"x")
    os.truncate(store.root / "records" / "state", 1 << 40)
    with pytest.raises(MalformedRecord, match="records/state"):
        store.record("state")


def test_a_damaged_id_is_named(store: Store) -> None:
    flip(store.root / "id", -3)
    with pytest.raises(MalformedRecord, match="id"):
        Store(store.root)
