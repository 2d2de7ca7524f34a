"""Write payloads into the server within a budget of memory, and drop those that nobody needs.

Redis gives no back-pressure of its own: it takes everything until it is full, and then refuses acks too. So the
publisher counts what lies there, makes room first, waits with a message, and gives up with OverBudget.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable

from ..common import wire
from ..common.crashpoint import crash_point
from ..common.delta import Encoder, cut, plan
from ..common.digest import digest_of
from ..common.errors import DamagedTensor, OverBudget, StreamError, UnknownVersion
from ..common.limits import GIB, LIMITS
from ..common.stream import Stream
from ..common.types import Manifest, PayloadRef
from .book import Book, SentPayload, now_ms
from .fleet import Fleet, fleet

#: expiry of a payload that is being written (a crash leaves nothing behind for long), and of a finished one
_WRITING_TTL_S, _KEPT_TTL_S = 600.0, 86_400.0
#: payloads may take this share of the server's maxmemory, or this much where it has no limit
_SHARE, _UNLIMITED_BYTES = 0.8, 8 * GIB
_POLL_S = 0.1

Notify = Callable[[str], None]


class Payloads:
    """The payloads of one store in one server. `notify` gets a sentence when something takes time."""

    def __init__(self, stream: Stream, book: Book, *, budget_bytes: int | None, wait_s: float, notify: Notify):
        self._stream, self._book, self._wait_s, self._notify = stream, book, wait_s, notify
        self._budget_bytes = budget_bytes

    def over(self, book: Book) -> Payloads:
        """The same budget and server over another view of the store, for another thread."""
        return Payloads(self._stream, book, budget_bytes=self._budget_bytes, wait_s=self._wait_s, notify=self._notify)

    @property
    def budget_bytes(self) -> int:
        """Memory that payloads may take in the server."""
        if self._budget_bytes is None:
            limit = self._stream.facts().max_bytes
            self._budget_bytes = int(limit * _SHARE) if limit else _UNLIMITED_BYTES
        return self._budget_bytes

    def send(
        self,
        target: Manifest,
        base: Manifest | None,
        *,
        lacks: tuple[bytes, ...] = (),
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> PayloadRef:
        """Encode `base` -> `target` and write it; returns what to announce.

        `on_progress(sent, at most)` in bytes. Raises: OverBudget, StreamError, UnknownVersion when the store lost a
        tensor of the target. Whatever was written is removed then.
        """
        record = SentPayload(
            secrets.token_hex(16), base.fingerprint if base else None, target.fingerprint, tuple(sorted(lacks)),
            0, None, socket.gethostname(), os.getpid(), now_ms(),
        )  # fmt: skip
        self._book.save_payload(record)
        try:
            ref = self._write(record.payload_id, target, base, lacks, on_progress)
        except BaseException as error:
            self._remove(record.payload_id)
            if isinstance(error, DamagedTensor):
                raise UnknownVersion(
                    f"the store lost a tensor of the version: {error.what}",
                    about=f"store {self._book.store.root}",
                    next="publish the checkpoint again: that heals the store",
                ) from error
            raise
        self._book.save_payload(
            SentPayload(
                record.payload_id, record.base, record.target, record.lacks, ref.size_bytes, ref, record.host,
                record.pid, record.created_at_ms,
            )
        )  # fmt: skip
        self._stream.keep_payload(record.payload_id, ttl_s=_KEPT_TTL_S)
        return ref

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
        and one towards a version that a live worker is on its way to.
        """
        pursued = {
            worker.status.target.fingerprint
            for worker in now.live
            if worker.status and worker.status.target and not worker.holds(worker.status.target.fingerprint)
        }
        if now.target and not now.live:
            pursued.add(now.target.fingerprint)
        if now.target and any(not worker.holds(now.target.fingerprint) for worker in now.live):
            pursued.add(now.target.fingerprint)
        freed = 0
        for payload in self._book.payloads():
            unneeded = payload.ref is not None and payload.target not in pursued
            if unneeded or payload.abandoned:
                self._remove(payload.payload_id)
                freed += payload.size_bytes
        return freed

    def _write(
        self, payload_id: str, target: Manifest, base: Manifest | None, lacks: tuple[bytes, ...],
        on_progress: Callable[[int, int], None],
    ) -> PayloadRef:  # fmt: skip
        parts = plan(target, base, lacks=lacks)
        encoder = Encoder(self._book.store, parts, base=base, target=target)
        most = sum(part.entry.spec.size_bytes for part in parts if part.carried)
        number = sent = 0
        for chunk in encoder.chunks():
            self._put(payload_id, number, chunk, sent)
            number, sent = number + 1, sent + len(chunk)
            on_progress(sent, most)
            crash_point("publisher.sent-chunk")
        index = encoder.index()
        data = wire.pack(index)
        if len(data) > LIMITS.index_bytes:
            raise OverBudget(f"the index of {len(index.tensors)} changed tensors takes {len(data)} bytes")
        pieces = cut(data)
        for offset, piece in enumerate(pieces):
            self._put(payload_id, number + offset, piece, sent)
            sent += len(piece)
        crash_point("publisher.sent-all")
        return PayloadRef(
            payload_id, index.base, index.target, number, index.body_bytes, len(pieces), len(data), digest_of(data)
        )

    def _put(self, payload_id: str, number: int, data: memoryview, sent: int) -> None:
        """One chunk, when there is room for it; the same number is sent again until the server has it."""
        deadline = time.monotonic() + self._wait_s
        told = False
        while True:
            try:
                self._check_room(payload_id, sent, len(data))
                self._stream.put_chunk(payload_id, number, data, ttl_s=_WRITING_TTL_S)
                return
            except OverBudget as error:
                if sent + len(data) > self.budget_bytes or time.monotonic() > deadline:
                    raise
                if not told:
                    self._notify(f"waiting for room in the server: {error.what}")
                    told = True
                self.clean(fleet(self._stream))
                time.sleep(_POLL_S)

    def _check_room(self, payload_id: str, sent: int, size: int) -> None:
        others = [p for p in self._book.payloads() if p.payload_id != payload_id]
        used = sum(p.size_bytes for p in others) + sent
        if used + size > self.budget_bytes:
            raise OverBudget(
                f"payloads take {used:,} bytes in the server, {size:,} more exceed the budget of {self.budget_bytes:,}",
                about=f"payload {payload_id}, {len(others)} others",
                next="raise --budget (and the server's maxmemory), or wait until workers have caught up",
            )

    def _remove(self, payload_id: str) -> None:
        try:
            self._stream.drop_payload(payload_id)
        except StreamError:
            return  # its expiry removes it; the record goes with the next clean
        self._book.drop_payload(payload_id)
