"""Who is there and what they serve: heartbeats and the log -> one picture of the fleet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..common import wire
from ..common.errors import ProtocolError
from ..common.messages import Evidence, Release, WorkerStatus
from ..common.signing import Trust, open_envelope
from ..common.stream import Member, Stream
from ..common.types import Manifest

#: heartbeats that a worker may miss before it counts as silent, and the least time that takes
_MISSED_BEATS, _SILENT_S = 3, 3.0
SILENT = "SILENT"
_REMEMBERED_BYTES = 8192


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the fleet sees it. `seen_s`: seconds since its last heartbeat, by the server's clock."""

    id: str
    status: WorkerStatus | None  # None: it left nothing readable behind
    seen_s: float | None
    lag: int | None  # releases behind the target; None: it serves nothing, or nothing comparable

    @property
    def live(self) -> bool:
        if self.status is None or self.seen_s is None or self.status.state == "STOPPED":
            return False
        return self.seen_s <= max(_MISSED_BEATS * self.status.heartbeat_s, _SILENT_S)

    @property
    def state(self) -> str:
        if self.status is None:
            return SILENT
        return self.status.state if self.live or self.status.state == "STOPPED" else SILENT

    @property
    def evidence(self) -> Evidence:
        return self.status.evidence if self.status else Evidence.NONE

    def holds(self, fingerprint: bytes) -> bool:
        """Whether the worker can stage this version without a byte from the network."""
        status = self.status
        return status is not None and fingerprint in status.have and not (status.want and status.want.lacks)

    def to_dict(self) -> dict[str, object]:
        """Stable keys of `refleet status --json`."""
        status = self.status
        serving, failure = (status.serving, status.failure) if status else (None, None)
        return {
            "id": self.id,
            "state": self.state,
            "serving": serving.version if serving else None,
            "fingerprint": serving.fingerprint.hex() if serving else None,
            "evidence": self.evidence.name,
            "lag": self.lag,
            "error": {"code": failure.code, "what": failure.what, "tensor": failure.tensor} if failure else None,
            "seen_s": None if self.seen_s is None else round(self.seen_s, 3),
            "target": status.target.version if status and status.target else None,
            "received_bytes": status.received_bytes if status else 0,
            "expected_bytes": status.expected_bytes if status else 0,
            "refused_records": status.refused if status else 0,
            "last_refusal": status.last_refusal.what if status and status.last_refusal else None,
            "signed": status.signed if status else None,
            "engine": status.engine_build if status else None,
        }


@dataclass(frozen=True, slots=True)
class Fleet:
    """The target and everybody who was ever there and did not leave."""

    model: str
    target: Release | None
    workers: tuple[WorkerView, ...]

    @property
    def live(self) -> list[WorkerView]:
        return [worker for worker in self.workers if worker.live]

    def wants(self, manifest: Manifest, before: Manifest | None) -> bool:
        """Whether anybody may lack `manifest`, where `before` was the target: no worker may be here yet."""
        unchanged = before is not None and before.fingerprint == manifest.fingerprint
        return not unchanged and not (self.live and all(worker.holds(manifest.fingerprint) for worker in self.live))

    def to_dict(self) -> dict[str, object]:
        """Stable keys of `refleet status --json`."""
        target = self.target
        return {
            "model": self.model,
            "target": None
            if target is None
            else {
                "version": target.version,
                "epoch": target.epoch,
                "seq": target.seq,
                "fingerprint": target.fingerprint.hex(),
            },
            "workers": [worker.to_dict() for worker in self.workers],
        }


def newest_release(stream: Stream, *, trust: Trust | None = None) -> Release | None:
    """The last readable release in the log; records that are no release of this model are passed over."""
    for count in (1, 64):  # nearly always the last record is one
        for log_id, data in reversed(stream.history(count)):
            try:
                release = wire.unpack(open_envelope(data, trust).payload, Release)
            except ProtocolError:
                continue
            if release.order == log_id and release.model == stream.model:
                return release
    return None


def fleet(stream: Stream, *, trust: Trust | None = None) -> Fleet:
    """The fleet now. Raises: StreamError."""
    target = newest_release(stream, trust=trust)
    workers = tuple(view(member, target) for member in stream.members())
    return Fleet(stream.model, target, workers)


def view(member: Member, target: Release | None) -> WorkerView:
    """One member against the target."""
    status, lag = _status(member.status), None
    if target is not None and status is not None and status.serving is not None:
        lag = max(target.seq - status.serving.seq, 0)
    return WorkerView(member.worker, status, member.seen_s, lag)


def _status(data: bytes | None) -> WorkerStatus | None:
    """None for what is not a worker's, or another version of refleet's: it is shown as silent."""
    if data is None:
        return None
    try:
        return _unpacked(data) if len(data) <= _REMEMBERED_BYTES else wire.unpack(data, WorkerStatus)
    except ProtocolError:
        return None


@lru_cache(4096)
def _unpacked(data: bytes) -> WorkerStatus:
    """A worker to which nothing happens says the same again and again, and is read five times a second."""
    return wire.unpack(data, WorkerStatus)
