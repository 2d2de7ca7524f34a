"""A trainer that writes while we read: a version never mixes two checkpoints, and the publisher survives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refleet.common.errors import CheckpointChanged
from refleet.publisher import source_file
from refleet.publisher.checkpoint import Checkpoint, open_checkpoint
from safetensors.torch import save_file

SIZE = 100_000


def save_folder(folder: Path) -> None:
    """Two shards and their index."""
    folder.mkdir(exist_ok=True)
    for n in (1, 2):
        save_file({f"w{n}": torch.full((SIZE,), n, dtype=torch.uint8)}, folder / f"model-{n}.safetensors")
    listed = {f"w{n}": f"model-{n}.safetensors" for n in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite_in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"different!")


def rewrite_and_restore_times(path: Path) -> None:
    before = path.stat()
    rewrite_in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def replace_by_rename(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))  # the same bytes, size and mtime
    path.with_suffix(".new").replace(path)


CHANGES = {
    truncate: "changed its size",
    rewrite_in_place: "was written or touched",
    rewrite_and_restore_times: "was written or touched",
    append: "changed its size",
    replace_by_rename: "was replaced by another file",
    Path.unlink: "is gone",
}
FILES = ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FILES)
def test_any_change_of_any_file_is_noticed_at_the_end(
    tmp_path: Path, change: Callable[[Path], None], name: str
) -> None:
    save_folder(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        for tensor in checkpoint.specs:
            for _ in checkpoint.blocks(tensor):
                pass
        checkpoint.confirm()
        change(tmp_path / name)
        with pytest.raises(CheckpointChanged) as caught:
            checkpoint.confirm()
    assert CHANGES[change] in caught.value.what
    assert caught.value.about == str(tmp_path / name)
    assert "publish again" in caught.value.next


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_of_a_file_that_changed_is_not_even_begun(tmp_path: Path, change: Callable[[Path], None]) -> None:
    save_folder(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        change(tmp_path / "model-2.safetensors")
        assert len(next(checkpoint.blocks("w1"))) == SIZE
        with pytest.raises(CheckpointChanged):
            next(checkpoint.blocks("w2"))


def test_a_file_that_grew_shorter_in_the_middle_of_a_tensor_is_noticed_there(tmp_path: Path) -> None:
    save_folder(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        blocks = checkpoint.blocks("w1", block_bytes=1000)
        next(blocks)
        os.truncate(tmp_path / "model-1.safetensors", 5000)
        with pytest.raises(CheckpointChanged, match="ends at byte 5000"):
            list(blocks)


def test_truncating_a_file_in_place_while_it_is_read_does_not_kill_the_process(tmp_path: Path) -> None:
    # In a process of its own: with a mapped file, this is where it dies of SIGBUS.
    save_folder(tmp_path)
    code = f"""
import os
from refleet.common.errors import CheckpointChanged
from refleet.publisher.checkpoint import open_checkpoint
with open_checkpoint({str(tmp_path)!r}) as checkpoint:
    blocks = checkpoint.blocks("w1", block_bytes=4096)
    block = next(blocks)
    os.truncate({str(tmp_path / "model-1.safetensors")!r}, 0)
    print(sum(block))
    try:
        for block in blocks:
            sum(block)
    except CheckpointChanged:
        print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["4096", "alive"])


def test_reading_while_a_trainer_rewrites_in_place_never_passes_a_mixture(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(SIZE * 20, dtype=torch.uint8)}, path)
    start = path.stat().st_size - SIZE * 20
    stop = threading.Event()
    writes, stalls = [0], [0]

    def train() -> None:
        value, written_s = 0, time.monotonic()
        with open(path, "r+b", buffering=0) as file:
            while not stop.is_set():
                value = (value + 1) % 256
                for at in range(0, SIZE * 20, SIZE):
                    if at and time.monotonic() - written_s > source_file.SETTLE_S:
                        stalls[0] += 1  # a loaded machine: half a version lay still, as a whole one does
                    file.seek(start + at)
                    file.write(bytes([value]) * SIZE)
                    written_s = time.monotonic()
                    writes[0] += 1
                stop.wait(0.06)  # a pause in which a checkpoint can be read whole

    def attempt() -> str:
        before = stalls[0]
        try:
            with open_checkpoint(path) as checkpoint:
                seen = {value for block in checkpoint.blocks("w", block_bytes=SIZE) for value in set(bytes(block))}
                checkpoint.confirm()
        except CheckpointChanged:
            return "changed"
        if len(seen) == 1:
            return "whole"
        until, now = time.monotonic() + 20, writes[0]
        while writes[0] == now and time.monotonic() < until:
            stop.wait(0.001)  # for the write that tells how long the one before was ago
        return "stalled" if stalls[0] > before else f"a mixture of {seen}"

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        outcomes = {attempt() for _ in range(60)}
    finally:
        stop.set()
        trainer.join()
    assert outcomes <= {"whole", "changed", "stalled"}
    assert outcomes & {"whole", "changed"}


def test_a_file_is_trusted_only_once_it_was_left_alone_for_two_ticks(tmp_path: Path) -> None:
    # Otherwise a second write in the same tick of the kernel's clock would leave size and times as they were.
    save_folder(tmp_path)
    (tmp_path / "model-2.safetensors").touch()
    with open_checkpoint(tmp_path):
        age_s = time.time() - (tmp_path / "model-2.safetensors").stat().st_ctime
    assert age_s >= source_file.SETTLE_S


def test_a_file_that_is_written_all_the_time_is_refused(tmp_path: Path) -> None:
    save_folder(tmp_path)
    path = tmp_path / "model-1.safetensors"
    with pytest.raises(CheckpointChanged, match="being written at this moment"):
        source_file.SourceFile.at(path, now_s=lambda: path.stat().st_ctime)


def test_many_shards_need_one_open_file(tmp_path: Path) -> None:
    listed = {f"w{n}": f"{n}.safetensors" for n in range(300)}
    for tensor, shard in listed.items():
        save_file({tensor: torch.ones(1)}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    checkpoint: Checkpoint
    with open_checkpoint(tmp_path) as checkpoint:
        for tensor in listed:
            assert sum(map(len, checkpoint.blocks(tensor))) == 4
            assert open_files() <= before + 1
        abandoned = checkpoint.blocks("w0", block_bytes=1)
        next(abandoned)
        del abandoned
    assert open_files() == before
