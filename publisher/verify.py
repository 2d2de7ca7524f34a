"""Ask every worker to re-hash what its engine holds, and collect the answers."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from ..common import wire
from ..common.errors import ProtocolError
from ..common.messages import Ack, VerifyRequest
from ..common.signing import SigningKey, seal
from ..common.stream import Stream
from .book import now_ms
from .fleet import fleet

_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Verification:
    """The answers of one round. `silent`: live workers that did not answer in time."""

    answers: dict[str, Ack]
    silent: tuple[str, ...]
    deep: bool

    @property
    def disagree(self) -> tuple[tuple[str, ...], ...]:
        """Groups of workers with equal engine build and fingerprint whose engines, as a whole, are not all equal."""
        groups: dict[tuple[str, bytes], dict[str, bytes]] = {}
        for worker, ack in sorted(self.answers.items()):
            if ack.fingerprint and ack.verified and ack.verified.engine:
                groups.setdefault((ack.engine_build, ack.fingerprint), {})[worker] = ack.verified.engine
        return tuple(tuple(group) for group in groups.values() if len(set(group.values())) > 1)

    @property
    def ok(self) -> bool:
        """Whether somebody answered, nobody was silent, every engine holds what its worker says, and none disagree."""
        verified = [ack.verified for ack in self.answers.values()]
        complete = bool(verified) and not self.silent and not self.disagree
        return complete and all(v is not None and v.ok for v in verified)


def verify(
    stream: Stream, *, key: SigningKey | None = None, deep: bool = False, timeout_s: float = 60.0
) -> Verification:
    """Every live worker re-hashes all tensors of its engine; with `deep` also the engine as a whole.

    Raises: StreamError.
    """
    expected = {worker.id for worker in fleet(stream).live}
    cursors = {}
    for worker in expected:
        last = stream.last_acks(worker, 1)
        cursors[worker] = last[0][0] if last else "0-0"
    request = VerifyRequest(stream.model, secrets.token_hex(16), now_ms(), deep)
    stream.ask(seal(wire.pack(request), key))
    answers: dict[str, Ack] = {}
    deadline = time.monotonic() + timeout_s
    while expected - answers.keys() and time.monotonic() < deadline:
        for worker, entries in stream.acks(cursors, block_s=_POLL_S).items():
            for cursor, data in entries:
                cursors[worker] = cursor
                try:
                    ack = wire.unpack(data, Ack)
                except ProtocolError:
                    continue
                if ack.verified and ack.verified.nonce == request.nonce and ack.worker == worker:
                    answers[worker] = ack
    return Verification(answers, tuple(sorted(expected - answers.keys())), deep)
