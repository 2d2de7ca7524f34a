"""The server as a process reaches it: late, not at all, without a reply, twice, or with other bytes than were written.

Behind it lies `MemoryStream`, the production code's own twin of the Redis form.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from refleet.common.errors import OverBudget, RefleetError, StreamUnavailable
from refleet.common.memory_server import MemoryServer
from refleet.common.memory_stream import MemoryStream
from refleet.common.stream import Entries

from .faults import Faults, Host
from .kernel import kernel
from .system import touch
from .threads import me

READS = (
    "last_ids", "history", "lease", "payload_chunks", "member", "facts", "payload_facts", "read_chunk",
)  # fmt: skip
WRITES = (
    "claim", "renew", "append", "put_chunk", "offer", "ask", "keep_payload", "drop_payload", "ack", "beat", "leave",
)  # fmt: skip
#: what makes a server grow, which one that is full refuses
_GROWS = ("append", "put_chunk", "offer", "ask", "ack", "beat")

#: hears of every write that the server did: name, arguments, result
OnEffect = Callable[[str, tuple[Any, ...], Any], None]


class Network:
    """All connections of one run. `signed`: records may be forged and damaged, because that is found."""

    def __init__(self, server: MemoryServer, model: str, faults: Faults, *, signed: bool, on_effect: OnEffect):
        self.server, self.model, self.faults, self.signed, self.on_effect = server, model, faults, signed, on_effect
        self.down_until = 0.0
        self.starts = 0  # of the server: each resets what is in the middle of a call
        self.full = False

    def stream(self, host: Host) -> Connection:
        return Connection(self, host)

    def away(self, host: Host) -> bool:
        return kernel().now < max(self.down_until, host.cut_off_until)


class Connection:
    """`Stream` of one process."""

    def __init__(self, network: Network, host: Host):
        self.model, self.host = network.model, host
        self._net, self._faults = network, network.faults
        self._inner = MemoryStream(network.server, network.model)
        self.fetched: set[tuple[str, int]] = set()  # (payload, chunk) that came as they lie in the server
        self.answered_s = kernel().now

    def carrier(self) -> str:
        return self._inner.carrier()

    def close(self) -> None:
        self._inner.close()

    def __getattr__(self, name: str) -> Any:
        if name in READS:
            return lambda *args, **options: self._read(name, args, options)
        if name in WRITES:
            return lambda *args, **options: self._write(name, args, options)
        raise AttributeError(name)

    # ------------------------------------------------------------------ reads

    def read(self, log_after: Any, control_after: str, *, block_s: float, count: int = 256) -> Entries:
        found: Entries = self._read("read", (log_after, control_after), {"block_s": block_s, "count": count})
        if not self._net.signed:
            return found
        log = [(entry_id, self._record(data, "log")) for entry_id, data in found.log]
        control = [(entry_id, self._record(data, "control")) for entry_id, data in found.control]
        if log and self._faults.hit("read.repeated"):
            log += log
        if len(log) > 1 and self._faults.hit("read.reordered"):
            log.reverse()
        return Entries(log, control)

    def chunks(self, payload_id: str, first: int, count: int, *, carrier: str) -> list[bytes]:
        found: list[bytes] = self._read("chunks", (payload_id, first, count), {"carrier": carrier})
        return [self._damaged(data, "index") for data in found]

    def members(self) -> Any:
        return self._read("members", (), {})

    def acks(self, after: Any, *, block_s: float) -> Any:
        return self._read("acks", (after,), {"block_s": block_s})

    def last_acks(self, worker: str, count: int) -> Any:
        return self._read("last_acks", (worker, count), {})

    def payload_reader(self, payload_id: str, numbers: Any = None, *, carrier: str = "stream") -> Reader:
        return Reader(self, payload_id, carrier)

    def _read(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        starts = self._request(name)
        found = getattr(self._inner, name)(*args, **options)
        self._reply(name, starts)
        return found

    def _record(self, data: bytes, kind: str) -> bytes:
        return flipped(data) if self._faults.hit(f"{kind}.flipped") else data

    def _damaged(self, data: bytes, kind: str) -> bytes:
        if self._faults.hit(f"{kind}.flipped"):
            return flipped(data)
        if self._faults.hit(f"{kind}.truncated"):
            return data[: kernel().rng.randrange(len(data))]
        return data

    # ------------------------------------------------------------------ writes

    def _write(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        starts = self._request(name)
        faults, run = self._faults, kernel()
        if self._net.full and name in _GROWS:
            faults.count("server.full")
            raise OverBudget("the server is full")
        if name == "put_chunk":
            args = (*args[:2], bytes(args[2]))
        if faults.hit("net.late-effect"):  # the reply timed out; the request is still on its way
            late = MemoryStream(self._net.server, self.model)

            def arrive() -> None:
                run.note(f"late {name} arrives")
                with suppress(RefleetError):
                    self._effect(late, name, args, options)

            run.call_at(run.now + run.rng.uniform(0.1, 9.0), arrive)
            raise StreamUnavailable(f"no reply to {name}")
        result = self._effect(self._inner, name, args, options)
        if faults.hit("net.duplicate"):
            with suppress(RefleetError):
                self._effect(self._inner, name, args, options)
        self._reply(name, starts)
        return result

    def _effect(self, stream: MemoryStream, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        result = getattr(stream, name)(*args, **options)
        self._net.on_effect(name, args, result)
        return result

    # ------------------------------------------------------------------ what may happen to each

    def _request(self, name: str) -> int:
        touch("send", name)
        run, faults, starts = kernel(), self._faults, self._net.starts
        run.sleep(run.rng.uniform(0.0005, 0.01))
        if faults.hit("net.slow"):
            run.sleep(run.rng.uniform(0.2, 6.0))
        if starts != self._net.starts:
            raise StreamUnavailable(f"{name}: the server was started again")
        if self._net.away(self.host):
            faults.count("net.away")
            run.sleep(run.rng.uniform(0.01, 0.5))
            raise StreamUnavailable(f"{name}: the server can't be reached")
        if faults.hit("net.refused"):
            raise StreamUnavailable(f"{name}: refused")
        run.note(name)
        return starts

    def _reply(self, name: str, starts: int) -> None:
        touch("receive the reply to", name)
        if self._net.away(self.host) or starts != self._net.starts:
            raise StreamUnavailable(f"{name}: the connection broke")
        if self._faults.hit("net.lost-reply"):
            raise StreamUnavailable(f"{name}: the connection was reset before the reply")
        self.answered_s = kernel().now


class Reader:
    """`PayloadReader`."""

    def __init__(self, connection: Connection, payload_id: str, carrier: str):
        self._connection, self._payload_id, self._carrier = connection, payload_id, carrier

    def read(self, number: int, into: memoryview, *, wait_s: float = 0.0) -> int:
        connection, faults = self._connection, self._connection._faults
        size: int = connection._read(
            "read_chunk", (self._payload_id, number, into), {"carrier": self._carrier, "wait_s": wait_s}
        )
        connection._net.on_effect("chunk read", (self._payload_id, number, id(connection), me().name), size)
        if size and faults.hit("chunk.flipped"):
            at = kernel().rng.randrange(size)
            into[at] ^= 1 << kernel().rng.randrange(8)
        elif size and faults.hit("chunk.truncated"):
            size = kernel().rng.randrange(size)
        else:
            connection.fetched.add((self._payload_id, number))
        return size

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def flipped(data: bytes) -> bytes:
    """One bit of it turned."""
    changed, rng = bytearray(data), kernel().rng
    if changed:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)
