"""What probes, people and Prometheus may ask a worker over HTTP. Read-only, plain, without access control.

/livez    200 while the worker's loop runs            /status   JSON of everything the worker knows of itself
/readyz   200 while a verified version is served      /metrics  for Prometheus
"""

from __future__ import annotations

import json
import logging
import re
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST

from ..common.errors import UsageError
from .metrics import Metrics, lag_releases

if TYPE_CHECKING:
    from .worker import Worker

_log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
#: a client that is this slow to send its request or to take the answer is dropped
CLIENT_TIMEOUT_S = 10.0
#: beyond so many connections the oldest one is dropped, so that slow clients never keep a probe out
MAX_CONNECTIONS = 32
_ADDRESS = re.compile(r"(?:(\[[:.%\w]+\]|[^:\[\]\s]+):)?([0-9]{1,5})")
_JSON = "application/json"

Answer = tuple[int, str, bytes]  # status, content type, body


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of `[HOST:]PORT`; an IPv6 host stands in brackets. Raises: UsageError."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match[2]) > 65535:
        raise UsageError(
            f"{text!r} is no address to listen on",
            next="write it as PORT, HOST:PORT or [IPV6]:PORT; port 0: any free one",
        )
    return (match[1] or LOOPBACK).strip("[]"), int(match[2])


class HttpFront:
    """Answers for `worker` from threads of its own; a slow or broken client holds up nobody.

    Listens when made, answers from `start` to `close`; or use it in a `with`. `port` 0 takes a free one: see `url`.
    Raises: UsageError when it can't listen there.
    """

    def __init__(self, worker: Worker, *, host: str = LOOPBACK, port: int = 0):
        self.worker, self.metrics = worker, Metrics(worker)
        try:
            self._server = _Server(self, host, port)
        except OSError as error:
            raise UsageError(
                f"can't listen on {host} port {port}: {error.strerror or error}",
                about=f"HTTP of worker {worker.id}",
                next="choose another port; port 0 takes any free one",
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="refleet-http", daemon=True
        )

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def start(self) -> HttpFront:
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop listening and drop the clients that are left. May be called twice."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._server.drop_all()

    def __enter__(self) -> HttpFront:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def answer(self, path: str) -> Answer:
        """What a GET of `path` is answered."""
        routes: dict[str, Callable[[], Answer]] = {
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/status": lambda: _json(HTTPStatus.OK, status_dict(self.worker)),
            "/metrics": lambda: (HTTPStatus.OK, CONTENT_TYPE_LATEST, self.metrics.text()),
        }
        route = routes.get(path.partition("?")[0])
        return _json(HTTPStatus.NOT_FOUND, {"error": "not found", "paths": list(routes)}) if route is None else route()

    def _livez(self) -> Answer:
        crash = self.worker.crash
        reason = None if self.worker.alive else f"{type(crash).__name__}: {crash}" if crash else "the loop does not run"
        return _json(_code(reason is None), {"alive": reason is None, "reason": reason})

    def _readyz(self) -> Answer:
        current, status = self.worker.gate.current, self.worker.board.status
        facts = {
            "ready": current is not None,
            "state": status.state,
            "version": current.version if current else None,
            "reason": None if current else _reason(self.worker),
        }
        return _json(_code(current is not None), facts)


def status_dict(worker: Worker) -> dict[str, object]:
    """Everything the worker says of itself; digests in hex. Stable keys: docs/worker.md."""
    board, status = worker.board, worker.board.status
    plain = _plain(status)
    assert isinstance(plain, dict)
    return plain | {
        "ready": worker.gate.current is not None,
        "reason": None if worker.gate.current else _reason(worker),
        "alive": worker.alive,
        "lag": lag_releases(status),
        "behind_s": round(board.behind_s, 3),
        "silence_s": round(board.silence_s, 3),
        "received_total_bytes": board.received_total,
    }


def _reason(worker: Worker) -> str:
    """Why nothing is served, with the failure that led there if there is one."""
    gate, failure = worker.gate.reason or "", worker.board.status.failure
    return gate if failure is None or failure.what in gate else f"{gate}: {failure.code}: {failure.what}"


def _plain(value: object) -> object:
    """Facts as JSON knows them."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bytes):
        return value.hex()
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _json(status: int, value: object) -> Answer:
    return status, _JSON, json.dumps(value, indent=2).encode() + b"\n"


def _code(ok: bool) -> HTTPStatus:
    return HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, front: HttpFront, host: str, port: int):
        self.front = front
        self._open: dict[int, socket.socket] = {}  # by file number, oldest first
        self._dropped: set[int] = set()  # those of them that were told to end
        self._changed = threading.Condition()
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # the one above asks the DNS for this host's name, which may take long

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            waiting = [number for number in self._open if number not in self._dropped]
            self._drop(waiting[: len(waiting) + 1 - MAX_CONNECTIONS])
            self._open[request.fileno()] = request
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        number = request.fileno()
        with self._changed:
            self._open.pop(number, None)
            self._dropped.discard(number)
            super().shutdown_request(request)  # inside the lock: the number is free for the next one only afterwards
            self._changed.notify_all()

    def drop_all(self) -> None:
        with self._changed:
            self._drop(list(self._open))
            self._changed.wait_for(lambda: not self._open, CLIENT_TIMEOUT_S)

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            self._dropped.add(number)
            with suppress(OSError):
                self._open[number].shutdown(socket.SHUT_RDWR)  # wakes the thread that serves it, which closes it

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """A client that went away is no event; a mistake of ours is."""
        if not isinstance(sys.exc_info()[1], OSError):
            _log.exception("answering a request failed")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = CLIENT_TIMEOUT_S
    server_version, sys_version = "refleet", ""
    error_content_type, error_message_format = "text/plain; charset=utf-8", "%(code)d %(message)s\n"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _refuse(self) -> None:
        self._send((HTTPStatus.METHOD_NOT_ALLOWED, "text/plain; charset=utf-8", b"only GET and HEAD\n"), with_body=True)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse  # noqa: N815

    def _answer(self, *, with_body: bool) -> None:
        try:
            answer = self.server.front.answer(self.path)
        except Exception:  # a mistake of ours, told to whoever asks and to the log
            _log.exception("answering %s failed", self.path)
            answer = (HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", b"500: see the worker's log\n")
        self._send(answer, with_body=with_body)

    def _send(self, answer: Answer, *, with_body: bool) -> None:
        status, content_type, body = answer
        self.send_response(status)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Probes come every few seconds: their log would hide the worker's own."""
