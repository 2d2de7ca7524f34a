"""A file that always holds one complete version, opened, damaged, full, or crashed upon."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
from engine_cases import SPECS, Staged, version, zoo_version
from refleet.common.errors import DigestMismatch, NotRefittable, RefitFailed, UsageError
from refleet.common.tensors import tensor_bytes
from refleet.common.types import DTYPE_BYTES, TensorSpec
from refleet.worker.file_engine import FileEngine


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def written(path: Path, staged: Staged) -> bytes:
    FileEngine(path).apply(staged, staged.names)
    return path.read_bytes()


def files(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_the_file_opens_with_safetensors_and_names_its_release(path: Path) -> None:
    staged = zoo_version(3)
    written(path, staged)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {
            "refleet.version": "v3",
            "refleet.fingerprint": staged.manifest.fingerprint.hex(),
            "refleet.epoch": "1",
            "refleet.seq": "3",
        }
        assert set(file.keys()) == set(SPECS)
    loaded = safetensors.torch.load_file(path)
    for name, spec in SPECS.items():
        assert tuple(loaded[name].shape) == spec.shape
        assert tensor_bytes(loaded[name]) == staged.tensors[name]


def test_every_dtype_is_readable_and_lies_aligned_in_the_file(path: Path) -> None:
    specs = [TensorSpec(f"t{n}.{dtype}", dtype, (n,)) for n in (1, 3) for dtype in DTYPE_BYTES]
    data = written(path, version({spec.name: bytes(spec.size_bytes) for spec in specs}, specs))
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    for spec in specs:
        assert (8 + length + table[spec.name]["data_offsets"][0]) % spec.item_bytes == 0
    assert length % 8 == 0
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == {spec.name for spec in specs}


def test_the_same_release_gives_the_same_bytes_on_every_host(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert written(one, zoo_version(1)) == written(two, zoo_version(1))
    written(two, zoo_version(2))
    assert written(two, zoo_version(1)) == one.read_bytes()


def test_a_version_without_tensors_is_a_file_too(path: Path) -> None:
    empty = version({}, [])
    written(path, empty)
    assert safetensors.torch.load_file(path) == {}
    assert list(FileEngine(path).read_back([])) == []


def test_a_large_tensor_is_written_and_read_back_in_bounded_memory(path: Path) -> None:
    spec = TensorSpec("big", "U8", (64 << 20,))
    staged = version({"big": bytes(spec.size_bytes)}, [spec])
    shared = memoryview(bytearray(spec.size_bytes))
    staged.read = lambda name: shared  # type: ignore[method-assign]
    engine = FileEngine(path)
    tracemalloc.start()
    try:
        engine.apply(staged, staged.names)
        assert dict(engine.read_back(["big"])) == staged.digests
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """Writes beyond that size fail with EFBIG, as they would with ENOSPC on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_fails_the_refit_and_keeps_the_old_file(path: Path) -> None:
    old = written(path, zoo_version(1))
    engine, new = FileEngine(path), zoo_version(2)
    with files_no_larger_than(len(old) - 1), pytest.raises(RefitFailed, match="too large") as caught:
        engine.apply(new, new.names)
    assert caught.value.next
    assert path.read_bytes() == old
    assert files(path.parent) == [path.name]
    assert dict(engine.read_back(new.names)) == zoo_version(1).digests


def test_bytes_that_rotted_since_staging_never_reach_the_file(path: Path) -> None:
    old = written(path, zoo_version(1))
    new = zoo_version(2)
    new.tensors["mask"] = bytes(5)
    with pytest.raises(DigestMismatch) as caught:
        FileEngine(path).apply(new, new.names)
    assert caught.value.tensor == "mask"
    assert path.read_bytes() == old
    assert files(path.parent) == [path.name]


CRASH = """
import sys
from refleet.common.crashpoint import arm
from engine_cases import zoo_version
from refleet.worker.file_engine import FileEngine
arm(sys.argv[2])
FileEngine(sys.argv[1]).apply(zoo_version(2), frozenset())
"""


