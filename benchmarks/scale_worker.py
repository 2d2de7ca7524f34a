"""Light clients of the scale benchmark, until SIGTERM: they follow the log, fetch what they are sent, throw it away,
and say that they serve it: what a worker costs the publisher and the server, without what it costs its own host.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from refleet.common import wire
from refleet.common.messages import Ack, Evidence, Release, Serving, WorkerStatus
from refleet.common.redis_stream import RedisStream
from refleet.common.signing import open_envelope

NONE = "none"


class Light:
    """One client. Its records are those of a worker; its evidence is a lie, which only a benchmark may tell."""

    def __init__(self, url: str, model: str, name: str):
        self.stream, self.name, self.serving = RedisStream(url, model), name, None

    def beat(self) -> None:
        have = (self.serving.fingerprint,) if self.serving else ()
        status = WorkerStatus(
            worker=self.name, instance=f"{int(self.name[1:]):032x}", model=self.stream.model,
            state="SERVING" if self.serving else "JOINING", serving=self.serving, target=self.serving,
            evidence=Evidence.SERVING if self.serving else Evidence.NONE, failure=None, received_bytes=0,
            expected_bytes=0, have=have, want=None, epoch=self.serving.epoch if self.serving else 0, refused=0,
            last_refusal=None, signed=False, engine_build=NONE, heartbeat_s=1.0, started_at_ms=int(time.time() * 1000),
        )  # fmt: skip
        self.stream.beat(self.name, wire.pack(status))

    def take(self, release: Release) -> None:
        ref = release.payload
        for number in range(ref.body_chunks + ref.index_chunks) if ref else ():
            self.stream.chunks(ref.payload_id, number, 1, carrier=ref.carrier)
        self.serving = Serving(release.version, release.epoch, release.seq, release.fingerprint)
        self.beat()
        ack = Ack(
            self.name, release.model, release.epoch, release.seq, release.version, Evidence.SERVING,
            release.fingerprint, release.version, NONE, release.payload_bytes,
        )  # fmt: skip
        self.stream.ack(self.name, wire.pack(ack))

    def follow(self, done: threading.Event) -> None:
        after, control = self.stream.last_ids()
        self.beat()
        beaten = time.monotonic()
        while not done.is_set():
            found = self.stream.read(after, control, block_s=0.5)
            if found.log:
                after, data = found.log[-1]
                self.take(wire.unpack(open_envelope(data, None).payload, Release))
            if found.control:
                control = found.control[-1][0]
            if time.monotonic() - beaten >= 1:
                self.beat()
                beaten = time.monotonic()
        self.stream.leave(self.name)
        self.stream.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, required=True)
    options = parser.parse_args()
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    clients = [Light(options.url, options.model, f"w{n}") for n in range(options.clients)]
    with ThreadPoolExecutor(options.clients) as pool:
        running = [pool.submit(client.follow, done) for client in clients]
        wait(running, return_when=FIRST_EXCEPTION)
        done.set()
    for one in running:
        one.result()
    return 0


if __name__ == "__main__":
    sys.exit(main())
