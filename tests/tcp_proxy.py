"""A TCP proxy on loopback that breaks one exchange in a named way, and is honest before and after."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum


class Fault(Enum):
    CUT_REQUEST = "forward only the first bytes of the request, then close"
    LOSE_REPLY = "forward the whole request, drop the reply, close"
    TEAR_REPLY = "forward the request and the first bytes of the reply, then close"
    HOLD_REPLY = "forward the request and nothing of the reply; the connection stays open"


@dataclass
class _Armed:
    fault: Fault
    match: bytes
    forwarded_bytes: int


class TcpProxy:
    """Listens on `port` and forwards to `target_port`; use it in a `with`.

    `break_next(fault, match)` breaks the next exchange whose request contains `match`; once. `fired` is then set.
    Requests are matched per recv, with the end of the one before: a match may not be longer than 64 bytes.
    """

    def __init__(self, target_port: int):
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.fired = threading.Event()
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

    def close(self) -> None:
        with self._lock:
            self._closing = True
            for each in (self._listener, *self._sockets):
                with suppress(OSError):  # closed by its peer
                    each.shutdown(socket.SHUT_RDWR)
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
                self._sockets.add(client)
                self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, socket.create_connection(("127.0.0.1", self._target_port)) as server:
                self._forward(client, server)
        except OSError:
            pass  # either end went away: the other one sees it
        finally:
            with self._lock:
                self._sockets.discard(client)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        broken: _Armed | None = None
        tail = b""
        while True:
            for ready in select.select([client, server], [], [])[0]:
                data = ready.recv(1 << 18)
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
                        server.sendall(data)
                elif broken is None:
                    client.sendall(data)
                else:
                    # a reply is there, so the server has executed the request
                    if broken.fault is Fault.TEAR_REPLY:
                        client.sendall(data[: broken.forwarded_bytes])
                        broken.forwarded_bytes -= len(data)
                        if broken.forwarded_bytes > 0:
                            continue
                    self.fired.set()
                    if broken.fault is not Fault.HOLD_REPLY:
                        return

    def _take(self, seen: bytes) -> _Armed | None:
        with self._lock:
            armed = self._armed
            if armed is None or armed.match not in seen:
                return None
            self._armed = None
            return armed
