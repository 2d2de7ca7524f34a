"""A TCP proxy on loopback: a bad link, a partition, or one exchange that breaks in a named way; else it is honest."""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum


class Fault(Enum):
    CUT_REQUEST = "forward only the first bytes of the request, then close"
    LOSE_REPLY = "forward the whole request, drop the reply, close"
    TEAR_REPLY = "forward the request and the first bytes of the reply, then close"
    HOLD_REPLY = "forward the request and nothing of the reply; the connection stays open"
    RESET = "forward the request, drop the reply, reset both connections"
    HALF_OPEN = "forward the request, drop the reply, close the server's side and never tell the client"


@dataclass(frozen=True)
class Link:
    """What every byte meets. `corrupt_every`: about so many bytes of replies have one flipped bit among them."""

    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    slice_bytes: int = 0
    corrupt_every: int = 0


HONEST = Link()


@dataclass
class _Armed:
    fault: Fault
    match: bytes
    forwarded_bytes: int


class TcpProxy:
    """Listens on `port` and forwards to `target_port`; use it in a `with`.

    `link` may be replaced at any time. `target_port` too: connections made from then on lead there.
    `break_next(fault, match)` breaks the next exchange whose request contains `match`; once. `fired` is then set.
    Requests are matched per recv, with the end of the one before: a match may not be longer than 64 bytes.
    """

    def __init__(self, target_port: int, *, seed: int = 0):
        self.target_port, self.link = target_port, HONEST
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.fired = threading.Event()
        #: `held`: connections with bytes that can't pass now
        self.held = self.forwarded_bytes = self.corrupted = 0
        self._random = random.Random(seed)
        self._joined = threading.Event()  # cleared while there is a partition
        self._joined.set()
        self._lock = threading.Lock()
        self._armed: _Armed | None = None
        self._closing = False
        self._sockets: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def break_next(self, fault: Fault, match: bytes, *, forwarded_bytes: int = 0) -> None:
        """`forwarded_bytes`: how much of the request (CUT_REQUEST) or reply (TEAR_REPLY) still passes."""
        with self._lock:
            self.fired.clear()
            self._armed = _Armed(fault, match, forwarded_bytes)

    @contextmanager
    def partition(self) -> Iterator[None]:
        """Nothing passes, in old and new connections, and nobody is told; afterwards what was sent arrives."""
        self._joined.clear()
        try:
            yield
        finally:
            self._joined.set()

    def reset(self) -> int:
        """Resets all connections; returns how many."""
        with self._lock:
            sockets = list(self._sockets)
            for each in sockets:
                _reset(each)
        return len(sockets) // 2

    def close(self) -> None:
        with self._lock:
            self._closing = True
            for each in (self._listener, *self._sockets):
                with suppress(OSError):  # closed by its peer
                    each.shutdown(socket.SHUT_RDWR)
        self._joined.set()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            with self._lock:
                if self._closing:
                    client.close()
                    return
                self._threads = [each for each in self._threads if each.is_alive()] + [thread]
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                with socket.create_connection(("127.0.0.1", self.target_port)) as server, self._known(client, server):
                    self._forward(client, server)
            except (OSError, ValueError):  # ValueError: `reset` closed it between two looks
                pass  # either end went away: the other one sees it

    @contextmanager
    def _known(self, *sockets: socket.socket) -> Iterator[None]:
        with self._lock:
            if self._closing:
                raise OSError("the proxy is closed")
            self._sockets.update(sockets)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.difference_update(sockets)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        broken: _Armed | None = None
        tail = b""
        while True:
            for ready in select.select([client, server], [], [])[0]:
                data = ready.recv(1 << 18)
                self._wait_for_the_other_side()
                if not data:
                    return
                if ready is client:
                    broken = broken or self._take(tail + data)
                    tail = data[-64:]
                    if broken and broken.fault is Fault.CUT_REQUEST:
                        server.sendall(data[: broken.forwarded_bytes])
                        broken.forwarded_bytes -= len(data)
                        if broken.forwarded_bytes <= 0:
                            self.fired.set()
                            return
                    else:
                        self._send(server, data)
                elif broken is None:
                    self._send(client, self._corrupted(data))
                elif not self._break(broken, data, client, server):
                    return

    def _wait_for_the_other_side(self) -> None:
        if not self._joined.is_set():
            with self._lock:
                self.held += 1
            self._joined.wait()
            with self._lock:
                self.held -= 1

    def _break(self, broken: _Armed, reply: bytes, client: socket.socket, server: socket.socket) -> bool:
        """A reply is there, so the server has executed the request. Returns whether the connection goes on."""
        if broken.fault is Fault.TEAR_REPLY:
            client.sendall(reply[: broken.forwarded_bytes])
            broken.forwarded_bytes -= len(reply)
            if broken.forwarded_bytes > 0:
                return True
        self.fired.set()
        if broken.fault is Fault.RESET:
            _reset(client)
            _reset(server)
        elif broken.fault is Fault.HALF_OPEN:
            server.close()
            while client.recv(1 << 18):
                pass  # into the void, until the client gives up by itself
        return broken.fault is Fault.HOLD_REPLY

    def _send(self, to: socket.socket, data: bytes) -> None:
        link = self.link
        self.forwarded_bytes += len(data)
        if link.latency_s:
            time.sleep(link.latency_s)
        step = link.slice_bytes or (max(int(link.bytes_per_s / 100), 1) if link.bytes_per_s else len(data))
        for start in range(0, len(data), step):
            part = data[start : start + step]
            if link.bytes_per_s:
                time.sleep(len(part) / link.bytes_per_s)
                self._wait_for_the_other_side()
            to.sendall(part)

    def _corrupted(self, reply: bytes) -> bytes:
        every = self.link.corrupt_every
        if not every:
            return reply
        spoiled = bytearray(reply)
        for _ in range(len(reply) // every + (self._random.random() < len(reply) % every / every)):
            spoiled[self._random.randrange(len(spoiled))] ^= 1 << self._random.randrange(8)
            self.corrupted += 1
        return bytes(spoiled)

    def _take(self, seen: bytes) -> _Armed | None:
        with self._lock:
            armed = self._armed
            if armed is None or armed.match not in seen:
                return None
            self._armed = None
            return armed


def _reset(connection: socket.socket) -> None:
    """The peer gets RST instead of FIN. `shutdown` first: it wakes a thread that waits on it."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()
