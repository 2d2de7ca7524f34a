"""What a publisher does as long as it lives: hold the lease, answer workers' wants, heal the log, drop payloads.

Wants are read off the heartbeats: a standing request that is shown until it is met can't get lost, whatever the server
forgets. Any number of processes on one store may answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ..common import wire
from ..common.errors import RefleetError, StaleEpoch, StoreBusy, StreamError
from ..common.messages import Offer, Want
from ..common.signing import SigningKey, seal
from ..common.store import Store
from ..common.types import Manifest, PayloadRef
from .book import Book
from .claim import LEASE_S, Claim
from .fleet import WorkerView, fleet
from .payloads import Payloads

_POLL_S = 0.2
_UPKEEP_S = 1.0
#: an offer is repeated after this long while somebody still wants it: the control stream may have been lost
_OFFER_AGAIN_S = 3.0
#: how long the end waits for the round at hand before it pulls the connection from under it
_STOP_S = 1.0


class Service:
    """A thread of its own, with its own view of the store."""

    def __init__(self, claim: Claim, *, key: SigningKey | None, payloads: Payloads, notify: Callable[[str], None]):
        self._claim, self._key, self._notify = claim, key, notify
        self._stream = claim.stream
        self._store = Store(claim.store.root)
        self._payloads = payloads.over(Book(self._store))
        self._offered: dict[str, float] = {}
        self._upkeep_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="refleet-answer", daemon=True)
        self.stopped_by: RefleetError | None = None  # why it gave up, if it did

    def start(self) -> None:
        if not self._thread.is_alive() and not self._stop.is_set():
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread, and the stream with it where the server does not answer."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)
            if self._thread.is_alive():
                self._stream.close()
                self._thread.join()
        self._store.close()

    def _run(self) -> None:
        away = False
        while not self._stop.wait(_POLL_S):
            try:
                self.round()
                if away:
                    self._notify("the server is back")
                away = False
            except StaleEpoch as error:
                self.stopped_by = error
                self._notify(f"stopped: {error}")
                return
            except StreamError as error:
                if not away and not self._stop.is_set():
                    self._notify(f"the server is away: {error.what}")
                away = True
                self._stop.wait(1.0)
            except RefleetError as error:
                self._notify(f"a request could not be answered: {error}")
                self._stop.wait(1.0)

    def round(self) -> None:
        """One look at the fleet. Raises: RefleetError."""
        now = fleet(self._stream)
        if time.monotonic() - self._upkeep_s > _UPKEEP_S:
            self._upkeep_s = time.monotonic()
            self._claim.renew()
            self._claim.heal()
            # never between a payload and its release: a command that runs now may have written one for the next target
            with suppress(StoreBusy), self._store.lock("publish", holder="upkeep"):
                self._payloads.clean(fleet(self._stream))
        for worker in now.live:
            if worker.status and worker.status.want:
                self._answer(worker, worker.status.want)

    def _answer(self, worker: WorkerView, want: Want) -> None:
        known = set(self._store.manifests())
        if want.target not in known:
            return  # past retention, or another store's: the worker shows what it waits for
        target = self._store.manifest(want.target)
        base = self._base(worker, known)
        need = (base.fingerprint if base else None, want.target, tuple(sorted(want.lacks)) if base else ())
        ref = self._payloads.find(need, refused=frozenset(want.refused))
        if ref is None:
            ref = self._payloads.send(target, base, lacks=need[2])
        elif time.monotonic() - self._offered.get(ref.payload_id, -_OFFER_AGAIN_S) < _OFFER_AGAIN_S:
            return
        self._offer(ref)

    def _base(self, worker: WorkerView, known: set[bytes]) -> Manifest | None:
        """The version to build on: the first that the worker has and this store can still read."""
        assert worker.status is not None
        for fingerprint in worker.status.have:
            if fingerprint in known:
                base = self._store.manifest(fingerprint)
                if not self._store.missing(base):
                    return base
        return None

    def _offer(self, ref: PayloadRef) -> None:
        lease = self._claim.renew()
        offer = Offer(self._stream.model, self._store.id, lease.epoch, ref)
        self._stream.offer(lease, seal(wire.pack(offer), self._key), ttl_s=LEASE_S)
        self._offered[ref.payload_id] = time.monotonic()
