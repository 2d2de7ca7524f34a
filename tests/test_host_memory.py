"""Rebuilt tensors that the workers of a host share. What workers do with them is in test_share.py."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from refleet.common import folder_stamp, host_image
from refleet.common.digest import tensor_digest
from refleet.common.errors import StoreError
from refleet.common.host_memory import HostMemory
from stored import KIB, MIB, flip, noise, run, start, told

Open = Callable[[], HostMemory]


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    """What stands for /dev/shm."""
    return tmp_path


@pytest.fixture
def opened(shm: Path) -> Iterator[Open]:
    """`opened()`: the memory of one more worker of this host."""
    made: list[HostMemory] = []

    def make() -> HostMemory:
        made.append(HostMemory("s", shm=shm))
        return made[-1]

    yield make
    for each in made:
        each.close()


def put(memory: HostMemory, *tensors: bytes) -> list[bytes]:
    """Rebuild these in `memory`, and give their digests."""
    buffers = memory.take_all(map(len, tensors))
    for buffer, data in zip(buffers, tensors, strict=True):
        buffer[:] = np.frombuffer(data, np.uint8)
    found = {tensor_digest(data): buffer for data, buffer in zip(tensors, buffers, strict=True)}
    memory.put(found)
    return list(found)


def holds(memory: HostMemory, *tensors: bytes) -> bool:
    found = [memory.get(tensor_digest(data)) for data in tensors]
    return all(got is not None and bytes(got) == data for got, data in zip(found, tensors, strict=True))


def files(memory: HostMemory) -> dict[str, int]:
    """Name and inode of everything that lies in the shared folder."""
    return {path.name: path.stat().st_ino for path in memory.folder.iterdir()} if memory.folder.exists() else {}


def inodes(memory: HostMemory) -> set[int]:
    return set(files(memory).values())


ONE, TWO, THREE = noise("one", 300 * KIB), noise("two", 5), noise("three", 64 * KIB)


# ---------------------------------------------------------------------- what one makes, all have


def test_what_one_rebuilds_is_there_for_the_others_once(opened: Open) -> None:
    first, second = opened(), opened()
    assert not holds(second, ONE)
    put(first, ONE, b"", TWO, THREE)
    assert holds(first, ONE, TWO, THREE) and holds(second, ONE, TWO, THREE) and holds(opened(), ONE, TWO, THREE)
    assert len(files(first)) == 1
    assert second.size_bytes == first.size_bytes > 0


def test_it_is_seen_in_the_moment_that_it_is_whole_and_not_before(opened: Open) -> None:
    first, second = opened(), opened()
    buffers = first.take_all([len(ONE)])
    buffers[0][:] = np.frombuffer(ONE, np.uint8)
    assert not holds(second, ONE) and not holds(first, ONE)
    first.put({tensor_digest(ONE): buffers[0]})
    assert holds(first, ONE) and holds(second, ONE)


@pytest.mark.parametrize("writer", [0, 1], ids=["who made it", "another"])
def test_whoever_writes_into_a_view_changes_it_for_nobody_else(opened: Open, writer: int) -> None:
    both = opened(), opened()
    (digest,) = put(both[0], ONE)
    view, other = (memory.get(digest) for memory in (both[writer], both[1 - writer]))
    assert view is not None and other is not None
    view[:] = 0
    assert bytes(other) == ONE and holds(opened(), ONE)


def test_another_process_finds_it(opened: Open, shm: Path) -> None:
    memory = opened()
    (digest,) = put(memory, ONE)
    code = """
