"""The facts about tensors, versions and deltas, as frozen dataclasses.

Digests and fingerprints are 32 raw bytes (BLAKE3) in memory and 64 hex digits for people.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from .limits import LIMITS

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
VERSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
PAYLOAD_ID = re.compile(r"[0-9a-f]{32}\Z")
NONCE = re.compile(r"[0-9a-f]{32}\Z")

#: how a payload lies in the server: entries of one stream, or strings that one stream names
STREAM, BLOBS = "stream", "blobs"

#: safetensors dtype text -> bytes per element. Sub-byte types are refused by name where a checkpoint is opened.
DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


def require(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(what)


def require_digest(value: bytes | None, what: str) -> None:
    if value is not None and len(value) != 32:
        raise ValueError(f"{what} must be 32 bytes, not {len(value)}")


def require_order(epoch: int, seq: int, *, first: int = 0) -> None:
    require(first <= epoch < 1 << 63 and first <= seq < 1 << 63, f"order ({epoch}, {seq})")


def require_time(at_ms: int) -> None:
    require(0 <= at_ms < 1 << 47, f"time {at_ms}")  # the year 6429: every calendar function takes it


def require_counts(*values: int) -> None:
    require(all(n >= 0 for n in values), f"negative count in {values}")


def tensor_name_problem(name: str) -> str | None:
    """Why `name` can't name a tensor, or None. Names are data, never paths: `..` has no business in them."""
    if not name:
        return "the empty name"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # lone surrogates
        return f"a name that is not valid Unicode: {name[:60]!r}"
    if size > LIMITS.tensor_name_bytes:
        return f"a name longer than {LIMITS.tensor_name_bytes} bytes: {name[:60]!r}..."
    if ".." in name or "\0" in name:
        return f"a name with '..' or NUL in it: {name!r}"
    return None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    name: str
    dtype: str  # safetensors text, e.g. "BF16"
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        # without `_require`: an index may have 100 000 of these, and messages that nobody reads cost the most
        if problem := tensor_name_problem(self.name):
            raise ValueError(f"tensor name: {problem}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"tensor {self.name!r}: dtype {self.dtype[:40]!r} is not supported")
        if len(self.shape) > LIMITS.tensor_dims:
            raise ValueError(f"tensor {self.name!r}: more than {LIMITS.tensor_dims} dims")
        for n in self.shape:
            if not 0 <= n <= LIMITS.tensor_bytes:  # also beside a 0, where the product says nothing
                raise ValueError(f"tensor {self.name!r}: size {n} in {list(self.shape)}")
        if self.size_bytes > LIMITS.tensor_bytes:
            raise ValueError(f"tensor {self.name!r}: {self.size_bytes} bytes")

    @property
    def item_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    spec: TensorSpec
    digest: bytes  # `tensor_digest` of its bytes: its address in a store

    def __post_init__(self) -> None:
        require_digest(self.digest, "digest of a tensor")


def _sorted_names(tensors: tuple[TensorEntry, ...] | tuple[DeltaTensor, ...]) -> None:
    require(len(tensors) <= LIMITS.tensors, f"{len(tensors)} tensors exceed {LIMITS.tensors}")
    names = [tensor.spec.name.encode() for tensor in tensors]
    require(names == sorted(set(names)), "tensor names must be sorted and unique")


@dataclass(frozen=True)
class Manifest:
    """The tensors of one version, sorted by name (UTF-8 bytes)."""

    tensors: tuple[TensorEntry, ...]

    def __post_init__(self) -> None:
        _sorted_names(self.tensors)

    @classmethod
    def of(cls, entries: Iterable[TensorEntry]) -> Manifest:
        return cls(tuple(sorted(entries, key=lambda entry: entry.spec.name.encode())))

    @cached_property
    def by_name(self) -> dict[str, TensorEntry]:
        return {entry.spec.name: entry for entry in self.tensors}

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {entry.spec.name: entry.spec for entry in self.tensors}

    @cached_property
    def digests(self) -> frozenset[bytes]:
        return frozenset(entry.digest for entry in self.tensors)

    @cached_property
    def fingerprint(self) -> bytes:
        from .digest import fingerprint

        return fingerprint(self)

    @property
    def size_bytes(self) -> int:
        return sum(entry.spec.size_bytes for entry in self.tensors)

    def changed_from(self, base: Manifest | None) -> tuple[TensorEntry, ...]:
        """Entries whose bytes, dtype or shape differ from `base`'s of the same name."""
        if base is None:
            return self.tensors
        return tuple(entry for entry in self.tensors if base.by_name.get(entry.spec.name) != entry)


@dataclass(frozen=True, slots=True)
class Block:
    """One independently decodable piece of a delta's body: `size_bytes` decoded, which may be of several tensors.

    `encoded_bytes`: with its preface.
    """

    codec: int
    size_bytes: int
    encoded_bytes: int

    def __post_init__(self) -> None:
        if not 0 < self.size_bytes <= LIMITS.block_bytes:
            raise ValueError(f"a block of {self.size_bytes} bytes")
        if not 0 <= self.encoded_bytes <= self.size_bytes + LIMITS.preface_bytes:  # what a reader has to hold
            raise ValueError(f"a block of {self.encoded_bytes} encoded bytes for {self.size_bytes}")


@dataclass(frozen=True, slots=True)
class DeltaTensor:
    """One changed tensor.

    `carried`: its bytes are in the body; else the same bytes are in the base or in another tensor of this delta, by
    digest. `based`: they are encoded relative to the base's tensor of the same name and spec.
    """

    spec: TensorSpec
    digest: bytes
    carried: bool
    based: bool

    def __post_init__(self) -> None:
        require_digest(self.digest, "digest of a tensor")
        if (self.carried and not self.spec.size_bytes) or (self.based and not self.carried):
            raise ValueError(f"{self.spec.name!r}: carried {self.carried}, based {self.based}")

    @property
    def group(self) -> tuple[bool, str]:
        """Carried tensors of one group lie together in the body, in the order of their names."""
        return (self.based, self.spec.dtype)


@dataclass(frozen=True, slots=True)
class Index:
    """The table of one delta: which tensors changed or went, how they are encoded, and the digest of every chunk.

    The carried tensors lie in the body group after group. `blocks` cut each group's bytes; no block spans two groups.
    The body is the concatenation of all encoded blocks, cut every `chunk_bytes`.
    """

    base: bytes | None  # fingerprint of the base version; None: a full snapshot
    target: bytes
    tensors: tuple[DeltaTensor, ...]
    blocks: tuple[Block, ...]
    chunk_bytes: int
    body_bytes: int
    chunks: tuple[bytes, ...]  # BLAKE3 of each body chunk
    removed: tuple[str, ...]  # names of the base's tensors that the target lacks, sorted as UTF-8 bytes

    def __post_init__(self) -> None:
        require_digest(self.base, "base fingerprint")
        require_digest(self.target, "target fingerprint")
        _sorted_names(self.tensors)
        require(1 <= self.chunk_bytes <= LIMITS.chunk_bytes_max, f"chunk size {self.chunk_bytes}")
        total = sum(block.encoded_bytes for block in self.blocks)
        require(total == self.body_bytes, f"blocks add up to {total} bytes, the body has {self.body_bytes}")
        require(len(self.chunks) == -(-self.body_bytes // self.chunk_bytes), f"{len(self.chunks)} chunk digests")
        for digest in self.chunks:
            require_digest(digest, "chunk digest")
        self._check_blocks()
        require(not self.removed or self.base is not None, "tensors removed from no base")
        require(len(self.removed) <= LIMITS.tensors, f"{len(self.removed)} removed tensors exceed {LIMITS.tensors}")
        gone = [name.encode() for name in self.removed]
        require(gone == sorted(set(gone)), "names of removed tensors must be sorted and unique")

    def _check_blocks(self) -> None:
        groups: dict[tuple[bool, str], int] = {}
        for tensor in self.tensors:
            if tensor.carried:
                groups[tensor.group] = groups.get(tensor.group, 0) + tensor.spec.size_bytes
            require(self.base is not None or not tensor.based, f"{tensor.spec.name!r} builds on no base")
        rest = iter(self.blocks)
        for (_based, dtype), left in sorted(groups.items()):
            while left:
                block = next(rest, None)
                require(block is not None and block.size_bytes <= left, f"blocks that do not fit the {dtype} tensors")
                assert block is not None
                require(block.size_bytes % DTYPE_BYTES[dtype] == 0, f"a block that cuts a {dtype} element")
                left -= block.size_bytes
        require(next(rest, None) is None, "more blocks than the carried tensors fill")


@dataclass(frozen=True, slots=True)
class PayloadRef:
    """Where one delta lies in the carrier, and what it must hash to."""

    payload_id: str
    base: bytes | None
    target: bytes
    body_chunks: int
    body_bytes: int
    index_chunks: int
    index_bytes: int
    index_digest: bytes
    carrier: str = STREAM  # or BLOBS

    def __post_init__(self) -> None:
        require(bool(PAYLOAD_ID.match(self.payload_id)), f"payload id {self.payload_id!r}")
        require(self.carrier in (STREAM, BLOBS), f"carrier {self.carrier[:40]!r}")
        require_digest(self.base, "base fingerprint")
        require_digest(self.target, "target fingerprint")
        require_digest(self.index_digest, "index digest")
        require(0 < self.index_bytes <= LIMITS.index_bytes, f"index of {self.index_bytes} bytes")
        require(0 < self.index_chunks <= self.index_bytes, f"{self.index_chunks} index chunks")
        least = -(-self.body_bytes // LIMITS.chunk_bytes_max)
        require(0 <= least <= self.body_chunks <= self.body_bytes < 1 << 63, f"{self.body_chunks} body chunks")

    @property
    def size_bytes(self) -> int:
        return self.body_bytes + self.index_bytes
