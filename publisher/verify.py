"""Ask every worker to re-hash what its engine holds, collect the answers, and compare proofs with the own store's."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from ..common import wire
from ..common.digest import blake3_of, proof_of
from ..common.errors import ProtocolError, RefleetError
from ..common.messages import Ack, VerifyRequest
from ..common.signing import SigningKey, seal
from ..common.store import Store
from ..common.stream import Stream
from .book import now_ms
from .fleet import fleet

_POLL_S = 0.25
NO_STORE = "no store of this model was named"


@dataclass(frozen=True, slots=True)
class Verification:
    """The answers of one round. `silent`: live workers that did not answer in time.

    In a deep one every worker that found its engine right is in one of these, with the reason: `unproven`, whose proof
    is not that of the same version in the publisher's store; `not_compared`, where that store can't tell; or it is in
    `proven`.
    """

    answers: dict[str, Ack]
    silent: tuple[str, ...]
    deep: bool
    proven: frozenset[str] = frozenset()
    unproven: dict[str, str] = field(default_factory=dict)
    not_compared: dict[str, str] = field(default_factory=dict)

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
        """Whether somebody answered, nobody was silent, every engine holds what its worker says, and none disagree.

        A proof that could not be compared is no failure, as an engine without a serialized form is none.
        """
        verified = [ack.verified for ack in self.answers.values()]
        complete = bool(verified) and not self.silent and not self.disagree and not self.unproven
        return complete and all(v is not None and v.ok for v in verified)


def verify(
    stream: Stream, *, key: SigningKey | None = None, deep: bool = False, timeout_s: float = 60.0,
    store: Store | None = None,
) -> Verification:  # fmt: skip
    """Every live worker re-hashes all tensors of its engine; with `deep` also by BLAKE3, and the engine as a whole.

    `store`: the publisher's, whose tensors the proofs of a deep verification are compared with.
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
    silent = tuple(sorted(expected - answers.keys()))
    return _compared(answers, silent, store) if deep else Verification(answers, silent, deep)


def _compared(answers: dict[str, Ack], silent: tuple[str, ...], store: Store | None) -> Verification:
    own: dict[bytes, bytes | str] = {}  # by fingerprint: the proof, or why there is none
    proven, unproven, not_compared = set(), {}, {}
    for worker, ack in answers.items():
        if ack.verified is None or not ack.verified.ok or ack.fingerprint is None:
            continue  # it failed already
        if ack.fingerprint not in own:
            own[ack.fingerprint] = _own_proof(store, ack.fingerprint)
        wanted = own[ack.fingerprint]
        if ack.verified.proof is None:
            unproven[worker] = "its answer has no proof of what its engine holds"
        elif isinstance(wanted, str):
            not_compared[worker] = wanted
        elif ack.verified.proof != wanted:
            unproven[worker] = (
                f"its engine holds other bytes than version {ack.serving!r} in this store, under equal tensor digests"
            )
        else:
            proven.add(worker)
    return Verification(answers, silent, True, frozenset(proven), unproven, not_compared)


def _own_proof(store: Store | None, fingerprint: bytes) -> bytes | str:
    """What `proof_of` gives for the version in the publisher's store, or why that can't be told."""
    if store is None:
        return NO_STORE
    try:
        manifest = store.manifest(fingerprint)
        return proof_of(
            (entry.spec, blake3_of([store.read(entry.digest, verify=True)] if entry.spec.size_bytes else []))
            for entry in manifest.tensors
        )
    except RefleetError as error:  # past retention, or damaged here: that says nothing about the worker
        return error.what