from pathlib import Path
from refleet.common.host_memory import HostMemory
memory = HostMemory("s", shm=Path(sys.argv[1]))
print(tensor_digest(memory.get(bytes.fromhex(sys.argv[2]))).hex(), end="")
"""
    assert run(code, shm, digest.hex()) == (0, digest.hex())
    assert holds(memory, ONE), "the end of one takes nothing from the others"


# ---------------------------------------------------------------------- memory is used again, never while it is needed


def test_an_image_is_used_again_only_when_nobody_looks_at_it(opened: Open) -> None:
    first, second = opened(), opened()
    (digest,) = put(first, ONE)
    view = second.get(digest)
    old = inodes(first)
    for memory in (first, second):
        memory.trim()  # nothing is pinned
    put(first, THREE)
    assert len(inodes(first)) == 2
    assert view is not None and bytes(view) == ONE
    del view
    gc.collect()
    first.pin([tensor_digest(THREE)])
    first.trim()
    again = noise("again", len(ONE))
    put(first, again)
    assert old < inodes(first), "the very same file"
    assert len(inodes(first)) == 2
    assert holds(second, again, THREE) and not holds(second, ONE)


def test_what_is_pinned_by_one_is_kept_for_all(opened: Open) -> None:
    first, second = opened(), opened()
    digests = put(first, ONE)
    assert holds(second, ONE)
    second.pin(digests)
    for memory in (first, second):
        memory.trim()
    put(first, noise("other", len(ONE)))
    assert holds(second, ONE) and holds(first, ONE)


def test_what_was_let_go_is_found_again_while_it_is_there(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_stamp, "_SETTLED_NS", -1_000_000_000)  # as if the folder had rested
    first, second = opened(), opened()
    put(first, ONE)
    assert holds(second, ONE)
    second.trim()
    assert holds(second, ONE)


@pytest.mark.parametrize("size", [KIB, 3 * MIB], ids=["smaller", "larger"])
def test_a_version_of_another_size_takes_the_memory_too_and_what_is_left_over_goes(opened: Open, size: int) -> None:
    """Else the memory would fill with images that no later version has the size of."""
    first, second = opened(), opened()
    put(first, ONE)
    put(first, THREE)
    before = inodes(first)
    first.trim()
    other = noise("other", size)
    put(first, other)
    assert len(inodes(first)) == 1 and inodes(first) <= before
    assert holds(second, other)
    (path,) = first.folder.iterdir()
    assert size <= path.stat().st_size < size + KIB, "and no more than it needs"


def test_versions_that_change_a_little_each_leave_no_trail_of_images(opened: Open) -> None:
    """Each has one tensor that stays for ever, and a large one that does not."""
    first, second = opened(), opened()
    kept = [noise(f"kept {n}", 8 * KIB) for n in range(8)]
    for number, small in enumerate(kept):
        large = noise(f"large {number}", 256 * KIB)
        put(first, small, large)
        served = [tensor_digest(data) for data in (large, *kept[: number + 1])]
        for memory in (first, second):
            assert holds(memory, large, *kept[: number + 1])
            memory.pin(served)
            memory.trim()
    assert len(files(first)) <= 3
    assert sum(path.stat().st_size for path in first.folder.iterdir()) < 4 * 256 * KIB
    assert holds(opened(), *kept)


def test_buffers_that_were_not_put_vanish(opened: Open) -> None:
    memory = opened()
    buffers = memory.take_all([len(ONE)])
    assert len(files(memory)) == 1
    del buffers
    gc.collect()
    assert not files(memory)


# ---------------------------------------------------------------------- ends of processes

TAKE = """
from pathlib import Path
from refleet.common.host_memory import HostMemory
memory = HostMemory("s", shm=Path(sys.argv[1]))
buffers = memory.take_all([1000000])
if len(sys.argv) > 2:
    memory.put({bytes(32): buffers[0]})
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("finished", [False, True])
def test_what_a_killed_process_had_goes_when_the_next_one_comes_and_not_before(
    opened: Open, shm: Path, finished: bool
) -> None:
    memory = opened()
    with start(TAKE, shm, *(["finish"] if finished else [])) as process:
        try:
            assert told(process) == "ready"
            (there,) = inodes(memory)
            opened()
            assert inodes(memory) == {there}, "its maker lives"
        finally:
            process.kill()
        process.wait()
    assert inodes(memory) == {there}
    opened()
    assert not files(memory)


