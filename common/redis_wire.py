"""One connection that moves payload bytes between a caller's buffer and the socket, with no copy in between.

redis-py copies a reply three times and can't receive into a given buffer, so payload has this small reader of its own.
Connecting, signing in, TLS and unix sockets are redis-py's: a `Wire` is one of its connections, whose socket it uses.
It knows exactly which reply it waits for: anything else is an error, and the connection is never used again.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from redis.exceptions import AuthenticationError, BusyLoadingError, NoPermissionError, ResponseError
from redis.exceptions import ConnectionError as LinkError
from redis.exceptions import TimeoutError as LinkTimeout

from .errors import StreamError
from .limits import KIB, MIB

#: one read of control bytes; also the most that a line of a reply may have
_CONTROL_BYTES = 4 * KIB
#: bulks from this size on are received into the caller's buffer by the kernel; smaller ones come with the control bytes
_DIRECT_BYTES = 2 * KIB
#: no server stores more in one string
_BULK_BYTES = 512 * MIB
_SIGN_IN = ("NOAUTH", "WRONGPASS")


class Wire:
    """A connection to one server, used by one thread at a time; `shut` may come from any thread.

    Raises redis-py's errors for what the link or the server does, StreamError for bytes that are no possible reply.
    """

    def __init__(self, connection: Any, *, timeout_s: float):
        """Takes a redis-py connection that was not connected yet, and connects it."""
        self._connection = connection
        connection.connect()
        self._socket: Any = connection._sock
        self._control = bytearray(_CONTROL_BYTES)
        self._view = memoryview(self._control)
        self._start = self._end = 0
        self._flags = 0
        self.idle_since = time.monotonic()
        if not isinstance(self._socket, ssl.SSLSocket):
            # a blocking socket with the kernel's own time limits: MSG_WAITALL then fills the buffer in one call
            limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
            self._socket.setblocking(True)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._flags = socket.MSG_WAITALL

    @property
    def quiet(self) -> bool:
        """Whether the connection can be used again: open, and nothing is there that nobody asked for."""
        return self._start == self._end and not _readable(self._socket)

    def shut(self) -> None:
        """End the connection; a call that waits in another thread ends with an error."""
        with suppress(OSError):  # the other side was first
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shut()
        self._connection.disconnect()

    # ------------------------------------------------------------------ sending

    def send(self, pieces: Sequence[bytes | memoryview]) -> None:
        """All of them, in as few calls as the kernel allows."""
        rest = [memoryview(piece) for piece in pieces if len(piece)]
        while rest:
            sent = self._send_some(rest)
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if sent:
                rest[0] = rest[0][sent:]

    def _send_some(self, pieces: list[memoryview]) -> int:
        try:
            if self._flags:
                return int(self._socket.sendmsg(pieces[:64]))
            return int(self._socket.send(pieces[0]))
        except (BlockingIOError, TimeoutError):
            raise LinkTimeout("the server takes no more bytes") from None
        except OSError as error:
            raise LinkError(str(error)) from None

    # ------------------------------------------------------------------ receiving

    def line(self) -> bytes:
        """The next line of a reply, without its end. An error of the server is raised as redis-py would."""
        while (end := self._control.find(b"\r\n", self._start, self._end)) < 0:
            if self._end - self._start >= _CONTROL_BYTES:
                raise StreamError(f"a reply's line has more than {_CONTROL_BYTES} bytes")
            self._more()
        found = bytes(self._view[self._start : end])
        self._start = end + 2
        if found.startswith(b"-"):
            raise _said(found[1:].decode("utf-8", "replace"))
        return found

    def expect(self, *lines: bytes) -> None:
        """Exactly these lines. Raises: StreamError."""
        for line in lines:
            if (found := self.line()) != line:
                raise unexpected(found, line)

    def size(self, line: bytes) -> int:
        """The size in a bulk's first line. Raises: StreamError."""
        digits = line[1:]
        if not line.startswith(b"$") or not digits.isdigit() or len(digits) > 9 or b"%d" % int(digits) != digits:
            raise unexpected(line, b"$<size>")
        if (size := int(digits)) > _BULK_BYTES:
            raise StreamError(f"a reply claims {size} bytes, more than a server can store in one string")
        return size

    def fill(self, into: memoryview) -> None:
        """The bytes of a bulk as large as `into`, and its end."""
        have = min(len(into), self._end - self._start)
        into[:have] = self._view[self._start : self._start + have]
        self._start += have
        while have < len(into):
            if len(into) - have < _DIRECT_BYTES:
                self._more()
                some = min(len(into) - have, self._end - self._start)
                into[have : have + some] = self._view[self._start : self._start + some]
                self._start += some
                have += some
            else:
                have += self._receive(into[have:], self._flags)
        while self._end - self._start < 2:
            self._more()
        if self._control[self._start : self._start + 2] != b"\r\n":
            raise unexpected(bytes(self._control[self._start : self._start + 2]), b"the end of a bulk")
        self._start += 2

    def _more(self) -> None:
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == _CONTROL_BYTES:
            rest = self._end - self._start
            self._control[:rest] = self._control[self._start : self._end]
            self._start, self._end = 0, rest
        self._end += self._receive(self._view[self._end :], 0)

    def _receive(self, into: memoryview, flags: int) -> int:
        try:
            got = self._socket.recv_into(into, 0, flags) if flags else self._socket.recv_into(into)
        except (BlockingIOError, TimeoutError):
            raise LinkTimeout("the reply did not come, or ended in the middle") from None
        except OSError as error:
            raise LinkError(str(error)) from None
        if not got:
            raise LinkError("the connection was closed by the server")
        return int(got)


def packed(*words: bytes) -> bytes:
    """RESP of one small command."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def unexpected(found: bytes, instead: bytes) -> StreamError:
    return StreamError(
        f"the server sent {found[:60]!r} where {instead[:60]!r} was due",
        next="check that the url leads to a Redis or Valkey server, and look for a proxy in between",
    )


def _said(text: str) -> Exception:
    code = text.split(" ", 1)[0]
    if code == "LOADING":
        return BusyLoadingError(text)
    if code in _SIGN_IN:
        return AuthenticationError(text)
    return NoPermissionError(text) if code == "NOPERM" else ResponseError(text)


def _readable(sock: Any) -> bool:
    """Whether something came, or the other side closed; also when the socket is closed here."""
    if sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
