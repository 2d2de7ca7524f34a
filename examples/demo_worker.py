"""One worker process of the demo: follows the model and answers requests over HTTP on this machine.

    python examples/demo_worker.py --redis redis://127.0.0.1:6379 --model digits --id worker-1 --state DIR

Prints one JSON object per line: {"port": ...} first, then every change of the worker's state. Ends when its standard
input does, so that it never outlives whoever started it.

    POST /ask {"images": [[64 grey values in 0 ... 16], ...]}
        -> {"version", "fingerprint", "logits": "hex of bf16, images x 10"}; 503 while nothing is served
    POST /break {"how": "flip" | "lie"}    only with --breakable, for the demo's own tests: really flips a bit of a
        live weight, or makes the next answer claim another version
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

import torch
from demo_model import DigitReader, answer, probe_inputs, served_network
from refleet.common.errors import NotServing
from refleet.worker import TorchEngine, Worker
from refleet.worker.board import Event

_REQUEST_BYTES = 8 << 20
#: versions kept on disk: a rollback to any of them moves no byte
_KEEP = 32


class Desk(ThreadingHTTPServer):
    """Answers requests with the network, each one wholly from one version."""

    daemon_threads = True

    def __init__(self, worker: Worker, network: DigitReader, *, breakable: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.worker, self.network, self.breakable = worker, network, breakable
        self.lies = False

    def ask(self, images: list[list[int]]) -> dict[str, str]:
        with self.worker.serving(timeout_s=5) as version:
            logits = answer(self.network, images)
        claimed = "step-of-another-day" if self.lies else version.id
        self.lies = False
        return {"version": claimed, "fingerprint": version.fingerprint.hex(), "logits": logits.hex()}

    def break_it(self, how: str) -> dict[str, str]:
        """Damage this worker for real."""
        if how == "lie":
            self.lies = True
            return {"broken": "the version id in answers"}
        with torch.no_grad():  # the highest bit of the exponent: the answers can't stay the same
            self.network.mouth.weight.view(torch.int16)[3, 5] ^= 0x4000
        return {"broken": "mouth.weight[3, 5]"}


class Handler(BaseHTTPRequestHandler):
    server: Desk

    def do_POST(self) -> None:
        try:
            size = int(self.headers.get("Content-Length", "0"))
            if not 0 < size <= _REQUEST_BYTES:
                self._send(413, {"error": f"a request of {size} bytes"})
                return
            request = json.loads(self.rfile.read(size))
            if self.path == "/ask":
                self._send(200, self.server.ask(request["images"]))
            elif self.path == "/break" and self.server.breakable:
                self._send(200, self.server.break_it(request["how"]))
            else:
                self._send(404, {"error": f"no {self.path} here"})
        except NotServing as error:
            self._send(503, {"error": str(error)})
        except (ValueError, KeyError, TypeError, RuntimeError) as error:  # not JSON, not images, not 64 pixels
            self._send(400, {"error": f"{type(error).__name__}: {error}"})

    def _send(self, status: int, content: dict[str, str]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Not a line for each request."""


def say(**facts: object) -> None:
    """One line for the parent process."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def report(event: Event) -> None:
    say(state=event.state, text=event.text)


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description="A worker process of the demo.")
    parser.add_argument("--redis", required=True, help="URL of the server")
    parser.add_argument("--model", required=True)
    parser.add_argument("--id", required=True)
    parser.add_argument("--state", required=True, type=Path, help="this worker's folder")
    parser.add_argument("--breakable", action="store_true", help="answer POST /break (for tests)")
    given = parser.parse_args()
    network = served_network()
    worker = Worker(
        given.redis, model=given.model, engine=TorchEngine(network, probe_inputs=probe_inputs()),
        state_dir=given.state, worker_id=given.id, keep=_KEEP, heartbeat_s=0.5, on_event=report,
    )  # fmt: skip
    desk = Desk(worker, network, breakable=given.breakable)
    threading.Thread(target=desk.serve_forever, name="desk", daemon=True).start()
    say(port=desk.server_port)
    with worker:
        while sys.stdin.buffer.read(4096):  # nothing is ever sent; the end of it means the parent is gone or done
            pass
    desk.shutdown()
    sys.exit(0)


if __name__ == "__main__":
    main()
