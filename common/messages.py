"""What publisher and workers say to each other, and keep: releases, offers, acks, status, as frozen dataclasses.

Times are milliseconds since the epoch and only shown; nothing is decided by comparing clocks of two machines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from .limits import LIMITS
from .types import (
    BLOBS,
    MODEL_NAME,
    NONCE,
    PAYLOAD_ID,
    STREAM,
    VERSION_ID,
    WORKER_ID,
    PayloadRef,
    require,
    require_counts,
    require_digest,
    require_order,
    require_time,
)


class Evidence(IntEnum):
    """What an ack may claim; each step includes the ones before it."""

    NONE = 0
    RECEIVED = 1
    STAGED = 2
    REFITTED = 3
    PROBED = 4
    SERVING = 5


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
    restructure: bool  # names, dtypes or shapes may differ from the release before it

    def __post_init__(self) -> None:
        require(bool(MODEL_NAME.match(self.model)), f"model name {self.model!r}")
        require(bool(NONCE.match(self.publisher)), f"publisher id {self.publisher!r}")
        require_order(self.epoch, self.seq, first=1)
        require(self.kind in ("publish", "rollback"), f"kind {self.kind!r}")
        require(bool(VERSION_ID.match(self.version)), f"version id {self.version!r}")
        require_digest(self.fingerprint, "fingerprint")
        require_digest(self.base, "base fingerprint")
        require(self.payload is None or self.payload.target == self.fingerprint, "payload of another version")
        require_counts(self.changed_tensors, self.total_tensors, self.payload_bytes, self.full_bytes)
        require_time(self.created_at_ms)
        require(len(self.message.encode()) <= LIMITS.message_bytes, "message too long")

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
        require(bool(MODEL_NAME.match(self.model)), f"model name {self.model!r}")
        require(bool(NONCE.match(self.publisher)), f"publisher id {self.publisher!r}")
        require(1 <= self.epoch < 1 << 63, f"epoch {self.epoch}")


@dataclass(frozen=True, slots=True)
class Coming:
    """A payload is being written from now on: whoever holds its base may receive it before it is released.

    It promises nothing: what the payload leads to is known with its release or offer, which may never come.
    """

    model: str
    publisher: str
    epoch: int
    payload_id: str
    base: bytes | None  # fingerprint of the base version; None: a full snapshot
    carrier: str
    chunk_bytes: int  # of every chunk of its body but the last

    def __post_init__(self) -> None:
        require(bool(MODEL_NAME.match(self.model)), f"model name {self.model!r}")
        require(bool(NONCE.match(self.publisher)), f"publisher id {self.publisher!r}")
        require(1 <= self.epoch < 1 << 63, f"epoch {self.epoch}")
        require(bool(PAYLOAD_ID.match(self.payload_id)), f"payload id {self.payload_id!r}")
        require_digest(self.base, "base fingerprint")
        require(self.carrier in (STREAM, BLOBS), f"carrier {self.carrier[:40]!r}")
        require(1 <= self.chunk_bytes <= LIMITS.chunk_bytes_max, f"chunk size {self.chunk_bytes}")


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """Asks every worker to re-hash what its engine holds now."""

    model: str
    nonce: str
    created_at_ms: int
    deep: bool  # also a proof of all content, and the engine as a whole, in its own serialized form

    def __post_init__(self) -> None:
        require(bool(MODEL_NAME.match(self.model)), f"model name {self.model!r}")
        require(bool(NONCE.match(self.nonce)), f"nonce {self.nonce!r}")
        require_time(self.created_at_ms)


@dataclass(frozen=True, slots=True)
class Lease:
    """Who publishes: one store at a time."""

    publisher: str
    epoch: int
    host: str
    store: str
    pid: int

    def __post_init__(self) -> None:
        require_order(self.epoch, 0)

    def __str__(self) -> str:
        return f"store {self.store} on {self.host} (pid {self.pid}, epoch {self.epoch})"


@dataclass(frozen=True, slots=True)
class Serving:
    """A release as a worker names it: what answers requests now, or what it is on its way to."""

    version: str
    epoch: int
    seq: int
    fingerprint: bytes

    def __post_init__(self) -> None:
        require(bool(VERSION_ID.match(self.version)), f"version id {self.version!r}")
        require_order(self.epoch, self.seq)
        require_digest(self.fingerprint, "fingerprint")

    @property
    def id(self) -> str:
        return self.version

    @property
    def order(self) -> tuple[int, int]:
        return (self.epoch, self.seq)


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

    def __post_init__(self) -> None:
        require_digest(self.target, "target fingerprint")
        require(len(self.lacks) <= LIMITS.lacking, f"{len(self.lacks)} lacking tensors")
        for digest in self.lacks:
            require_digest(digest, "digest of a tensor")
        require(all(PAYLOAD_ID.match(refused) for refused in self.refused), "payload id among the refused ones")


@dataclass(frozen=True, slots=True)
class Verified:
    """The answer to a `VerifyRequest`: every tensor that the engine holds was read back and hashed."""

    nonce: str
    ok: bool
    tensors: int
    first_bad: str | None
    engine: bytes | None  # digest of what the engine as a whole holds; only in the answer to a deep request
    note: str  # why a deep answer has no `engine`, or ""
    proof: bytes | None  # `digest.proof_of` what was read back; only in the answer to a deep request

    def __post_init__(self) -> None:
        require(bool(NONCE.match(self.nonce)), f"nonce {self.nonce!r}")
        require_counts(self.tensors)
        require_digest(self.engine, "engine digest")
        require_digest(self.proof, "proof")
        require(len(self.note.encode()) <= LIMITS.message_bytes, "note too long")


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
    applied: str = ""  # how the engine took the version and why that way, in words; "" where there is only one way

    def __post_init__(self) -> None:
        require(bool(WORKER_ID.match(self.worker)), f"worker id {self.worker!r}")
        require(bool(MODEL_NAME.match(self.model)), f"model name {self.model!r}")
        require_order(self.epoch, self.seq)
        unreleased = self.version == "" and self.order == (0, 0)  # asked to verify before anything was released
        require(unreleased or bool(VERSION_ID.match(self.version)), f"version id {self.version!r}")
        require_digest(self.fingerprint, "fingerprint")
        require(self.serving is None or bool(VERSION_ID.match(self.serving)), f"version id {self.serving!r}")
        require_counts(self.payload_bytes)
        require_digest(self.probe, "probe digest")
        require(len(self.applied.encode()) <= LIMITS.message_bytes, "account of the apply too long")

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
    target: Serving | None  # the release it pursues or has reached
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

    def __post_init__(self) -> None:
        require(bool(WORKER_ID.match(self.worker)), f"worker id {self.worker!r}")
        require(bool(MODEL_NAME.match(self.model)), f"model name {self.model!r}")
        require_counts(self.received_bytes, self.expected_bytes, self.refused)
        require(len(self.have) <= LIMITS.held_versions, f"{len(self.have)} held versions")
        for fingerprint in self.have:
            require_digest(fingerprint, "fingerprint of a held version")
        require_order(self.epoch, 0)
        # it decides how long silence is news: never for ever
        require(0 < self.heartbeat_s <= 86400, f"heartbeat every {self.heartbeat_s} s")
        require_time(self.started_at_ms)
