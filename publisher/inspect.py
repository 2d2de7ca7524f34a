"""What `refleet history`, `show`, `diff` and `gc` tell, as facts: read from a store or the log, nothing is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from ..common import wire
from ..common.delta import Encoder, Input
from ..common.errors import ProtocolError, UnknownVersion
from ..common.layout import in_body_order, placed
from ..common.limits import LIMITS
from ..common.messages import Release
from ..common.signing import Trust, open_envelope
from ..common.store import Store
from ..common.stream import Stream
from ..common.types import DTYPE_BYTES, Index, Manifest
from .book import Book, Version
from .checkpoint import Checkpoint
from .compare import Comparison, OnBytes, RottenBaseError, silent


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
    if record is None:
        raise _unknown(version, [v.version for v in book.versions()], f"store {book.store.root}")
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
    base = store.manifest(head.fingerprint) if store and head else None
    total = sum(spec.size_bytes for spec in checkpoint.specs.values())
    while True:
        compared = Comparison(checkpoint, base, store)
        elements: list[int] = []  # changed ones of each carried tensor, in body order
        encoder = Encoder(_counted(compared.inputs(), elements))
        try:
            for _ in encoder.chunks():
                on_progress("compare", compared.read_bytes, total)
        except RottenBaseError:
            continue
        break
    on_progress("compare", total, total)
    checkpoint.confirm()
    manifest = compared.manifest()
    index = encoder.index(compared.changed, target=manifest, base=base)
    unchanged = base is not None and base.fingerprint == manifest.fingerprint
    return Diff(
        checkpoint.source, head.version if head else None, head.fingerprint if head else None, manifest.fingerprint,
        _tensor_diffs(index, elements), len(manifest.tensors), sum(e.spec.elements for e in manifest.tensors),
        0 if unchanged else index.body_bytes + len(wire.pack(index)), manifest.size_bytes,
    )  # fmt: skip


def _counted(inputs: Iterable[Input], elements: list[int]) -> Iterator[Input]:
    """The same inputs; appends how many elements of each changed."""
    for each in inputs:
        integers = np.dtype(f"u{DTYPE_BYTES[each.dtype]}")
        count = each.new.size // integers.itemsize
        if each.base is not None:
            count = int(np.count_nonzero(each.new.view(integers) != each.base.view(integers)))
        elements.append(count)
        yield each


def _tensor_diffs(index: Index, elements: list[int]) -> tuple[TensorDiff, ...]:
    """Per changed tensor; the bytes of a block that several share are divided among them by size."""
    order = in_body_order(index.tensors)
    payload = dict.fromkeys((tensor.spec.name for tensor in order), 0.0)
    for place in placed((tensor.spec.size_bytes for tensor in order), index.blocks):
        for span in place.spans:
            share = span.size / place.block.size_bytes
            payload[order[span.number].spec.name] += place.block.encoded_bytes * share
    changed = {tensor.spec.name: count for tensor, count in zip(order, elements, strict=True)}
    return tuple(
        TensorDiff(
            t.spec.name, t.spec.elements, changed.get(t.spec.name, t.spec.elements), round(payload.get(t.spec.name, 0))
        )
        for t in index.tensors
    )


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
