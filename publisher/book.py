"""The publisher's records in its store: versions, releases, payloads, and its place in the log.

publisher                     the epoch claimed last
version-<id>                  what the id means, for ever: an id is never given to other content
release-<epoch>-<seq>         the exact signed bytes, written before the server sees them
payload-<id>                  what lies in the server for workers to fetch
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, replace

from ..common import wire
from ..common.errors import MalformedRecord, UnknownVersion, UsageError
from ..common.limits import LIMITS
from ..common.messages import Release, Serving
from ..common.signing import open_envelope
from ..common.store import Store
from ..common.types import VERSION_ID, Manifest, PayloadRef

STATE = "publisher"


@wire.record("publisher-state")
@dataclass(frozen=True, slots=True)
class PublisherState:
    epoch: int


@wire.record("version")
@dataclass(frozen=True, slots=True)
class Version:
    """What a version id stands for."""

    version: str
    fingerprint: bytes
    created_at_ms: int
    message: str
    source: str


@wire.record("sent-payload")
@dataclass(frozen=True, slots=True)
class SentPayload:
    """A payload in the server. Without `ref` it is being written by process `pid` on `host`."""

    payload_id: str
    base: bytes | None
    target: bytes
    lacks: tuple[bytes, ...]
    size_bytes: int
    ref: PayloadRef | None
    host: str
    pid: int
    created_at_ms: int

    @property
    def need(self) -> tuple[bytes | None, bytes, tuple[bytes, ...]]:
        return (self.base, self.target, self.lacks)

    def given_up(self) -> SentPayload:
        """The same as nobody's: its writer lives, and will not finish it."""
        return replace(self, host="", created_at_ms=0)

    @property
    def abandoned(self) -> bool:
        """Half written by a process that is no more."""
        if self.ref is not None:
            return False
        if self.host != socket.gethostname():
            return now_ms() - self.created_at_ms > 3_600_000
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


def check_words(version: str | None, message: str) -> None:
    """What an operator calls a version, and says of it. Raises: UsageError."""
    if version is not None and not VERSION_ID.match(version):
        raise UsageError(
            f"version id {version!r} is not [A-Za-z0-9][A-Za-z0-9._-]{{0,63}}",
            next="choose another --version, or none: the next free v<n> is taken",
        )
    if len(message.encode()) > LIMITS.message_bytes:
        raise UsageError(f"the message takes more than {LIMITS.message_bytes} bytes")


def now_ms() -> int:
    return int(time.time() * 1000)


class Book:
    """Reads and writes these records; the caller holds the store's locks where order matters."""

    def __init__(self, store: Store):
        self.store = store

    def state(self) -> PublisherState:
        data = self.store.record(STATE)
        return wire.unpack(data, PublisherState) if data else PublisherState(0)

    def save_state(self, state: PublisherState) -> None:
        self.store.put_record(STATE, wire.pack(state))

    # ------------------------------------------------------------------ versions

    def version(self, version_id: str) -> Version | None:
        data = self.store.record(f"version-{version_id}")
        return wire.unpack(data, Version) if data else None

    def versions(self) -> list[Version]:
        """All versions ever named here, oldest first."""
        found = [self.version(name.removeprefix("version-")) for name in self.store.records("version-")]
        return sorted((v for v in found if v), key=lambda v: v.created_at_ms)

    def manifest_of(self, version_id: str) -> Manifest:
        """The manifest of a version whose tensors are all here. Raises: UnknownVersion, saying what there is."""
        version = self.version(version_id)
        known = [v.version for v in self.versions()]
        if version is None:
            raise UnknownVersion(
                f"there is no version {version_id!r}",
                about=f"store {self.store.root}",
                next=f"versions here: {', '.join(known[-10:]) or 'none'}",
            )
        kept = set(self.store.manifests())
        if version.fingerprint not in kept:
            still = [v.version for v in self.versions() if v.fingerprint in kept]
            raise UnknownVersion(
                f"version {version_id!r} is past retention: its tensors are no longer in the store",
                about=f"store {self.store.root}",
                next=f"still here: {', '.join(still[-10:]) or 'none'}; keep more with --keep",
            )
        return self.store.manifest(version.fingerprint)

    # ------------------------------------------------------------------ releases

    def releases(self) -> list[Release]:
        """All releases of this store, oldest first."""
        return [self._release(name) for name in self.store.records("release-")]

    def head(self) -> Release | None:
        """The last release: the fleet's target as this store knows it."""
        names = self.store.records("release-")
        return self._release(names[-1]) if names else None

    def made(self, goal: Serving) -> bool:
        """Whether a release of this store led a worker to this."""
        name = _release_name(goal.epoch, goal.seq)
        if self.store.record(name) is None:
            return False
        release = self._release(name)
        return (release.version, release.fingerprint) == (goal.version, goal.fingerprint)

    def release_bytes(self, release: Release) -> bytes:
        data = self.store.record(_release_name(release.epoch, release.seq))
        assert data is not None, "a release of this store"
        return data

    def save_release(self, release: Release, data: bytes, version: Version | None) -> None:
        """The release, and before it what its version id means, if that is new. Durable when this returns."""
        records = {f"version-{version.version}": wire.pack(version)} if version else {}
        self.store.put_records(records | {_release_name(release.epoch, release.seq): data})

    def drop_release(self, release: Release, *, version: bool) -> None:
        """It never was; nor was its version id, where that was new (`version`)."""
        self.store.drop_record(_release_name(release.epoch, release.seq))
        if version:
            self.store.drop_record(f"version-{release.version}")

    def _release(self, name: str) -> Release:
        data = self.store.record(name)
        assert data is not None, f"listed record {name} vanished"
        return wire.unpack(open_envelope(data, None).payload, Release)

    # ------------------------------------------------------------------ payloads

    def payloads(self) -> list[SentPayload]:
        """Everything that may lie in the server, by id. Another process may drop one in the meantime."""
        found = (self._payload(name) for name in self.store.records("payload-"))
        return [payload for payload in found if payload]

    def _payload(self, name: str) -> SentPayload | None:
        try:
            data = self.store.record(name)
            return wire.unpack(data, SentPayload) if data else None
        except MalformedRecord:  # torn by a power cut: by now the payload has expired in the server, or will
            self.store.drop_record(name, sync=False)
            return None

    def save_payload(self, payload: SentPayload) -> None:
        """Survives this process, not a power cut: what the server holds expires by itself."""
        self.store.put_record(f"payload-{payload.payload_id}", wire.pack(payload), sync=False)

    def drop_payload(self, payload_id: str) -> None:
        self.store.drop_record(f"payload-{payload_id}", sync=False)


def _release_name(epoch: int, seq: int) -> str:
    return f"release-{epoch:020d}-{seq:020d}"
