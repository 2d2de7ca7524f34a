"""A disk without room, for real: a small tmpfs (as root), or a limit on the size of files in a process of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from refleet.common.digest import tensor_digest
from refleet.common.errors import StoreFull
from refleet.common.store import Store
from stored import KIB, MIB, collect, content, noise, packs, put, run, temp_files, version


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, *, leave_bytes: int) -> Path:
    """Takes the room, except about `leave_bytes`."""
    room = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(max(room.f_bavail * room.f_bsize - leave_bytes, 0)))
    return disk / "filler"


@pytest.mark.parametrize("leave_bytes", [0, 40 * KIB, 900 * KIB])
@pytest.mark.parametrize("pack_bytes", [1, 1 << 30])
def test_a_version_that_does_not_fit_leaves_the_store_as_it_was(disk: Path, leave_bytes: int, pack_bytes: int) -> None:
    store = Store(disk / "store", pack_bytes=pack_bytes)
    first = put(store, version(1))
    fill(disk, leave_bytes=leave_bytes)
    held = set(packs(store))
    with pytest.raises(StoreFull, match="no room") as caught:
        put(store, {"large": noise("large", 2 * MIB), "small": b"y"})
    assert caught.value.about.startswith(str(disk)) and "df -h" in caught.value.next
    assert temp_files(store) == [] and set(packs(store)) == held and store.manifests() == [first.fingerprint]
    for each in (store, Store(disk / "store")):
        assert content(each, first) == version(1)


def test_room_made_later_is_used(disk: Path) -> None:
    store = Store(disk / "store")
    filler = fill(disk, leave_bytes=100 * KIB)
    with pytest.raises(StoreFull):
        put(store, version(1))
    filler.unlink()
    assert content(store, put(store, version(1))) == version(1)


@pytest.mark.parametrize("block_bytes", [1000, 700 * KIB, 4 * MIB])
def test_a_batch_goes_on_after_a_tensor_that_did_not_fit(disk: Path, block_bytes: int) -> None:
    store = Store(disk / "store")
    fill(disk, leave_bytes=MIB + 200 * KIB)
    large = noise("large", 4 * MIB)
    with store.batch() as batch:
        small = batch.add((noise("small", 100 * KIB),))
        with pytest.raises(StoreFull):
            batch.add(large[at : at + block_bytes] for at in range(0, len(large), block_bytes))
        other = batch.add((noise("other", 90 * KIB),))
    again = Store(disk / "store")
    assert again.read(small, verify=True) == noise("small", 100 * KIB)
    assert again.read(other, verify=True) == noise("other", 90 * KIB)


def test_a_batch_whose_pack_was_lost_does_not_end_like_a_success(disk: Path) -> None:
    store = Store(disk / "store", pack_bytes=100 * KIB)
    filler = fill(disk, leave_bytes=40 * KIB)
    with pytest.raises(StoreFull), store.batch() as batch:
        batch.add((noise("a", 60 * KIB),))  # accepted: it is still in memory
        with pytest.raises(StoreFull):
            batch.add((noise("b", 60 * KIB),))
        filler.unlink()
        with pytest.raises(StoreFull):
            batch.add((b"c",))
    assert packs(store) == [] and temp_files(store) == []


def test_what_is_held_needs_no_room_and_a_lock_neither(disk: Path) -> None:
    store = Store(disk / "store")
    held = put(store, version(1))
    fill(disk, leave_bytes=0)
    with store.lock("publish"), store.batch() as batch:
        for data in version(1).values():
            batch.add((data,), expect=tensor_digest(data))
    assert content(store, held) == version(1)


def test_a_record_that_does_not_fit_leaves_the_old_one(disk: Path) -> None:
    store = Store(disk / "store")
    store.put_record("state", b"before")
    fill(disk, leave_bytes=8 * KIB)
    with pytest.raises(StoreFull, match="no room"):
        store.put_record("state", bytes(100 * KIB))
    assert store.record("state") == b"before" and temp_files(store) == []


def test_retention_makes_room_on_a_full_disk_and_copies_when_there_is_some(disk: Path) -> None:
    store = Store(disk / "store")
    put(store, {"dead": noise("dead", 300 * KIB), **{str(n): noise(str(n), 600 * KIB) for n in range(3)}})
    kept = put(store, {"2": noise("2", 600 * KIB)})
    put(store, {"all dead": noise("all dead", 300 * KIB)})
    filler = fill(disk, leave_bytes=0)
    with pytest.raises(StoreFull):
        store.put_record("state", b"x")
    assert 290 * KIB < collect(store, kept).freed_bytes < 320 * KIB  # one pack, but no room for the copy of the other
    assert content(store, kept) == {"2": noise("2", 600 * KIB)} and temp_files(store) == []
    filler.unlink()
    assert collect(store, kept).freed_bytes > 1400 * KIB
    assert content(Store(disk / "store"), kept) == {"2": noise("2", 600 * KIB)}


def test_a_read_only_disk_can_be_read_and_says_so_when_written(disk: Path) -> None:
    manifest = put(Store(disk / "store"), version(1))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    store = Store(disk / "store")
    assert content(store, manifest) == version(1)
    for write in (lambda: put(store, version(2)), lambda: store.put_record("x", b""), lambda: store.collect([])):
        with pytest.raises(StoreFull, match="may not be written"):
            write()
    assert content(store, manifest) == version(1)


LIMITED = """
import resource
from refleet.common.errors import StoreFull
store = Store(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    put(store, version(2))
except StoreFull as error:
    print(error.what)
print(temp_files(store), len(packs(store)))
print(content(store, manifest_of(version(1))) == version(1))
"""


def test_a_file_beyond_the_limit_of_the_process_is_a_full_store(tmp_path: Path) -> None:
    put(Store(tmp_path), version(1))
    code, output = run(LIMITED, tmp_path)
    assert code == 0
    assert output == "the disk has no room for the store: File too large\n[] 1\nTrue\n"
    assert not Store(tmp_path).has(tensor_digest(version(2)["layer.1"]))
