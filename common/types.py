"""The facts that publisher and worker exchange and keep, as frozen dataclasses.

Digests and fingerprints are 32 raw bytes (BLAKE3) in memory and 64 hex digits for people. Times are milliseconds since
the epoch where they are only shown; nothing is decided by comparing clocks of two machines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

from .limits import LIMITS

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
VERSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
PAYLOAD_ID = re.compile(r"[0-9a-f]{32}\Z")
NONCE = re.compile(r"[0-9a-f]{32}\Z")

#: safetensors dtype text -> bytes per element. Sub-byte types are refused by name where a checkpoint is opened.
DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(what)


def _digest(value: bytes, what: str) -> None:
    _require(len(value) == 32, f"{what} must be 32 bytes, not {len(value)}")


def tensor_name_problem(name: str) -> str | None:
    """Why `name` can't name a tensor, or None. Names are data, never paths: `..` has no business in them."""
    if not name:
        return "the empty name"
    if len(name.encode("utf-8", "surrogatepass")) > LIMITS.tensor_name_bytes:
        return f"a name longer than {LIMITS.tensor_name_bytes} bytes: {name[:60]!r}..."
    if ".." in name or "\0" in name:
        return f"a name with '..' or NUL in it: {name!r}"
    if any(0xD800 <= ord(c) <= 0xDFFF for c in name):
        return f"a name that is not valid Unicode: {name!r}"
    return None


class Evidence(IntEnum):
    """What an ack may claim; each step includes the ones before it."""

    NONE = 0
    RECEIVED = 1
    STAGED = 2
    REFITTED = 3
    PROBED = 4
    SERVING = 5


@dataclass(frozen=True, slots=True)
class TensorSpec:
    name: str
    dtype: str  # safetensors text, e.g. "BF16"
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        problem = tensor_name_problem(self.name)
        _require(problem is None, f"tensor name: {problem}")
        _require(self.dtype in DTYPE_BYTES, f"tensor {self.name!r}: dtype {self.dtype!r} is not supported")
        _require(len(self.shape) <= LIMITS.tensor_dims, f"tensor {self.name!r}: more than {LIMITS.tensor_dims} dims")
        _require(all(n >= 0 for n in self.shape), f"tensor {self.name!r}: negative size in {list(self.shape)}")
        _require(self.size_bytes <= LIMITS.tensor_bytes, f"tensor {self.name!r}: {self.size_bytes} bytes")

    @property
    def item_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    spec: TensorSpec
    digest: bytes  # BLAKE3 of the tensor's bytes: its address in a store

    def __post_init__(self) -> None:
        _digest(self.digest, f"digest of {self.spec.name!r}")


@dataclass(frozen=True)
class Manifest:
    """The tensors of one version, sorted by name (UTF-8 bytes)."""

    tensors: tuple[TensorEntry, ...]

    def __post_init__(self) -> None:
        names = [entry.spec.name.encode() for entry in self.tensors]
        _require(names == sorted(set(names)), "manifest names must be sorted and unique")
        _require(len(names) <= LIMITS.tensors, f"{len(names)} tensors exceed {LIMITS.tensors}")

    @classmethod
    def of(cls, entries: Iterable[TensorEntry]) -> Manifest:
        return cls(tuple(sorted(entries, key=lambda entry: entry.spec.name.encode())))

    @cached_property
    def by_name(self) -> dict[str, TensorEntry]:
        return {entry.spec.name: entry for entry in self.tensors}

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
    """One independently decodable slice of a tensor: `LIMITS.block_bytes` decoded bytes, the last one fewer."""

    codec: int
    encoded_bytes: int


