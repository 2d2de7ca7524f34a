"""What consecutive checkpoints cost on the wire: payload bytes, exactly as `refleet publish` would send them.

    python benchmarks/wire_size.py step20.safetensors step21.safetensors step22.safetensors ...

Each step is encoded as a delta from the one before, decoded again by the worker's code, and compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from refleet.common import codec, wire
from refleet.common.delta import Encoder, as_bytes, plan
from refleet.common.limits import LIMITS
from refleet.common.store import Store
from refleet.common.types import Index, Manifest
from refleet.publisher.checkpoint import open_checkpoint
from refleet.publisher.ingest import hashed, ingest
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Step:
    """One delta. `codecs`: encoded bytes by codec name."""

    source: str
    full_bytes: int
    changed_tensors: int
    changed_elements: float  # share
    payload_bytes: int
    codecs: dict[str, int]

    @property
    def share(self) -> float:
        return self.payload_bytes / self.full_bytes


def read(path: Path, store: Store) -> Manifest:
    """Put a checkpoint into the store."""
    with open_checkpoint(path) as checkpoint:
        manifest = hashed(checkpoint)
        ingest(checkpoint, manifest, store, serving="")
    return manifest


def step(path: Path, store: Store, base: Manifest, target: Manifest) -> Step:
    """Encode base -> target, check that it decodes to the target, and add up."""
    encoder = Encoder(store, plan(target, base), base=base, target=target)
    body = b"".join(bytes(chunk) for chunk in encoder.chunks())
    index = encoder.index()
    codecs = check(store, base, index, body)
    changed = elements = 0
    for entry in target.tensors:
        new, old = (as_bytes(store.read(m.by_name[entry.spec.name].digest, verify=False)) for m in (target, base))
        size = entry.spec.item_bytes
        changed += int(np.count_nonzero((new != old).reshape(-1, size).any(axis=1)))
        elements += new.size // size
    return Step(
        path.name,
        target.size_bytes,
        len(index.tensors),
        changed / elements,
        len(body) + len(wire.pack(index)),
        codecs,
    )


def check(store: Store, base: Manifest, index: Index, body: bytes) -> dict[str, int]:
    """Decode every block and compare; returns encoded bytes by codec."""
    at, sizes = 0, dict.fromkeys((c.name for c in codec.CODECS.values()), 0)
    for tensor in index.tensors:
        new = as_bytes(store.read(tensor.digest, verify=False))
        old = as_bytes(store.read(base.by_name[tensor.spec.name].digest, verify=False))
        for number, block in enumerate(tensor.blocks):
            piece = slice(number * LIMITS.block_bytes, (number + 1) * LIMITS.block_bytes)
            out = np.empty(new[piece].size, np.uint8)
            before = old[piece] if block.codec == codec.SPARSE else None
            codec.decode_block(block.codec, body[at : at + block.encoded_bytes], out, before, dtype=tensor.spec.dtype)
            if not np.array_equal(out, new[piece]):
                raise SystemExit(f"{tensor.spec.name}: decoded to other bytes")
            at += block.encoded_bytes
            sizes[codec.CODECS[block.codec].name] += block.encoded_bytes
    return sizes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="consecutive checkpoints, oldest first")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if len(options.checkpoints) < 2:
        parser.error("a delta needs two checkpoints")
    steps = []
    with tempfile.TemporaryDirectory() as folder, Store(folder) as store:
        base = read(options.checkpoints[0], store)
        for path in options.checkpoints[1:]:
            target = read(path, store)
            steps.append(step(path, store, base, target))
            store.collect([target.fingerprint])
            base = target
    if options.json:
        print(json.dumps([asdict(s) | {"share": s.share} for s in steps]))
        return 0
    table = Table("checkpoint", "elements changed", "payload bytes", "of the checkpoint", "codecs")
    for s in steps:
        used = ", ".join(name for name, size in s.codecs.items() if size)
        table.add_row(s.source, f"{s.changed_elements:.2%}", f"{s.payload_bytes:,}", f"{s.share:.3%}", used)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
