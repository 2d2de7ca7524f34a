"""What `refleet history`, `show`, `diff` and `gc` tell, as facts: read from a store or the log, nothing is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from ..common import wire
from ..common.codec import encode_block
from ..common.delta import Part, as_bytes, cores, in_order, plan, removed
from ..common.errors import DamagedTensor, ProtocolError, UnknownVersion
from ..common.limits import LIMITS
from ..common.messages import Release
from ..common.signing import Trust, open_envelope
from ..common.store import Store
from ..common.stream import Stream
from ..common.types import Block, DeltaTensor, Index, Manifest
from .book import Book, Version
from .checkpoint import Checkpoint
from .ingest import OnBytes, hashed, silent

Bytes = NDArray[np.uint8]


def release_dict(release: Release) -> dict[str, object]:
    """The stable keys of one release in every `--json` output."""
    return {
        "version": release.version,
        "epoch": release.epoch,
        "seq": release.seq,
        "kind": release.kind,
        "fingerprint": release.fingerprint.hex(),
        "base": release.base.hex() if release.base else None,
        "changed_tensors": release.changed_tensors,
        "total_tensors": release.total_tensors,
        "payload_bytes": release.payload_bytes,
        "full_bytes": release.full_bytes,
        "created_at": iso_time(release.created_at_ms),
        "message": release.message,
        "restructure": release.restructure,
    }


def iso_time(at_ms: int) -> str:
    """`2026-01-31T12:00:00.123Z`"""
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# ---------------------------------------------------------------------- history and show


def releases_in_log(stream: Stream, *, trust: Trust | None) -> list[Release]:
    """All readable releases that the server still has, oldest first. Raises: StreamError."""
    found = []
    for log_id, data in stream.history(LIMITS.log_entries):
        try:
            release = wire.unpack(open_envelope(data, trust).payload, Release)
        except ProtocolError:
            continue
        if release.order == log_id and release.model == stream.model:
            found.append(release)
    return found


@dataclass(frozen=True, slots=True)
class Shown:
    """One version. Without a store (`store` false) only its releases are known."""

    version: str
    fingerprint: bytes
    releases: tuple[Release, ...]
    record: Version | None
    manifest: Manifest | None  # None: past retention, or no store
    base: Manifest | None  # of its first release

    def to_dict(self) -> dict[str, object]:
        """Stable keys of `refleet show --json`."""
        return {
            "version": self.version,
            "fingerprint": self.fingerprint.hex(),
            "source": self.record.source if self.record else None,
            "message": self.record.message if self.record else self.releases[0].message,
            "held": self.manifest is not None if self.record else None,
            "full_bytes": self.releases[0].full_bytes if self.releases else None,
            "releases": [release_dict(release) for release in self.releases],
            "tensors": None if self.manifest is None else [self._tensor(name) for name in self.manifest.by_name],
        }

    @property
    def changed(self) -> list[str] | None:
        """Names of the tensors that its first release changed; None where that is not known any more."""
        if self.manifest is None or (self.releases and self.releases[0].base and self.base is None):
            return None
        return [entry.spec.name for entry in self.manifest.changed_from(self.base)]

    def _tensor(self, name: str) -> dict[str, object]:
        assert self.manifest is not None
        entry, changed = self.manifest.by_name[name], self.changed
        return {
            "name": name,
            "dtype": entry.spec.dtype,
            "shape": list(entry.spec.shape),
            "bytes": entry.spec.size_bytes,
            "digest": entry.digest.hex(),
            "changed": None if changed is None else name in set(changed),
        }


def show_from_book(book: Book, version: str) -> Shown:
    """Raises: UnknownVersion, saying what there is."""
    record = book.version(version)
    if record is None or not record.released:
        raise _unknown(version, [v.version for v in book.versions() if v.released], f"store {book.store.root}")
    releases = tuple(release for release in book.releases() if release.version == version)
    base = releases[0].base if releases else None
    return Shown(
        version, record.fingerprint, releases, record, _held(book.store, record.fingerprint), _held(book.store, base)
    )


def show_from_log(found: list[Release], version: str) -> Shown:
    """Raises: UnknownVersion, saying what there is."""
    releases = tuple(release for release in found if release.version == version)
    if not releases:
        raise _unknown(version, list(dict.fromkeys(release.version for release in found)), "the log in the server")
    return Shown(version, releases[0].fingerprint, releases, None, None, None)


def _unknown(version: str, known: list[str], where: str) -> UnknownVersion:
    return UnknownVersion(
        f"there is no version {version!r}", about=where, next=f"versions there: {', '.join(known[-10:]) or 'none'}"
    )


def _held(store: Store, fingerprint: bytes | None) -> Manifest | None:
    return store.manifest(fingerprint) if fingerprint and fingerprint in set(store.manifests()) else None


# ---------------------------------------------------------------------- diff


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor that would change. `changed_elements` is all of them where the store can't compare."""

    name: str
    elements: int
    changed_elements: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Diff:
    """What publishing a checkpoint over `base` would change and send to a worker that serves `base`."""

    source: str
    base_version: str | None
    base_fingerprint: bytes | None
    fingerprint: bytes
    tensors: tuple[TensorDiff, ...]
    total_tensors: int
    total_elements: int
    payload_bytes: int
    full_bytes: int

    @property
    def changed_elements(self) -> int:
        return sum(tensor.changed_elements for tensor in self.tensors)

    def to_dict(self) -> dict[str, object]:
        """Stable keys of `refleet diff --json`."""
        return {
            "source": self.source,
            "base": self.base_version,
            "base_fingerprint": self.base_fingerprint.hex() if self.base_fingerprint else None,
            "fingerprint": self.fingerprint.hex(),
            "changed_tensors": len(self.tensors),
            "total_tensors": self.total_tensors,
            "changed_elements": self.changed_elements,
            "total_elements": self.total_elements,
            "payload_bytes": self.payload_bytes,
            "full_bytes": self.full_bytes,
            "tensors": [
                {
                    "name": tensor.name,
                    "elements": tensor.elements,
                    "changed_elements": tensor.changed_elements,
                    "payload_bytes": tensor.payload_bytes,
                }
                for tensor in self.tensors
            ],
        }