def test_the_memory_of_a_killed_process_is_used_again_by_those_that_run(opened: Open, shm: Path) -> None:
    memory = opened()
    with start(TAKE, shm) as process:
        assert told(process) == "ready"
        (there,) = inodes(memory)
        process.kill()
        process.wait()
    put(memory, ONE)
    assert inodes(memory) == {there} and holds(opened(), ONE)


def test_what_killed_workers_of_another_store_had_goes_too_and_what_living_ones_have_stays(
    opened: Open, shm: Path
) -> None:
    living = HostMemory("a" * 32, shm=shm)
    put(living, ONE)
    gone = shm / f"refleet-{os.getuid()}-{'b' * 32}"
    code = TAKE.replace('"s"', "sys.argv[2]")
    with start(code, shm, "b" * 32) as process:
        assert told(process) == "ready"
        opened()
        assert gone.exists()
        process.kill()
        process.wait()
    (shm / f"refleet-{os.getuid()}-stores").mkdir()
    opened()
    assert not gone.exists() and (shm / f"refleet-{os.getuid()}-stores").exists()
    assert holds(living, ONE) and holds(HostMemory("a" * 32, shm=shm), ONE)
    living.close()


def test_a_clean_end_leaves_nothing_behind(shm: Path) -> None:
    first, second = HostMemory("s", shm=shm), HostMemory("s", shm=shm)
    (digest,) = put(first, ONE)
    view = second.get(digest)
    first.close()
    assert holds(second, ONE)
    second.close()
    assert len(files(second)) == 1, "somebody still looks at it"
    assert view is not None and bytes(view) == ONE
    del view
    last = HostMemory("s", shm=shm)
    put(last, ONE)
    last.close()
    assert list(shm.iterdir()) == []


def test_a_sweep_between_making_and_locking_a_file_costs_nothing(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, real, swept = opened(), host_image._locked, list[Path]()

    def locked(fd: int, path: Path, kind: int) -> bool:
        if not swept:
            swept.append(path)
            host_image.sweep(memory.folder)
        return real(fd, path, kind)

    monkeypatch.setattr(host_image, "_locked", locked)
    put(memory, ONE)
    assert swept and holds(opened(), ONE)


# ---------------------------------------------------------------------- no room, no folder


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A memory file system of one MiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "refleet-test", str(place)]
    if os.getuid() or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_what_has_no_room_stays_private(small: Path) -> None:
    first, second = HostMemory("s", shm=small), HostMemory("s", shm=small)
    fits, large = noise("fits", 600 * KIB), noise("large", 2 * MIB)
    put(first, fits)
    put(first, large)
    assert holds(first, fits, large)
    assert holds(second, fits) and not holds(second, large)
    assert len(files(first)) == 1, "and what was begun for it is gone"
    first.trim()
    second.trim()
    put(first, noise("later", 700 * KIB))
    assert holds(second, noise("later", 700 * KIB)), "later there is room again"
    first.close()
    second.close()


