"""Somebody who can write to the server and knows every format: forged records, spoiled payloads, crafted deltas."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from carriers import Carrier, InMemory, OnServer
from refleet.common import codec, preface, wire
from refleet.common.digest import digest_of
from refleet.common.layout import in_body_order
from refleet.common.memory_server import MemoryEntries
from refleet.common.messages import Coming, Lease, Offer, Release
from refleet.common.signing import SigningKey, seal
from refleet.common.stream import Keys
from refleet.common.types import STREAM, Block, DeltaTensor, Index, Manifest, PayloadRef, TensorEntry
from refleet.publisher import Publisher

Chunks = dict[int, bytes]  # by number
OTHER_STORE = "f" * 32


class Outsider:
    """Writes to the keys of `carrier`'s model directly: no fence, no checks."""

    def __init__(self, carrier: Carrier):
        assert isinstance(carrier, InMemory | OnServer)
        self._carrier, self.keys = carrier, Keys(carrier.model)

    def log(self, order: tuple[int, int], data: bytes) -> None:
        if isinstance(self._carrier, OnServer):
            self._carrier.client.xadd(self.keys.log, {"r": data}, id=f"{order[0]}-{order[1]}")
            return
        server = self._carrier.server
        with server.changed:
            entries = server.entries(self.keys.log)
            assert order > entries.last, "a server takes growing ids only"
            entries.add(order, data)
            server.put(self.keys.log, entries)
            server.changed.notify_all()

    def control(self, data: bytes) -> None:
        self._carrier.stream().ask(data)

    def ack(self, worker: str, data: bytes) -> None:
        self._carrier.stream().ack(worker, data)

    def status(self, worker: str, data: bytes) -> None:
        self._carrier.stream().beat(worker, data)

    def lose(self, *keys: str) -> None:
        self._carrier.lose(*keys)

    def edit(self, payload_id: str, change: Callable[[Chunks], Chunks]) -> None:
        """Rewrite a payload: `change` gets its chunks and returns what shall be there instead."""
        key = self.keys.chunks(payload_id)
        if isinstance(self._carrier, OnServer):
            client = self._carrier.client
            entries = {int(i.split(b"-")[0]) - 1: fields for i, fields in client.xrange(key)}
            blobs = any(b"b" in fields for fields in entries.values())
            there = {n: client.get(self.keys.blob(payload_id, n)) if blobs else f[b"c"] for n, f in entries.items()}
            client.unlink(key, *(self.keys.blob(payload_id, number) for number in entries))
            for number, data in sorted(change(there).items()):
                client.xadd(key, {"b": b""} if blobs else {"c": data}, id=f"{number + 1}-0")
                if blobs:
                    client.set(self.keys.blob(payload_id, number), data)
            return
        server = self._carrier.server
        with server.changed:
            spoiled = MemoryEntries()
            there = {number - 1: data for (number, _), data in server.entries(key).by_id.items()}
            for number, data in sorted(change(there).items()):
                spoiled.add((number + 1, 0), data)
            server.put(key, spoiled)

    def put(self, payload_id: str, chunks: Iterable[bytes]) -> None:
        stream = self._carrier.stream()
        for number, data in enumerate(chunks):
            stream.put_chunk(payload_id, number, data, ttl_s=600)

    def offer(
        self, publisher: Publisher, ref: PayloadRef, *, epoch: int | None = None, key: SigningKey | None = None
    ) -> None:
        """Offer a payload in the name of `publisher`."""
        lease = publisher.claim.lease()
        self.control(seal(wire.pack(Offer(publisher.model, lease.publisher, epoch or lease.epoch, ref)), key))

    def coming(
        self, publisher: Publisher, payload_id: str, *, base: bytes | None, chunk_bytes: int,
        epoch: int | None = None, model: str | None = None, key: SigningKey | None = None,
    ) -> None:  # fmt: skip
        """Announce a payload in the name of `publisher`."""
        lease = publisher.claim.lease()
        announced = Coming(
            model or publisher.model, lease.publisher, epoch or lease.epoch, payload_id, base, STREAM, chunk_bytes
        )
        self.control(seal(wire.pack(announced), key))


def forged(release: Release, **changes: object) -> bytes:
    """An unsigned record of `release` with these fields changed."""
    return seal(wire.pack(replace(release, **changes)), None)  # type: ignore[arg-type]


def next_order(release: Release) -> tuple[int, int]:
    return (release.epoch, release.seq + 1)


def other_lease(epoch: int) -> Lease:
    return Lease(OTHER_STORE, epoch, "elsewhere", "/stores/other", 1)


@dataclass(frozen=True, slots=True)
class Line:
    """One tensor of a crafted delta: what the index claims, and the encoded block that really follows, if any."""

    entry: TensorEntry
    blocks: tuple[tuple[int, bytes], ...]  # codec, bytes

    @property
    def tensor(self) -> DeltaTensor:
        based = any(codec.needs_base(number) for number, _ in self.blocks)
        return DeltaTensor(self.entry.spec, self.entry.digest, bool(self.blocks), based)


def raw_lines(publisher: Publisher, target: Manifest, base: Manifest | None) -> list[Line]:
    """An honest delta, every changed tensor as one raw block."""
    lines = []
    for entry in target.changed_from(base):
        data = bytes(publisher.store.read(entry.digest, verify=True))
        lines.append(Line(entry, ((codec.RAW, data),) if data else ()))
    return lines


def craft(
    outsider: Outsider, lines: list[Line], *, base: bytes | None, target: bytes, claim_base: bytes | None = None,
    claim_target: bytes | None = None, removed: tuple[str, ...] = (),
) -> PayloadRef:  # fmt: skip
    """Write a delta that is consistent with itself, whatever it leads to; `claim_...`: what its reference says."""
    payload_id = secrets.token_hex(16)
    tensors = tuple(line.tensor for line in lines)
    by_name = {line.entry.spec.name: line for line in lines}
    encoded = [
        (tensor, number, preface.packed(number, tensor.spec.size_bytes, (), 0, len(data)) + data)
        for tensor in in_body_order(tensors)
        for number, data in by_name[tensor.spec.name].blocks[:1]
    ]
    blocks = tuple(Block(number, tensor.spec.size_bytes, len(data)) for tensor, number, data in encoded)
    body = b"".join(data for _, _, data in encoded)
    chunks = [body] if body else []
    index = Index(
        base, target, tensors, blocks, max(len(body), 1), len(body), tuple(digest_of(chunk) for chunk in chunks),
        removed,
    )  # fmt: skip
    data = wire.pack(index)
    outsider.put(payload_id, [*chunks, data])
    return PayloadRef(
        payload_id, claim_base or base, claim_target or target, len(chunks), len(body), 1, len(data), digest_of(data)
    )


def unchecked(record: object, **changes: object) -> object:
    """A copy of a record with values that its own checks would refuse."""
    made = object.__new__(type(record))
    for name in record.__dataclass_fields__:  # type: ignore[attr-defined]
        object.__setattr__(made, name, changes.get(name, getattr(record, name)))
    return made