def diff(checkpoint: Checkpoint, store: Store | None, head: Release | None, *, on_progress: OnBytes = silent) -> Diff:
    """Compares and encodes as a publish would, and keeps only the sizes. Raises: CheckpointError."""
    manifest = hashed(checkpoint, on_progress=on_progress)
    base = store.manifest(head.fingerprint) if store and head else None
    parts = plan(manifest, base)
    blocks: dict[int, list[Block]] = {number: [] for number in range(len(parts))}
    elements = dict.fromkeys(range(len(parts)), 0)
    most = sum(part.entry.spec.size_bytes for part in parts)
    done = 0
    for number, block, changed, size in in_order(_compare, _tasks(checkpoint, store, parts), threads=cores()):
        blocks[number] += [block] if block else []
        elements[number] += changed
        done += size
        on_progress("compare", done, most)
    tensors = tuple(
        TensorDiff(
            part.entry.spec.name,
            part.entry.spec.size_bytes // part.entry.spec.item_bytes,
            elements[number],
            sum(block.encoded_bytes for block in blocks[number]),
        )
        for number, part in enumerate(parts)
    )
    checkpoint.confirm()
    return Diff(
        checkpoint.source, head.version if head else None, head.fingerprint if head else None, manifest.fingerprint,
        tensors, len(manifest.tensors), sum(e.spec.size_bytes // e.spec.item_bytes for e in manifest.tensors),
        _payload_bytes(manifest, base, parts, blocks), manifest.size_bytes,
    )  # fmt: skip


Task = tuple[int, Part, Bytes, Bytes | None]


def _tasks(checkpoint: Checkpoint, store: Store | None, parts: list[Part]) -> Iterator[Task]:
    for number, part in enumerate(parts):
        base, start = _base_bytes(store, part.base), 0
        for block in checkpoint.blocks(part.entry.spec.name):
            new = as_bytes(bytes(block))  # the checkpoint's buffer is used again for the next block
            yield number, part, new, None if base is None else base[start : start + new.size]
            start += new.size


def _base_bytes(store: Store | None, digest: bytes | None) -> Bytes | None:
    if store is None or digest is None:
        return None
    try:
        return as_bytes(store.read(digest, verify=True))
    except DamagedTensor:
        return None  # then it would travel whole


def _compare(task: Task) -> tuple[int, Block | None, int, int]:
    """(part, encoded block if this tensor travels, changed elements, decoded bytes)"""
    number, part, new, base = task
    spec, block = part.entry.spec, None
    if part.carried:
        codec, encoded = encode_block(new, base, dtype=spec.dtype)
        block = Block(codec, memoryview(encoded).nbytes)
    changed = new.size // spec.item_bytes
    if base is not None:
        integers = np.dtype(f"u{spec.item_bytes}")
        changed = int(np.count_nonzero(new.view(integers) != base.view(integers)))
    return number, block, changed, new.size


def _payload_bytes(manifest: Manifest, base: Manifest | None, parts: list[Part], blocks: dict[int, list[Block]]) -> int:
    """Body and index of the payload, as a publish would write them; 0 where it would send nothing."""
    if base and base.fingerprint == manifest.fingerprint:
        return 0
    body = sum(block.encoded_bytes for found in blocks.values() for block in found)
    chunks = -(-body // LIMITS.chunk_bytes)
    tensors = tuple(DeltaTensor(p.entry.spec, p.entry.digest, tuple(blocks[n])) for n, p in enumerate(parts))
    index = Index(
        base.fingerprint if base else None, manifest.fingerprint, tensors, LIMITS.chunk_bytes, body,
        (bytes(32),) * chunks, removed(manifest, base),
    )  # fmt: skip
    return body + len(wire.pack(index))


# ---------------------------------------------------------------------- gc


def freeable_bytes(store: Store, going: Iterable[bytes]) -> int:
    """Bytes of the tensors that only the versions in `going` need."""
    gone = set(going)
    sizes: dict[bytes, int] = {}
    needed: set[bytes] = set()
    for fingerprint in store.manifests():
        for entry in store.manifest(fingerprint).tensors:
            if fingerprint in gone:
                sizes[entry.digest] = entry.spec.size_bytes
            else:
                needed.add(entry.digest)
    return sum(size for digest, size in sizes.items() if digest not in needed)