def test_memory_that_may_not_be_taken_stays_private(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    memory = opened()
    monkeypatch.setattr(os, "posix_fallocate", full)
    put(memory, ONE)
    assert holds(memory, ONE) and not files(memory)


def test_without_such_a_file_system_everything_stays_private(tmp_path: Path) -> None:
    memory = HostMemory("s", shm=tmp_path / "nowhere")
    put(memory, ONE)
    assert holds(memory, ONE)
    memory.close()


def test_a_folder_that_somebody_removed_costs_only_what_was_in_it(opened: Open) -> None:
    """As the end of the user's last login does, on some systems."""
    first, second = opened(), opened()
    put(first, ONE)
    buffers = first.take_all([len(THREE)])
    buffers[0][:] = np.frombuffer(THREE, np.uint8)
    shutil.rmtree(first.folder)
    first.put({tensor_digest(THREE): buffers[0]})
    assert holds(first, ONE, THREE) and not holds(second, ONE) and not holds(second, THREE)
    put(second, TWO)
    assert holds(first, TWO)


@pytest.mark.parametrize("how", ["foreign", "a link", "open to the group", "a file"])
def test_a_folder_that_others_could_write_is_refused(shm: Path, how: str) -> None:
    folder = shm / f"refleet-{os.getuid()}-s"
    if how == "a link":
        (shm / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(shm / "elsewhere")
    elif how == "a file":
        folder.touch(mode=0o600)
    else:
        folder.mkdir(mode=0o700)
    if how == "foreign":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        os.chown(folder, 12345, 12345)
    elif how == "open to the group":
        folder.chmod(0o770)
    with pytest.raises(StoreError, match="somebody else's"):
        HostMemory("s", shm=shm)


def test_a_folder_that_became_somebody_elses_is_not_written(opened: Open) -> None:
    memory = opened()
    memory.folder.rename(memory.folder.with_name("away"))
    memory.folder.mkdir(mode=0o777)
    memory.folder.chmod(0o777)
    put(memory, ONE)
    assert holds(memory, ONE) and not files(memory)


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize("how", ["table", "cut", "empty", "a link", "a folder"])
def test_what_is_no_image_is_ignored(opened: Open, how: str) -> None:
    first, second = opened(), opened()
    put(first, ONE)
    (path,) = first.folder.iterdir()
    if how == "table":
        flip(path, -70)
    elif how == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif how == "empty":
        os.truncate(path, 0)
    else:
        path.unlink()
        path.mkdir() if how == "a folder" else path.symlink_to(path.with_name("aside"))
    assert not holds(second, ONE)
    put(second, THREE)
    assert holds(opened(), THREE)


def test_a_damaged_tensor_that_was_given_up_does_not_come_back(opened: Open) -> None:
    first, second = opened(), opened()
    digests = put(first, ONE, THREE)
    (path,) = first.folder.iterdir()
    flip(path, len(ONE) // 2)
    assert not holds(second, ONE)
    second.drop(digests[0])
    assert second.get(digests[0]) is None and holds(second, THREE)
    second.trim()
    assert second.get(digests[0]) is None, "also after the image was let go and found again"
    assert holds(second, THREE)
    put(first, ONE)
    assert holds(second, ONE), "a newer copy counts"


# ---------------------------------------------------------------------- all at once

MANY = """
import random, time
from pathlib import Path
import numpy as np
from refleet.common.host_memory import HostMemory

seed, until, seen = int(sys.argv[2]), time.monotonic() + 1.5, []
random.seed(seed)
names = [f"{number}" for number in range(12)]
sizes = {name: 1 + 40000 * (int(name) % 5) for name in names}
digests = {name: tensor_digest(noise(name, sizes[name])) for name in names}
memory, views, found = HostMemory("s", shm=Path(sys.argv[1])), [], 0
while time.monotonic() < until:
    wanted = random.sample(names, 3)
    if random.random() < 0.3:
        buffers = memory.take_all(sizes[name] for name in wanted)
        for name, buffer in zip(wanted, buffers):
            buffer[:] = np.frombuffer(noise(name, sizes[name]), np.uint8)
        memory.put({digests[name]: buffer for name, buffer in zip(wanted, buffers)})
        del buffers, buffer
    for name in wanted:
        view = memory.get(digests[name])
        if view is not None:
            views.append((name, view))
            found += 1
    assert all(tensor_digest(view) == digests[name] for name, view in views)
    if random.random() < 0.3:
        memory.pin(digests[name] for name in wanted)
        views = views[-3:]
        memory.trim()
    if random.random() < 0.1:
        del view, views[:]
        memory.close()
        memory = HostMemory("s", shm=Path(sys.argv[1]))
assert found
"""


def test_makers_readers_and_sweeps_at_once_never_show_other_bytes(shm: Path) -> None:
    running = [start(MANY, shm, seed) for seed in range(4)]
    for process in running:
        process.communicate(timeout=60)
    assert [process.returncode for process in running] == [0] * 4
    HostMemory("s", shm=shm).close()
    assert list(shm.iterdir()) == []
