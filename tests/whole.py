"""Is a served file one whole version? Read it over and over while everything around it breaks."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3


@dataclass(frozen=True)
class Seen:
    """What one reading of a file found: the version it says it is, its release, and a digest of its tensors."""

    version: str
    order: tuple[int, int]
    content: str


def look(path: Path) -> Seen:
    """Reads the file once; a worker replaces it as a whole, so that one open file never changes."""
    data = path.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + header_bytes]), memoryview(data)[8 + header_bytes :]
    facts = header.pop("__metadata__", {})
    hasher = blake3()
    for name, tensor in sorted(header.items()):
        start, end = tensor["data_offsets"]
        assert end <= len(body), f"{path} ends within {name}"
        hasher.update(f"{name} {tensor['dtype']} {tensor['shape']} {end - start}\n".encode())
        hasher.update(body[start:end])
    order = int(facts.get("refleet.epoch", 0)), int(facts.get("refleet.seq", 0))
    return Seen(facts.get("refleet.version", ""), order, hasher.hexdigest())


class Reader:
    """Reads a served file in a thread of its own; `known` are the contents by version, added before they are published.

    `torn` tells of every reading that was no whole version, `back` of every one of an older release than before: that
    may happen where a worker was killed between its switch and its record, and never else.
    """

    def __init__(self, path: Path, known: dict[str, str], *, pause_s: float = 0.02):
        self.path, self._known, self._pause_s = path, known, pause_s
        self.reads, self.torn, self.back = 0, list[str](), list[str]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Reader:
        self._thread.start()
        return self

    def close(self) -> None:
        self._ended.set()
        self._thread.join(20)

    def _run(self) -> None:
        last = (0, 0)
        while not self._ended.wait(self._pause_s):
            try:
                seen = look(self.path)
            except FileNotFoundError:
                continue  # nothing was served yet
            except (AssertionError, ValueError, KeyError) as error:
                self.torn.append(f"{type(error).__name__}: {error}")
                continue
            self.reads += 1
            if self._known.get(seen.version) != seen.content:
                self.torn.append(f"{seen.version} has other content than was published")
            if seen.order < last:
                self.back.append(f"{seen.version}: {seen.order} after {last}")
            last = seen.order
