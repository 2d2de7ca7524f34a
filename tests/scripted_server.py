"""A server that says what a test tells it to say, right or wrong."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from carriers import PAYLOAD
from refleet.common.redis_stream import RedisStream
from refleet.common.types import BLOBS, STREAM

#: in every request for a chunk
REQUEST = {STREAM: b"XRANGE", BLOBS: b"GET"}


class ScriptedServer:
    """Answers the n-th request of each connection with `replies[n]`; use it in a `with`.

    After its last reply it closes the connection, or with `hold` says nothing more. `asked` holds what it was sent.
    """

    def __init__(self, *replies: bytes, hold: bool = False):
        self._replies, self._hold = replies, hold
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.asked: list[bytes] = []
        self.connections = 0
        self.waiting = threading.Event()  # it has said all and holds the connection
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._thread.join(10)

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                self.connections += 1
                with suppress(OSError):
                    self._serve(client)
                if not self._hold:
                    client.close()

    def _serve(self, client: socket.socket) -> None:
        for reply in self._replies:
            while not (data := client.recv(1 << 16)).strip():
                if not data:
                    return
            self.asked.append(data)
            client.sendall(reply)
        self.waiting.set()


def honest(kind: str, number: int, data: bytes) -> bytes:
    """A right reply to the request for a chunk."""
    entry = b"%d-0" % (number + 1)
    head = b"*1\r\n*2\r\n$%d\r\n%b\r\n*2\r\n$1\r\nc\r\n" % (len(entry), entry)
    return (head if kind == STREAM else b"") + b"$%d\r\n%b\r\n" % (len(data), data)


def read(stream: RedisStream, kind: str, number: int = 0, *, room: int = 100) -> bytes:
    buffer = bytearray(room)
    return bytes(buffer[: stream.read_chunk(PAYLOAD, number, memoryview(buffer), carrier=kind)])
