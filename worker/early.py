"""Receive a payload while its publisher still writes it: announced, and not released yet.

Nothing that comes here is believed. It lies in a file without a name, outside of everything that the store holds, and
is looked at when a release or an offer names the payload: each chunk then passes the same check as one that is fetched,
and is fetched where it does not. What was decoded meanwhile (early_decode.py) is taken where its digest is the signed
one. Whatever goes wrong before costs these bytes and nothing else.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from ..common.crashpoint import crash_point
from ..common.errors import RefleetError, StoreBusy, StreamGap, StreamUnavailable
from ..common.layout import Bytes
from ..common.limits import LIMITS
from ..common.messages import Coming, Serving
from ..common.store import Store
from ..common.stream import Stream
from ..common.types import PayloadRef
from .early_decode import EarlyDecoder
from .turn import turn

#: one wait in the server for the next chunk; so long it may take until a newer payload is begun
_WAIT_S = 1.0
#: a payload that nothing was written to for this long has expired in the server
_SILENCE_S = 600.0
#: a replica may be behind its primary by so much
_LAG_S = 3.0
#: an index follows the body, and may be received with it; a body is never larger than the tensors in it
_SLACK_BYTES = LIMITS.index_bytes

#: hears the size of every chunk
OnBytes = Callable[[int], None]


class Arrival:
    """The chunks of one payload, received in order until the body ends, nothing comes any more, or there is no room.

    The receiving thread calls `receive`, the worker's threads all else.
    """

    def __init__(self, coming: Coming, file: Any, *, most_bytes: int, decoder: EarlyDecoder | None):
        """`file` is open for reading and writing without a buffer, and is closed by this object; `decoder` hears of
        every chunk.
        """
        self.coming, self._decoder = coming, decoder
        self._file, self._most_bytes = file, most_bytes
        self._changed = threading.Condition()
        self._chunks = self._last_bytes = 0
        self._until: int | None = None  # chunks of the body, once that is known
        self._silence_s = _SILENCE_S
        self._begun = self._stopped = self._ended = False

    @property
    def chunks(self) -> int:
        """How many are here."""
        with self._changed:
            return self._chunks

    def named(self, ref: PayloadRef) -> None:
        """All of the payload is in the server now: what does not come soon never will."""
        with self._changed:
            self._until, self._silence_s = ref.body_chunks, _LAG_S

    @property
    def names(self) -> frozenset[str]:
        """The tensors that were decoded, wholly or in part. For when nothing comes any more."""
        return self._decoder.names if self._decoder and self._ended else frozenset()

    def decoded(self) -> dict[bytes, Bytes]:
        """Tensors that were decoded as they came, by their digest. Waits for those that are still coming."""
        if self._decoder is None:
            return {}
        with self._changed:
            self._changed.wait_for(lambda: self._ended)
        return self._decoder.found

    def read(self, number: int, into: memoryview) -> int | None:
        """Put chunk `number` into the start of `into`; returns its size in bytes, None where it is not here.

        Waits while it may still come. Nothing was checked.
        """
        with self._changed:
            self._changed.wait_for(lambda: number < self._chunks or self._ended)
            if number >= self._chunks:
                return None
            size = self._last_bytes if number == self._chunks - 1 else self.coming.chunk_bytes
        try:
            got = os.preadv(self._file.fileno(), [into[:size]], number * self.coming.chunk_bytes)
        except OSError:
            return None
        return size if got == size else None

    def close(self) -> None:
        """Forget everything; the thread ends soon."""
        with self._changed:
            self._stopped = True
            if self._ended or not self._begun:
                self._ended = True
                self._file.close()

    # ------------------------------------------------------------------ the receiving thread

    def receive(self, stream: Stream, on_bytes: OnBytes) -> None:
        """Returns when there is nothing more to receive, whatever the reason."""
        with self._changed:
            if self._stopped:
                return
            self._begun = True
        try:
            self._receive(stream, on_bytes)
        except (RefleetError, OSError):
            pass  # what is missing is fetched when the payload is released, and what is wrong is said then
        finally:
            with self._changed:
                self._ended = True
                if self._stopped:
                    self._file.close()
                self._changed.notify_all()

    def _receive(self, stream: Stream, on_bytes: OnBytes) -> None:
        coming, chunk_bytes = self.coming, self.coming.chunk_bytes
        buffer = np.empty(chunk_bytes, np.uint8).data
        heard_s = time.monotonic()
        with stream.payload_reader(coming.payload_id, carrier=coming.carrier) as reader:
            while self._wanted():
                try:
                    size = reader.read(self._chunks, buffer, wait_s=_WAIT_S)
                except StreamGap:
                    if time.monotonic() - heard_s > self._silence_s:
                        return
                    continue
                if self._stopped:
                    return
                heard_s = time.monotonic()
                self._write(buffer[:size])
                on_bytes(size)
                if self._decoder:
                    self._decoder.feed(buffer[:size])
                crash_point("worker.received-early")
                if size < chunk_bytes:  # the last one of the body
                    return

    def _wanted(self) -> bool:
        have, one = self._chunks * self.coming.chunk_bytes, self.coming.chunk_bytes
        enough = self._until is not None and self._chunks >= self._until
        if self._stopped or enough or have + one > self._most_bytes:
            return False
        disk = os.fstatvfs(self._file.fileno())
        # all of it is written a second time when it is staged: that room is not ours
        return disk.f_bavail * disk.f_frsize >= have + 2 * one

    def _write(self, chunk: memoryview) -> None:
        at, rest = self._chunks * self.coming.chunk_bytes, chunk
        while rest:
            written = os.pwrite(self._file.fileno(), rest, at)
            at, rest = at + written, rest[written:]
        with self._changed:
            self._chunks, self._last_bytes = self._chunks + 1, len(chunk)
            self._changed.notify_all()


class Early:
    """At most one payload that was announced and not released yet. `on_bytes` is called by a thread of its own.

    Workers that share a store receive it once: whoever is first does it, and stages it for all. Everything but the
    thread is the worker's one thread.
    """

    def __init__(self, stream: Stream, store: Store, *, on_bytes: OnBytes):
        self._stream, self._store, self._on_bytes = stream, store, on_bytes
        self._arrival: Arrival | None = None
        self._likely: frozenset[str] | None = None  # tensors of the payload before
        self._elsewhere = ""  # the payload that another worker of this host receives
        self._held = ExitStack()  # the lock against them
        self._wake = threading.Condition()
        self._next: Arrival | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def expect(self, coming: Coming, serving: Serving | None) -> None:
        """Begin to receive this payload instead of an earlier one, if it builds on what is served here.

        One that builds on nothing is for workers that serve nothing.
        """
        if coming.base != (serving.fingerprint if serving else None):
            return
        if self._arrival and self._arrival.coming.payload_id == coming.payload_id:
            return
        self.drop()
        # the version before the base: its buffers take what comes, here or in another worker of this host
        self._store.memory.trim()
        try:
            most_bytes = self._most_bytes(coming.base)
            self._held.enter_context(self._store.shared_lock("early", holder=f"payload {coming.payload_id}"))
            # without a name: kill -9 leaves nothing behind
            file = tempfile.TemporaryFile(dir=self._store.root / "temp", buffering=0)  # noqa: SIM115 - Arrival closes it
        except StoreBusy:
            self._elsewhere = coming.payload_id
            return
        except (RefleetError, OSError):
            self._held.close()
            return
        decoder = None
        if coming.base is not None:
            decoder = EarlyDecoder(self._store.manifest(coming.base), self._store, likely=self._likely)
        self._arrival = Arrival(coming, file, most_bytes=most_bytes, decoder=decoder)
        with self._wake:
            self._next = self._arrival
            self._wake.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="refleet-early", daemon=True)
            self._thread.start()

    @contextmanager
    def of(self, ref: PayloadRef, *, stopping: Callable[[], bool]) -> Iterator[Arrival | None]:
        """What came of the payload that a release or an offer names, during the block in which it is staged; then
        it is forgotten. Only if the server is away it is kept for the next try.

        Waits where another worker of this host has it. Raises: StreamGap when the worker has to stop.
        """
        arrival = self._arrival
        if arrival is None or arrival.coming.payload_id != ref.payload_id or not arrival.chunks:
            self.drop()
            with ExitStack() as held:
                if self._elsewhere == ref.payload_id:
                    held.enter_context(turn(self._store, "early", stopping=stopping))
                yield None
            return
        arrival.named(ref)
        try:
            yield arrival
        except StreamUnavailable:
            raise
        except BaseException:
            self.drop()
            raise
        self.drop()

    def drop(self, *, but: PayloadRef | None = None) -> None:
        """Forget what came, unless it is of the payload `but`."""
        if self._arrival and but and self._arrival.coming.payload_id == but.payload_id:
            return
        if self._arrival:
            self._likely = self._arrival.names or self._likely
            self._arrival.close()
            self._arrival = None
        self._held.close()

    def close(self) -> None:
        """End the thread; the stream was closed before, so that it waits for nothing."""
        self.drop()
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread:
            self._thread.join()

    def _most_bytes(self, base: bytes | None) -> int:
        """Whoever may write to the server could write for ever. Raises: UnknownVersion."""
        if base is None:
            return LIMITS.tensor_bytes  # how large the model is nobody knows yet: the disk decides
        return 2 * self._store.manifest(base).size_bytes + _SLACK_BYTES

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._next)
                if self._closed:
                    return
                arrival, self._next = self._next, None
            if arrival:
                arrival.receive(self._stream, self._on_bytes)
