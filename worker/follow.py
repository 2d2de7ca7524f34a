"""Follow the model's log: which records are accepted, which are refused and why.

A release is accepted only if it is signed as the trust file demands, well-formed, of this model, at its own place in
the log, and above everything accepted before, by (epoch, seq). Within one epoch only one publisher is believed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..common import wire
from ..common.errors import MalformedRecord, ProtocolError, ReplayedRelease, StaleEpoch, StreamError, StreamReset
from ..common.limits import LIMITS
from ..common.messages import Coming, Failure, Offer, Release, VerifyRequest
from ..common.signing import Trust, open_envelope
from ..common.stream import NOTHING, Entries, LogId, Stream
from ..common.types import PayloadRef


@dataclass(slots=True)
class News:
    """What one read of the stream brought."""

    accepted: Release | None = None  # the newest, if any
    restructure: bool = False  # whether it or one that it overtook may have other names, dtypes or shapes
    repeated: bool = False  # the accepted release came again, or the server did: acknowledge it again
    coming: Coming | None = None  # the newest payload that is being written from now on
    asks: list[VerifyRequest] = field(default_factory=list)
    refused: list[Failure] = field(default_factory=list)


class Follower:
    """Cursors and the high-water mark of one worker. Not thread-safe."""

    def __init__(self, model: str, *, trust: Trust | None, accepted: Release | None):
        self.model, self.accepted = model, accepted
        self._trust = trust
        self._log: LogId = accepted.order if accepted else NOTHING[0]
        self._control = NOTHING[1]
        self._offers: deque[PayloadRef] = deque(maxlen=LIMITS.control_entries)
        self._seen_asks: deque[str] = deque(maxlen=LIMITS.control_entries)
        self._away = False  # the server did not answer the last time
        self._doubt: tuple[LogId, LogId, bytes] | None = (
            None  # a refused entry: the cursor before it, its id, its bytes
        )
        # requests and announcements that are older than this worker are not for it
        self._first, self._older = True, (0, 0)

    def begin(self, stream: Stream) -> None:
        """From now on requests and announcements are for this worker. Without this call: after the first `read`.

        Raises: StreamError.
        """
        self._older, self._first = _control_id(stream.last_ids()[1]), False

    def read(self, stream: Stream, *, block_s: float) -> News:
        """Wait up to `block_s` for entries and judge them. Raises: StreamError."""
        try:
            # after an outage the last entry again: another one may be at its place by now, if the server was emptied
            log_after = _before(self._log) if self._away else self._log
            entries = stream.read(log_after, self._control, block_s=block_s)
            quiet = not entries.log and not entries.control
            news = self._after_silence(stream) if quiet else self._take(entries, live=True)
        except StreamError:
            self._away = True
            raise
        if self._away and self.accepted:
            news.repeated = True  # what was acknowledged may be lost, also where the log was healed meanwhile
        self._away = False
        return news

    def offers(self, target: bytes) -> list[PayloadRef]:
        """Payloads offered towards `target`, newest first."""
        return [ref for ref in reversed(self._offers) if ref.target == target]

    def _after_silence(self, stream: Stream) -> News:
        """A cursor beyond a stream's end means that the server lost data: without this, a reader waits for ever."""
        self._first = False
        last_log, last_control = stream.last_ids()
        reset_log = last_log < self._log
        reset_control = _control_id(last_control) < _control_id(self._control)
        if not reset_log and not reset_control:
            return self._look_again(stream)
        if reset_control:
            self._control, self._older = NOTHING[1], (0, 0)
        if not reset_log:
            return News()
        self._log = NOTHING[0]
        entries = stream.read(self._log, self._control, block_s=0, count=LIMITS.log_entries)
        news = self._take(entries, live=False)
        if news.accepted is None and not news.repeated:
            lost = StreamReset("the server lost releases that were accepted here")
            news.refused.append(Failure(lost.code, lost.what, None))
        self._log = max(self._log, last_log)
        return news

    def _look_again(self, stream: Stream) -> News:
        """The newest entry may have been refused only because it was damaged on its way here: it is read once more."""
        if self._doubt is None:
            return News()
        (before, log_id, data), self._doubt = self._doubt, None
        found = stream.read(before, self._control, block_s=0, count=1).log
        again = [entry for entry in found if entry[0] == log_id and entry[1] != data]
        if again:
            self._log = before
        return self._take(Entries(again, []), live=True)

    def _take(self, entries: Entries, *, live: bool) -> News:
        news = News()
        for log_id, data in entries.log:
            before, self._log = self._log, log_id
            self._doubt = None
            try:
                release = self._judge(log_id, data)
            except ProtocolError as error:
                self._doubt = (before, log_id, data)
                # reading everything again after the server lost data shows old releases: no news, and no attack
                if live or not isinstance(error, StaleEpoch | ReplayedRelease):
                    news.refused.append(Failure(error.code, f"log entry {log_id[0]}-{log_id[1]}: {error.what}", None))
                continue
            if release is None:
                news.repeated = True
            else:
                self.accepted = news.accepted = release
                news.restructure |= release.restructure
        for control_id, data in entries.control:
            self._control = control_id
            try:
                self._control_entry(control_id, data, news)
            except ProtocolError as error:
                news.refused.append(Failure(error.code, f"control entry {control_id}: {error.what}", None))
        self._first = False
        return news

    def _judge(self, log_id: LogId, data: bytes) -> Release | None:
        """The release in `data`; None if it is the accepted one again. Raises: ProtocolError if it is refused."""
        release = wire.unpack(open_envelope(data, self._trust).payload, Release)
        if release.model != self.model:
            raise MalformedRecord(f"a release of model {release.model!r}")
        if release.order != log_id:
            raise MalformedRecord(f"it names itself {release.epoch}-{release.seq}: copied from elsewhere")
        high = self.accepted
        if high is None:
            return release
        if release.epoch < high.epoch:
            raise StaleEpoch(f"epoch {release.epoch} of {release.version!r} was superseded by epoch {high.epoch}")
        if release == high:
            return None
        if release.epoch == high.epoch and release.publisher != high.publisher:
            raise StaleEpoch(f"a second publisher within epoch {release.epoch}: {release.publisher}")
        if release.order <= high.order:
            raise ReplayedRelease(f"{release.version!r} is not newer than the accepted {high.epoch}-{high.seq}")
        return release

    def _control_entry(self, control_id: str, data: bytes, news: News) -> None:
        record = wire.unpack_any(open_envelope(data, self._trust).payload, (Coming, Offer, VerifyRequest))
        assert isinstance(record, Coming | Offer | VerifyRequest)
        if record.model != self.model:
            raise MalformedRecord(f"a record of model {record.model!r}")
        for_this_worker = not self._first and _control_id(control_id) > self._older
        if isinstance(record, VerifyRequest):
            if record.nonce not in self._seen_asks:
                self._seen_asks.append(record.nonce)
                if for_this_worker:
                    news.asks.append(record)
            return
        if self.accepted and record.epoch < self.accepted.epoch:
            what = "an offer" if isinstance(record, Offer) else "an announcement"
            raise StaleEpoch(f"{what} of epoch {record.epoch}, superseded by epoch {self.accepted.epoch}")
        if isinstance(record, Offer):
            self._offers.append(record.payload)
        elif for_this_worker:  # an older one was released meanwhile, or given up
            news.coming = record


def _control_id(text: str) -> tuple[int, int]:
    milliseconds, _, number = text.partition("-")
    return int(milliseconds), int(number or 0)


def _before(log_id: LogId) -> LogId:
    """The place right before this one, as far as one publisher numbers."""
    epoch, seq = log_id
    return epoch, max(seq - 1, 0)