@pytest.mark.parametrize(("point", "holds", "left"), [("file_engine.written", 1, 1), ("file_engine.renamed", 2, 0)])
def test_a_crash_leaves_the_old_or_the_new_file_and_the_next_start_tidies_up(
    path: Path, point: str, holds: int, left: int
) -> None:
    written(path, zoo_version(1))
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", CRASH, str(path), point], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(files(path.parent)) == 1 + left
    neighbour = path.with_name(".other.safetensors.1.refleet-tmp")
    neighbour.touch()
    staged = zoo_version(holds)
    assert dict(FileEngine(path).read_back(staged.names)) == staged.digests
    assert files(path.parent) == [neighbour.name, path.name]


def test_the_new_file_is_on_the_disk_before_it_is_visible_and_so_is_its_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, synced, real = written(path, zoo_version(1)), [], os.fsync

    def fsync(handle: int) -> None:
        real(handle)
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        synced.append((kind, "old" if path.read_bytes() == old else "new", os.fstat(handle).st_size >= len(old)))

    monkeypatch.setattr(os, "fsync", fsync)
    written(path, zoo_version(2))
    assert [event[:2] for event in synced] == [("file", "old"), ("folder", "new")]
    assert synced[0][2]  # complete by then


def test_a_reader_of_the_old_file_keeps_the_old_version(path: Path) -> None:
    old = written(path, zoo_version(1))
    with open(path, "rb") as reader:
        assert written(path, zoo_version(2)) != old
        assert reader.read() == old


def test_who_could_read_the_old_file_can_read_the_new_one(path: Path) -> None:
    written(path, zoo_version(1))
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    path.chmod(0o640)
    written(path, zoo_version(2))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_first_version_may_be_any_and_binds_later_ones_over_a_restart(path: Path) -> None:
    FileEngine(path).check(zoo_version(1).manifest)
    path.touch()  # an empty file is no version
    written(path, zoo_version(1))
    other = version({"x": b"1"}, [TensorSpec("x", "U8", (1,))])
    with pytest.raises(NotRefittable, match="has 9 tensors") as caught:
        FileEngine(path).check(other.manifest)
    assert str(path) in caught.value.what
    path.unlink()
    FileEngine(path).check(other.manifest)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: b"\xff" * 20 + data[20:], lambda data: b"short"]
)
def test_a_file_damaged_while_the_worker_runs_shows_and_is_healed(path: Path, damage: Callable[[bytes], bytes]) -> None:
    staged, engine = zoo_version(1), FileEngine(path)
    engine.apply(staged, staged.names)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    with pytest.raises(DigestMismatch, match="can't be read back"):
        list(engine.read_back(staged.names))
    with pytest.raises(NotRefittable):
        engine.check(version({"x": b"1"}, [TensorSpec("x", "U8", (1,))]).manifest)
    engine.apply(staged, frozenset())
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    "content",
    [
        b"my thesis, the only copy",
        (1 << 40).to_bytes(8, "little") + b"{}",
        b"\2\0\0\0\0\0\0\0[]",
        b"\x0e\0\0\0\0\0\0\0" + b'{"x": {"a":1}}',
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        b"\x36\0\0\0\0\0\0\0" + b'{"x": {"dtype":"U8","shape":[9],"data_offsets":[0,9]}}' + b"only 8..",
    ],
    ids=["text", "huge-header", "list", "entry", "deep", "truncated"],
)
def test_a_file_that_is_not_safetensors_is_not_overwritten(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(UsageError, match="refusing to overwrite") as caught:
        FileEngine(path)
    assert caught.value.next.startswith("move it away")
    assert path.read_bytes() == content


def test_a_version_whose_header_no_reader_would_accept_is_refused(path: Path) -> None:
    specs = [TensorSpec(f"{n:0500}", "U8", (0,)) for n in range(32_000)]
    with pytest.raises(NotRefittable, match="header would have"):
        FileEngine(path).check(version({spec.name: b"" for spec in specs}, specs).manifest)


def test_a_folder_that_is_missing_and_a_path_that_is_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder") as caught:
        FileEngine(tmp_path / "no" / "model.safetensors")
    assert caught.value.next == f"mkdir -p {tmp_path / 'no'}"
    with pytest.raises(UsageError, match="is a folder"):
        FileEngine(tmp_path)