@dataclass(frozen=True, slots=True)
class DeltaTensor:
    """One changed tensor. No blocks means: the same bytes are elsewhere in this index or in the base (by digest)."""

    spec: TensorSpec
    digest: bytes
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        _digest(self.digest, f"digest of {self.spec.name!r}")
        wanted = -(-self.spec.size_bytes // LIMITS.block_bytes)
        _require(len(self.blocks) in (0, wanted), f"{self.spec.name!r}: {len(self.blocks)} blocks, not {wanted}")


@dataclass(frozen=True, slots=True)
class Index:
    """The table of one delta: which tensors changed, how they are encoded, and the digest of every chunk.

    The body is the concatenation of all blocks in order, cut every `chunk_bytes`.
    """

    base: bytes | None  # fingerprint of the base version; None: a full snapshot
    target: bytes
    tensors: tuple[DeltaTensor, ...]
    chunk_bytes: int
    body_bytes: int
    chunks: tuple[bytes, ...]  # BLAKE3 of each body chunk

    def __post_init__(self) -> None:
        if self.base is not None:
            _digest(self.base, "base fingerprint")
        _digest(self.target, "target fingerprint")
        _require(len(self.tensors) <= LIMITS.tensors, f"{len(self.tensors)} tensors exceed {LIMITS.tensors}")
        _require(1 <= self.chunk_bytes <= LIMITS.chunk_bytes_max, f"chunk size {self.chunk_bytes}")
        total = sum(block.encoded_bytes for tensor in self.tensors for block in tensor.blocks)
        _require(all(b.encoded_bytes >= 0 for t in self.tensors for b in t.blocks), "negative block size")
        _require(total == self.body_bytes, f"blocks add up to {total} bytes, the body has {self.body_bytes}")
        _require(len(self.chunks) == -(-self.body_bytes // self.chunk_bytes), f"{len(self.chunks)} chunk digests")
        for digest in self.chunks:
            _digest(digest, "chunk digest")


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

    def __post_init__(self) -> None:
        _require(bool(PAYLOAD_ID.match(self.payload_id)), f"payload id {self.payload_id!r}")
        if self.base is not None:
            _digest(self.base, "base fingerprint")
        _digest(self.target, "target fingerprint")
        _digest(self.index_digest, "index digest")
        _require(0 < self.index_bytes <= LIMITS.index_bytes, f"index of {self.index_bytes} bytes")
        _require(0 < self.index_chunks <= self.index_bytes, f"{self.index_chunks} index chunks")
        _require(0 <= self.body_chunks <= max(self.body_bytes, 0), f"{self.body_chunks} body chunks")

    @property
    def size_bytes(self) -> int:
        return self.body_bytes + self.index_bytes


@dataclass(frozen=True, slots=True)
class Release:
    """An entry of the model's log: the fleet's target is now `version`."""

    model: str
    publisher: str  # id of the publisher's store
    epoch: int
    seq: int
    kind: str  # "publish" or "rollback"
    version: str
    fingerprint: bytes
    base: bytes | None  # fingerprint of the target before this release
    payload: PayloadRef | None  # None: every live worker held the target when it was announced
    changed_tensors: int
    total_tensors: int
    payload_bytes: int
    full_bytes: int
    created_at_ms: int
    message: str

    def __post_init__(self) -> None:
        _require(bool(MODEL_NAME.match(self.model)), f"model name {self.model!r}")
        _require(bool(NONCE.match(self.publisher)), f"publisher id {self.publisher!r}")
        _require(1 <= self.epoch < 1 << 63 and 1 <= self.seq < 1 << 63, f"order ({self.epoch}, {self.seq})")
        _require(self.kind in ("publish", "rollback"), f"kind {self.kind!r}")
        _require(bool(VERSION_ID.match(self.version)), f"version id {self.version!r}")
        _digest(self.fingerprint, "fingerprint")
        if self.base is not None:
            _digest(self.base, "base fingerprint")
        _require(self.payload is None or self.payload.target == self.fingerprint, "payload of another version")
        counts = (self.changed_tensors, self.total_tensors, self.payload_bytes, self.full_bytes)
        _require(all(n >= 0 for n in counts), f"negative count in {counts}")
        _require(len(self.message.encode()) <= LIMITS.message_bytes, "message too long")

    @property
    def order(self) -> tuple[int, int]:
        return (self.epoch, self.seq)


@dataclass(frozen=True, slots=True)
class Offer:
    """A further payload towards a version: the answer to workers' `Want`s. Changes nobody's target."""

    model: str
    publisher: str
    epoch: int
    payload: PayloadRef

    def __post_init__(self) -> None:
        _require(bool(MODEL_NAME.match(self.model)), f"model name {self.model!r}")
        _require(bool(NONCE.match(self.publisher)), f"publisher id {self.publisher!r}")
        _require(1 <= self.epoch < 1 << 63, f"epoch {self.epoch}")


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """Asks every worker to re-hash what its engine holds now."""

    model: str
    nonce: str
    created_at_ms: int

    def __post_init__(self) -> None:
        _require(bool(MODEL_NAME.match(self.model)), f"model name {self.model!r}")
        _require(bool(NONCE.match(self.nonce)), f"nonce {self.nonce!r}")


@dataclass(frozen=True, slots=True)
class Lease:
    """Who publishes: one store at a time."""

    publisher: str
    epoch: int
    host: str
    store: str
    pid: int

    def __str__(self) -> str:
        return f"store {self.store} on {self.host} (pid {self.pid}, epoch {self.epoch})"


@dataclass(frozen=True, slots=True)
class Serving:
    """What answers requests: a release that passed every check."""

    version: str
    epoch: int
    seq: int
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a worker did not do what a release asked."""

    code: str
    what: str
    tensor: str | None


@dataclass(frozen=True, slots=True)
class Want:
    """A worker's standing request: bytes towards `target`, from one of the versions it reports in `have`."""

    target: bytes
    lacks: tuple[bytes, ...]  # digests that bit rot took from the versions in `have`
    refused: tuple[str, ...]  # payload ids that proved unusable: don't offer these again


@dataclass(frozen=True, slots=True)
class Verified:
    """The answer to a `VerifyRequest`: every tensor that the engine holds was read back and hashed."""

    nonce: str
    ok: bool
    tensors: int
    first_bad: str | None


@dataclass(frozen=True, slots=True)
class Ack:
    """One evidence record of one worker. `fingerprint` covers all installed tensors, not only the changed ones."""

    worker: str
    model: str
    epoch: int
    seq: int
    version: str
    evidence: Evidence
    fingerprint: bytes | None  # of what the engine holds; None: nothing verified
    serving: str | None  # version id that answers requests now
    engine_build: str
    payload_bytes: int
    timings_ms: dict[str, float] = field(default_factory=dict)
    probe: bytes | None = None  # digest of the engine's outputs on its probe inputs
    failure: Failure | None = None
    verified: Verified | None = None

    @property
    def order(self) -> tuple[int, int]:
        return (self.epoch, self.seq)


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's heartbeat: everything that `refleet status` shows of it."""

    worker: str
    instance: str  # id of its state folder: tells a restarted worker from a second one with the same id
    model: str
    state: str
    serving: Serving | None
    target: str | None
    target_epoch: int
    target_seq: int
    evidence: Evidence  # for the target
    failure: Failure | None
    received_bytes: int
    expected_bytes: int
    have: tuple[bytes, ...]  # fingerprints of complete versions in its store, the served one first
    want: Want | None
    epoch: int  # highest epoch accepted: a new publisher claims above it
    refused: int  # records refused since start
    last_refusal: Failure | None
    signed: bool  # whether records must be signed by a trusted key
    engine_build: str
    heartbeat_s: float
    started_at_ms: int
