"""What consecutive checkpoints cost on the wire and in time, by the block codecs alone.

    python benchmarks/wire_size.py step20.safetensors step21.safetensors step22.safetensors ...

The tensors of one dtype are taken in the order of their names, put together, and cut into blocks of 16 MiB; each block
is encoded against the same bytes of the checkpoint before, decoded in place, and compared. Printed beside it:

    bound   the entropy of the same changes given the exponent of the base (entropy.py): the size as a multiple of it
    XOR     XOR with the base, zstd-1      (both over the same blocks)
    gap16   16-bit gaps and new values of what changed, zstd-1
    idx32   32-bit positions and new values of what changed

Speeds are GB of checkpoint a second, beside memcmp of equal blocks and memcpy, over the same blocks in the same run.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import entropy
import numpy as np
import yardstick
import zstandard
from numpy.typing import NDArray
from refleet.common import codec, kernels
from refleet.common.limits import LIMITS
from refleet.common.types import DTYPE_BYTES
from rich.console import Console
from rich.table import Table

Bytes = NDArray[np.uint8]
THREADS = (1, 2)


@dataclass(frozen=True, slots=True)
class Block:
    new: Bytes
    base: Bytes
    dtype: str


@dataclass(frozen=True, slots=True)
class Step:
    """One delta. Sizes in bytes; `codecs`: encoded bytes by codec name; `bound` is None for dtypes without one."""

    source: str
    full_bytes: int
    changed_tensors: int
    changed_elements: float  # share
    payload_bytes: int
    codecs: dict[str, int]
    bound: float | None
    peers: dict[str, int]

    @property
    def share(self) -> float:
        return self.payload_bytes / self.full_bytes


def read(path: Path) -> dict[str, tuple[str, Bytes]]:
    """Name -> dtype and bytes of a safetensors file, in the order of names."""
    data = np.fromfile(path, np.uint8)
    (size,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + size].tobytes())
    header.pop("__metadata__", None)
    body = data[8 + size :]
    return {name: (header[name]["dtype"], body[slice(*header[name]["data_offsets"])]) for name in sorted(header)}


def blocks(new: dict[str, tuple[str, Bytes]], base: dict[str, tuple[str, Bytes]]) -> list[Block]:
    """The tensors that both have, put together by dtype."""
    found = []
    for dtype in sorted({dtype for dtype, _ in new.values()}):
        names = [name for name, (own, data) in new.items() if own == dtype and base[name][1].size == data.size]
        after, before = (np.concatenate([source[name][1] for name in names]) for source in (new, base))
        for start in range(0, after.size, LIMITS.block_bytes):
            piece = slice(start, start + LIMITS.block_bytes)
            found.append(Block(after[piece], before[piece], dtype))
    return found


def step(name: str, new: dict[str, tuple[str, Bytes]], base: dict[str, tuple[str, Bytes]]) -> Step:
    """Encode, check that it decodes to the same bytes, and add up."""
    codecs, changed, elements = dict.fromkeys((c.name for c in codec.CODECS.values()), 0), 0, 0
    work = blocks(new, base)
    for block in work:
        number, encoded = codec.encode_block(block.new, block.base, dtype=block.dtype)
        out = block.base.copy()
        codec.decode_block(number, encoded, out, out if codec.needs_base(number) else None, dtype=block.dtype)
        if not np.array_equal(out, block.new):
            raise SystemExit(f"{name}: a block decoded to other bytes")
        codecs[codec.CODECS[number].name] += len(memoryview(encoded).cast("B"))
        view = f"<u{DTYPE_BYTES[block.dtype]}"
        changed += int(np.count_nonzero(block.new.view(view) != block.base.view(view)))
        elements += block.new.size // DTYPE_BYTES[block.dtype]
    return Step(
        name,
        sum(data.size for _, data in new.values()),
        sum(kernels.changed(data, base[tensor][1]) for tensor, (_, data) in new.items()),
        changed / elements,
        sum(codecs.values()),
        codecs,
        bound(work),
        peers(work),
    )


def bound(work: list[Block]) -> float | None:
    """Bytes, over all blocks of a dtype at once; None where there is a dtype without a bound."""
    total = 0.0
    for dtype in {block.dtype for block in work}:
        if dtype not in entropy.EXPONENT:
            return None
        new, base = (np.concatenate([getattr(b, side) for b in work if b.dtype == dtype]) for side in ("new", "base"))
        total += entropy.bounds(new, base, dtype)["given exponent"]
    return total


def peers(work: list[Block]) -> dict[str, int]:
    """Bytes that other forms make of the same blocks."""
    zstd1 = zstandard.ZstdCompressor(level=1)
    sizes = {"XOR": 0, "gap16": 0, "idx32": 0}
    for block in work:
        view = f"<u{DTYPE_BYTES[block.dtype]}"
        new, base = block.new.view(view), block.base.view(view)
        at = np.flatnonzero(new != base)
        gaps = np.diff(at, prepend=-1) - 1
        carries = gaps >> 16  # a gap of 65535 and no value, as often as needed
        gap16 = np.minimum(gaps, 0xFFFF).astype("<u2").tobytes() + b"\xff\xff" * int(carries.sum())
        sizes["XOR"] += len(zstd1.compress(np.bitwise_xor(new, base).tobytes()))
        sizes["gap16"] += len(zstd1.compress(gap16)) + len(zstd1.compress(new[at].tobytes()))
        sizes["idx32"] += at.size * (4 + new.itemsize)
    return sizes


def speeds(work: list[Block], rounds: int) -> list[dict[str, float]]:
    """GB of checkpoint a second by number of threads, the best of `rounds` each, taken in turns."""
    size = sum(block.new.size for block in work) / 1e9
    twins = [block.base.copy() for block in work]
    sent = [codec.encode_block(block.new, block.base, dtype=block.dtype) for block in work]
    numbers = range(len(work))

    def encode(n: int) -> None:
        codec.encode_block(work[n].new, work[n].base, dtype=work[n].dtype)

    def decode(n: int) -> None:
        codec.decode_block(sent[n][0], sent[n][1], twins[n], twins[n], dtype=work[n].dtype)

    def compare(n: int) -> None:
        yardstick.compare(twins[n], work[n].base)

    def changed(n: int) -> None:
        kernels.changed(twins[n], work[n].base)

    def copy(n: int) -> None:
        yardstick.copy(twins[n], work[n].base)

    rows = []
    for threads in THREADS:
        best: dict[str, float] = {}
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(rounds):
                # the copy puts back what decoding in place changed
                for name, task in _tasks(encode=encode, decode=decode, memcpy=copy, memcmp=compare, changed=changed):
                    started = time.perf_counter()
                    list(pool.map(task, numbers))
                    best[name] = max(best.get(name, 0), size / (time.perf_counter() - started))
        rows.append({"threads": threads, **best})
    return rows


def _tasks(**tasks: Callable[[int], None]) -> Iterator[tuple[str, Callable[[int], None]]]:
    yield from tasks.items()


def show(steps: list[Step], timed: list[dict[str, float]], console: Console) -> None:
    table = Table("step", "changed", "bytes", "of all", "x bound", "XOR", "gap16", "idx32", "codecs")
    for s in steps:
        used = ", ".join(name for name, size in s.codecs.items() if size)
        ratio = f"{s.payload_bytes / s.bound:.3f}" if s.bound else "-"
        others = (f"{size / max(s.payload_bytes, 1):.2f} x" for size in s.peers.values())
        table.add_row(
            Path(s.source).stem,
            f"{s.changed_elements:.2%}",
            f"{s.payload_bytes:,}",
            f"{s.share:.3%}",
            ratio,
            *others,
            used,
        )
    console.print(table)
    table = Table("threads", "encode", "of memcmp", "decode in place", "of memcpy", "changed", "of memcmp")
    for row in timed:
        pairs = (("encode", "memcmp"), ("decode", "memcpy"), ("changed", "memcmp"))
        cells = (text for one, of in pairs for text in (f"{row[one]:.2f} GB/s", f"{row[one] / row[of]:.0%}"))
        table.add_row(f"{row['threads']:.0f}", *cells)
    console.print(table)
    console.print(f"kernels: {kernels.active().name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="consecutive checkpoints, oldest first")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes only, instead of tables")
    parser.add_argument("--rounds", type=int, default=15, help="timings of which the best counts (15)")
    parser.add_argument("--kernels", choices=kernels.available(), help="instead of the fastest")
    options = parser.parse_args()
    if len(options.checkpoints) < 2:
        parser.error("a delta needs two checkpoints")
    if options.kernels:
        kernels.use(options.kernels)
    steps, work = [], []
    for before, path in pairwise(options.checkpoints):
        base, new = read(before), read(path)
        if base.keys() != new.keys():
            parser.error(f"{before} and {path} hold other tensors")
        steps.append(step(path.name, new, base))
        work = blocks(new, base)
    if options.json:
        found: list[dict[str, Any]] = [asdict(s) | {"share": s.share} for s in steps]
        print(json.dumps(found))
        return 0
    show(steps, speeds(work, options.rounds), Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
