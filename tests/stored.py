"""Versions for the store's tests, in this process or in another one that may be killed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refleet.common.digest import tensor_digest
from refleet.common.store import Collected, Store
from refleet.common.types import Manifest, TensorEntry, TensorSpec

KIB, MIB = 1 << 10, 1 << 20
Tensors = dict[str, bytes]


def noise(seed: str, size: int) -> bytes:
    """`size` bytes that only this seed gives."""
    return hashlib.shake_128(seed.encode()).digest(size)


def version(number: int) -> Tensors:
    """A small model: one tensor of every version, one of the even or odd ones, the rest of this version only."""
    return {
        "embed": noise("embed", 300 * KIB),
        "norm": noise(f"norm {number % 2}", 50),
        "layer.0": noise(f"layer.0 {number}", 200 * KIB),
        "layer.1": noise(f"layer.1 {number}", 2 * MIB + 7),
        "scale": noise(f"scale {number}", 1),
        "nothing": b"",
    }


def manifest_of(tensors: Tensors) -> Manifest:
    return Manifest.of(
        TensorEntry(TensorSpec(name, "U8", (len(data),)), tensor_digest(data)) for name, data in tensors.items()
    )


def put(store: Store, tensors: Tensors) -> Manifest:
    """Puts a version in as a writer does, so that it survives a power cut."""
    manifest = put_unsettled(store, tensors)
    store.settle()
    return manifest


def put_unsettled(store: Store, tensors: Tensors) -> Manifest:
    """The same, as far as it goes until it is served."""
    manifest = manifest_of(tensors)
    with store.writing():
        lacking = {entry.spec.name for entry in store.missing(manifest)}
        with store.batch() as batch:
            for name in sorted(lacking):
                half = len(tensors[name]) // 2
                batch.add((tensors[name][:half], tensors[name][half:]))
        store.put_manifest(manifest)
    return manifest


def content(store: Store, manifest: Manifest) -> Tensors:
    """All tensors of a version, each verified."""
    return {entry.spec.name: bytes(store.read(entry.digest, verify=True)) for entry in manifest.tensors}


def collect(store: Store, *keep: Manifest) -> Collected:
    """Collects, and checks that the bytes it reports are those that the disk got back."""
    before = store.size_bytes
    collected = store.collect([manifest.fingerprint for manifest in keep])
    assert collected.freed_bytes == before - store.size_bytes
    return collected


def packs(store: Store) -> list[Path]:
    """The visible packs, oldest first."""
    return sorted((store.root / "packs").glob("*.pack"))


def temp_files(store: Store) -> list[Path]:
    return list((store.root / "temp").iterdir())


def flip(path: Path, at: int) -> None:
    """Bit rot: changes one byte in place; a negative `at` counts from the end."""
    with path.open("r+b") as file:
        file.seek(at, 0 if at >= 0 else 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))


def flip_tensor(store: Store, data: bytes) -> Path:
    """Bit rot in the middle of the newest stored copy of `data`; returns its pack."""
    for path in reversed(packs(store)):
        at = path.read_bytes().find(data)
        if at >= 0:
            flip(path, at + len(data) // 2)
            return path
    raise AssertionError("no pack holds these bytes")


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Runs `code` in a new process, with everything of this module and `arguments` as strings in `sys.argv[1:]`."""
    program = f"import sys\nfrom refleet.common.crashpoint import arm\nfrom stored import *\n{code}"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(code: str, *arguments: object) -> tuple[int, str]:
    """Like `start`, to the end: exit code (negative: the signal that killed it) and standard output."""
    with start(code, *arguments) as process:
        output, _ = process.communicate(timeout=60)
    return process.returncode, output


@contextmanager
def running(code: str, store: Store) -> Iterator[subprocess.Popen[str]]:
    """`code` in another process, from its first line of output on; killed at the end."""
    with start(code, store.root) as process:
        try:
            assert told(process) == "ready"
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
