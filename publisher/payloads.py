"""Write payloads into the server within a budget of memory, and drop those that nobody needs.

Redis gives no back-pressure of its own: it takes everything until it is full, and then refuses acks too. So the
publisher counts what lies there, makes room first, waits with a message, and gives up with OverBudget.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from ..common import wire
from ..common.crashpoint import crash_point
from ..common.delta import Encoder, Input, Part, as_bytes, cut, plan
from ..common.digest import digest_of
from ..common.errors import DamagedTensor, OverBudget, StoreError, StreamError, UnknownVersion
from ..common.layout import in_body_order
from ..common.limits import GIB, LIMITS
from ..common.messages import Coming
from ..common.signing import SigningKey, seal
from ..common.store import Store
from ..common.stream import Stream
from ..common.threads import ahead
from ..common.types import Index, Manifest, PayloadRef
from .book import Book, SentPayload, now_ms
from .claim import LEASE_S, Claim
from .fleet import Fleet, fleet

#: expiry of a payload that is being written (a crash leaves nothing behind for long), and of a finished one
_WRITING_TTL_S, _KEPT_TTL_S = 600.0, 86_400.0
#: payloads may take this share of the server's maxmemory, or this much where it has no limit
_SHARE, _UNLIMITED_BYTES = 0.8, 8 * GIB
_POLL_S = 0.1
_UNKNOWN = bytes(32)  # the target of a payload whose last tensor was not read yet

Notify = Callable[[str], None]
#: told of a payload before its first chunk is written: its id, its base, its carrier
Announce = Callable[[str, bytes | None, str], None]


def announcing(claim: Claim, key: SigningKey | None) -> Announce:
    """Tells workers that a payload begins, so that those who hold its base receive it while it is written.

    What it raises: StaleEpoch, PublisherBusy. The server's errors are let go: this only saves time.
    """

    def announce(payload_id: str, base: bytes | None, carrier: str) -> None:
        with suppress(StreamError):
            lease = claim.renew()
            coming = Coming(
                claim.stream.model, claim.store.id, lease.epoch, payload_id, base, carrier, LIMITS.chunk_bytes
            )
            claim.stream.offer(lease, seal(wire.pack(coming), key), ttl_s=LEASE_S)

    return announce


class Payloads:
    """The payloads of one store in one server. `notify` gets a sentence when something takes time."""

    def __init__(
        self, stream: Stream, book: Book, *, budget_bytes: int | None, wait_s: float, notify: Notify, announce: Announce
    ):
        self._stream, self._book, self._wait_s, self._notify = stream, book, wait_s, notify
        self._budget_bytes, self.announce = budget_bytes, announce

    def over(self, book: Book) -> Payloads:
        """The same budget and server over another view of the store, for another thread."""
        return Payloads(
            self._stream, book, budget_bytes=self._budget_bytes, wait_s=self._wait_s, notify=self._notify,
            announce=self.announce,
        )  # fmt: skip

    @property
    def budget_bytes(self) -> int:
        """Memory that payloads may take in the server."""
        if self._budget_bytes is None:
            limit = self._stream.payload_facts().max_bytes
            self._budget_bytes = int(limit * _SHARE) if limit else _UNLIMITED_BYTES
        return self._budget_bytes

    @contextmanager
    def outgoing(self, base: Manifest | None, *, lacks: tuple[bytes, ...] = ()) -> Iterator[Outgoing]:
        """A payload in the making; whatever was written of it is removed unless the block ends with `finish`.

        Raises: OverBudget, StreamError.
        """
        out = Outgoing(self, base.fingerprint if base else None, lacks, self._stream.carrier())
        self._book.save_payload(out.record)
        try:
            yield out
        finally:
            if out.ref is None and not self.remove(out.payload_id):
                with suppress(StoreError):
                    self._book.save_payload(out.record.given_up())

    def send(
        self,
        target: Manifest,
        base: Manifest | None,
        *,
        lacks: tuple[bytes, ...] = (),
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> PayloadRef:
        """Encode `base` -> `target` out of the store and write it; returns what to announce.

        `on_progress(sent, at most)` in bytes. Raises: OverBudget, StreamError, UnknownVersion when the store lost a
        tensor of the target. Whatever was written is removed then.
        """
        parts = without_rotten_bases(plan(target, base, lacks=lacks), self._book.store)
        most = sum(part.tensor.spec.size_bytes for part in parts if part.tensor.carried)
        store, both = self._book.store, target.digests | (base.digests if base else frozenset())
        with store.memory.pinned(both), self.outgoing(base, lacks=lacks) as out:
            store.load(both)
            encoder = Encoder(inputs(parts, store, base))
            try:
                for chunk in ahead(encoder.chunks(), depth=2):
                    out.put(chunk)
                    on_progress(out.sent_bytes, most)
            except DamagedTensor as error:
                raise UnknownVersion(
                    f"the store lost a tensor of the version: {error.what}",
                    about=f"store {self._book.store.root}",
                    next="publish the checkpoint again: that heals the store",
                ) from error
            return out.finish(encoder.index([part.tensor for part in parts], target=target, base=base))

    def find(
        self, need: tuple[bytes | None, bytes, tuple[bytes, ...]], *, refused: frozenset[str]
    ) -> PayloadRef | None:
        """A finished payload for this need that is still whole in the server and was not refused."""
        for payload in self._book.payloads():
            ref = payload.ref
            if ref is None or payload.need != need or payload.payload_id in refused:
                continue
            if self._stream.payload_chunks(payload.payload_id) == ref.body_chunks + ref.index_chunks:
                return ref
        return None

    def clean(self, now: Fleet) -> int:
        """Drop what nobody needs; returns the bytes freed.

        Needed is a payload towards the target as long as a live worker lacks the target or no worker is there at all,
        and one towards a version that a live worker is on its way to. The target is what the log says, and what it is
        going to say: a release of this store that the server did not take yet.
        """
        pursued = {
            worker.status.target.fingerprint
            for worker in now.live
            if worker.status and worker.status.target and not worker.holds(worker.status.target.fingerprint)
        }
        for target in {release.fingerprint for release in (now.target, self._book.head()) if release}:
            if not now.live or not all(worker.holds(target) for worker in now.live):
                pursued.add(target)
        freed = 0
        for payload in self._book.payloads():
            unneeded = payload.ref is not None and payload.target not in pursued
            if unneeded or payload.abandoned:
                self.remove(payload.payload_id)
                freed += payload.size_bytes
        return freed

    def put(self, payload_id: str, number: int, data: memoryview, sent: int, *, carrier: str) -> None:
        """One chunk, when there is room for it; the same number is sent again until the server has it."""
        deadline = time.monotonic() + self._wait_s
        told = False
        while True:
            try:
                self._check_room(payload_id, sent, len(data))
                self._stream.put_chunk(payload_id, number, data, ttl_s=_WRITING_TTL_S, carrier=carrier)
                return
            except OverBudget as error:
                if sent + len(data) > self.budget_bytes or time.monotonic() > deadline:
                    raise
                if not told:
                    self._notify(f"waiting for room in the server: {error.what}")
                    told = True
                self.clean(fleet(self._stream))
                time.sleep(_POLL_S)

    def finished(self, record: SentPayload) -> None:
        """Known to be whole from now on."""
        self._book.save_payload(record)
        self._stream.keep_payload(record.payload_id, ttl_s=_KEPT_TTL_S)

    def _check_room(self, payload_id: str, sent: int, size: int) -> None:
        others = [p for p in self._book.payloads() if p.payload_id != payload_id]
        used = sum(p.size_bytes for p in others) + sent
        if used + size > self.budget_bytes:
            raise OverBudget(
                f"payloads take {used:,} bytes in the server, {size:,} more exceed the budget of {self.budget_bytes:,}",
                about=f"payload {payload_id}, {len(others)} others",
                next="raise --budget (and the server's maxmemory), or wait until workers have caught up",
            )

    def remove(self, payload_id: str) -> bool:
        """False when the server is away: its expiry removes it, and the record goes with the next clean."""
        try:
            self._stream.drop_payload(payload_id)
        except StreamError:
            return False
        self._book.drop_payload(payload_id)
        return True


class Outgoing:
    """One payload on its way into the server. Made by `Payloads.outgoing`; used by one thread."""

    def __init__(self, payloads: Payloads, base: bytes | None, lacks: tuple[bytes, ...], carrier: str):
        self.payload_id = secrets.token_hex(16)
        self.ref: PayloadRef | None = None  # once it is whole
        self.sent_bytes = 0
        self._payloads, self._carrier, self._number = payloads, carrier, 0
        #: what the store knows of it while it is written: where it leads is known at the end
        self.record = SentPayload(
            self.payload_id, base, _UNKNOWN, tuple(sorted(lacks)), 0, None, socket.gethostname(), os.getpid(), now_ms()
        )

    def put(self, chunk: memoryview) -> None:
        """The next chunk of the body. Raises: OverBudget, StreamError, StaleEpoch."""
        if self._number == 0:
            self._payloads.announce(self.payload_id, self.record.base, self._carrier)
        self._put(chunk)
        crash_point("publisher.sent-chunk")

    def finish(self, index: Index) -> PayloadRef:
        """The index behind the body; returns what to announce. Raises: OverBudget, StreamError."""
        data = wire.pack(index)
        if len(data) > LIMITS.index_bytes:
            raise OverBudget(f"the index of {len(index.tensors)} changed tensors takes {len(data)} bytes")
        body_chunks, pieces = self._number, cut(data)
        for piece in pieces:
            self._put(piece)
        crash_point("publisher.sent-all")
        ref = PayloadRef(
            self.payload_id, index.base, index.target, body_chunks, index.body_bytes, len(pieces), len(data),
            digest_of(data), self._carrier,
        )  # fmt: skip
        self._payloads.finished(replace(self.record, target=index.target, size_bytes=ref.size_bytes, ref=ref))
        self.ref = ref
        return ref

    def _put(self, data: memoryview) -> None:
        self._payloads.put(self.payload_id, self._number, data, self.sent_bytes, carrier=self._carrier)
        self._number, self.sent_bytes = self._number + 1, self.sent_bytes + len(data)


def without_rotten_bases(parts: list[Part], store: Store) -> list[Part]:
    """The same parts; a tensor whose base bit rot got at travels whole: receivers' copies are their own."""
    sound = []
    for part in parts:
        if part.base is not None:
            try:
                store.read(part.base, verify=True)
            except DamagedTensor:
                store.forget(part.base)
                part = Part(replace(part.tensor, based=False), None)
        sound.append(part)
    return sound


def inputs(parts: list[Part], store: Store, base: Manifest | None) -> Iterator[Input]:
    """The carried tensors of `parts` out of the store, in body order. Raises: DamagedTensor for one of the target."""
    bases = {part.tensor.spec.name: part.base for part in parts}
    numbers = {name: number for number, name in enumerate(base.by_name if base else ())}
    for tensor in in_body_order(part.tensor for part in parts):
        digest, new = bases[tensor.spec.name], as_bytes(store.read(tensor.digest, verify=True))
        before = None if digest is None else as_bytes(store.read(digest, verify=False))
        yield Input(tensor.spec.dtype, new, before, numbers.get(tensor.spec.name, 0))
