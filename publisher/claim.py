"""The right to publish: one store at a time, fenced by its epoch; and the log, kept as this store knows it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import replace

from ..common.errors import NotDurable, StaleEpoch, StreamError
from ..common.messages import Lease, Serving
from ..common.stream import Keys, Stream
from .book import Book, PublisherState
from .fleet import fleet

#: a store that was not heard of for this long may be succeeded without --take-over
LEASE_S = 30.0
#: the highest epoch that a record can carry
LAST_EPOCH = (1 << 63) - 1
#: how long a command waits for another one on the same store
LOCK_S = 3600.0


class Claim:
    """One process's hold on a model. Several processes on one store share the epoch; another store fences all of them.

    Safe to use from several threads.
    """

    def __init__(self, stream: Stream, book: Book, *, take_over: bool, notify: Callable[[str], None]):
        self.stream, self.book, self.store = stream, book, book.store
        self._take_over, self._notify = take_over, notify
        self._lease: Lease | None = None
        self._lock = threading.RLock()

    def lease(self) -> Lease:
        """This store's lease, claimed at the first call.

        The new epoch is above the server's, its log's, this disk's and every worker's: whatever was lost, it never
        repeats.
        Raises: PublisherBusy naming the holder, NotDurable, StreamError.
        """
        with self._lock:
            if self._lease is None:
                self._check_server()
                with self.store.lock("log", wait_s=LOCK_S, holder="claim"):
                    self._lease = self._claim(self.stream.last_ids()[0][0], take_over=self._take_over)
            return self._lease

    def above(self, epoch: int) -> Lease:
        """A lease of a new epoch above `epoch`, for a log that has an entry there which no claim led to.

        The caller holds the store's lock "log". Raises: PublisherBusy, StreamError.
        """
        with self._lock:
            self._lease = self._claim(epoch, take_over=False)
            return self._lease

    def renew(self) -> Lease:
        """Hold the lease for another LEASE_S; gives the lease to write under.

        A fenced process goes on only if a command on its own store raised the epoch meanwhile: both are one publisher.
        Raises: StaleEpoch when another store took over, PublisherBusy, StreamError.
        """
        lease = self.lease()
        try:
            self.stream.renew(lease, ttl_s=LEASE_S)
            return lease
        except StaleEpoch:
            with self._lock:
                state = self.book.state()
                if state.epoch <= lease.epoch:
                    raise
                self._lease = replace(lease, epoch=state.epoch)
                self.stream.renew(self._lease, ttl_s=LEASE_S)
                return self._lease

    def heal(self) -> bool:
        """Write the last release again if the server lost it. True when it did. Raises: StreamError, StaleEpoch."""
        with self.store.lock("log", wait_s=LOCK_S, holder="heal"):
            head, lease = self.book.head(), self.lease()
            if head is None or head.epoch != lease.epoch or self.stream.last_ids()[0] >= head.order:
                return False
            self.store.settle_records()  # whoever recorded it may have died before it was durable
            self.stream.append(lease, head.seq, self.book.release_bytes(head), ttl_s=LEASE_S)
        self._notify(f"the server did not have release {head.version!r}: written again")
        return True

    def _claim(self, log_epoch: int, *, take_over: bool) -> Lease:
        if log_epoch >= LAST_EPOCH:
            raise StreamError(
                f"the log holds an entry of epoch {log_epoch}: no release can follow it",
                about=f"model {self.stream.model!r}",
                next=f"find out who wrote it, then redis-cli del {Keys(self.stream.model).log}: it is written again",
            )
        state = self.book.state()
        seen = [worker.status for worker in fleet(self.stream).workers if worker.status]
        # claimed too low when the server was emptied: workers believe another store in it, and never this one
        repeated = any(self._is_of_another_store(status.target, state.epoch) for status in seen)
        kept = 0 if repeated else state.epoch
        mine = Lease(self.store.id, kept, socket.gethostname(), str(self.store.root), os.getpid())
        floor = max([log_epoch, *(status.epoch for status in seen)])
        epoch = self.stream.claim(mine, floor=floor, ttl_s=LEASE_S, take_over=take_over)
        self.book.save_state(PublisherState(epoch))
        return replace(mine, epoch=epoch)

    def _is_of_another_store(self, goal: Serving | None, epoch: int) -> bool:
        """Whether a worker's goal is a release in our `epoch` that we did not make."""
        return goal is not None and goal.epoch == epoch and not self.book.made(goal)

    def _check_server(self) -> None:
        for facts, what in ((self.stream.facts(), "server"), (self.stream.payload_facts(), "payload server")):
            if facts.policy and facts.policy != "noeviction":
                raise NotDurable(
                    f"the {what}'s maxmemory-policy is {facts.policy}: it would drop releases and payloads in silence",
                    about=f"model {self.stream.model!r}",
                    next="set maxmemory-policy noeviction (redis-cli config set maxmemory-policy noeviction)",
                )
