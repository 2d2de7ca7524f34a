"""The forms of `Stream` that pass one contract suite, each as a place where several streams meet."""

from __future__ import annotations

from typing import Protocol

from refleet.common.limits import LIMITS, Limits
from refleet.common.memory_stream import MemoryServer, MemoryStream
from refleet.common.messages import Lease
from refleet.common.redis_stream import AUTO, RedisStream
from refleet.common.stream import Stream
from servers import Server

TTL_S = 30.0
PAYLOAD = "0123456789abcdef" * 2


def lease_of(publisher: str = "a", *, epoch: int = 0) -> Lease:
    """A lease of the publisher whose id is this hex digit 32 times."""
    return Lease(publisher * 32, epoch, f"host-{publisher}", f"/stores/{publisher}", 4711)


def claimed(stream: Stream, publisher: str = "a", *, ttl_s: float = TTL_S, take_over: bool = False) -> Lease:
    return lease_of(publisher, epoch=stream.claim(lease_of(publisher), floor=0, ttl_s=ttl_s, take_over=take_over))


class Carrier(Protocol):
    """One model on one server, real or in memory."""

    def stream(self, *, limits: Limits = LIMITS) -> Stream: ...

    def lose(self, *keys: str) -> None:
        """Forget keys of the model by the end of their names; all of them without arguments."""
        ...

    def waiting(self) -> bool:
        """Whether a call waits inside the server now."""
        ...

    def close(self) -> None: ...


class InMemory:
    def __init__(self, model: str):
        self.model, self.server = model, MemoryServer()

    def stream(self, *, limits: Limits = LIMITS) -> Stream:
        return MemoryStream(self.server, self.model, limits=limits)

    def lose(self, *keys: str) -> None:
        if not keys:
            self.server.lose_everything()
        for key in keys:
            self.server.drop(f"refleet:{{{self.model}}}:{key}")

    def waiting(self) -> bool:
        return bool(self.server.changed._waiters)  # type: ignore[attr-defined]

    def close(self) -> None:
        pass


class OnServer:
    def __init__(self, server: Server, model: str):
        self.model, self.client = model, server.client()
        self._url = server.url
        self._streams: list[RedisStream] = []

    def stream(self, *, limits: Limits = LIMITS, carrier: str = AUTO) -> Stream:
        self._streams.append(RedisStream(self._url, self.model, limits=limits, carrier=carrier))
        return self._streams[-1]

    def lose(self, *keys: str) -> None:
        """A payload's chunks are lost by `lose()` alone: their keys carry the payload's id."""
        names = [f"refleet:{{{self.model}}}:{key}" for key in keys]
        names = names or list(self.client.scan_iter(match=f"refleet:{{{self.model}*"))
        if names:
            self.client.delete(*names)

    def waiting(self) -> bool:
        return self.client.info("clients")["blocked_clients"] > 0

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        self.lose()
        self.client.close()
