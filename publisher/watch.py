"""Publish checkpoints that appear in a folder: `refleet serve --watch`.

A checkpoint is new when its version id (the sanitised stem of its name) was never released from this store: so neither
a restart nor an earlier rollback publishes an old one again. It is whole when nothing about it changed between two
looks and it opens. What can't be published is reported once per change, and the watch goes on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from ..common.errors import (
    CheckpointChanged,
    CheckpointError,
    LimitExceeded,
    RefleetError,
    StoreError,
    StreamError,
    UsageError,
    VersionExists,
)
from ..common.types import VERSION_ID
from .checkpoint import open_checkpoint
from .compare import hashed
from .publish import Publisher
from .published import Published

_SUFFIX = ".safetensors"
_SHARD = re.compile(r"-\d{2,6}-of-\d{2,6}\.safetensors\Z")
#: a publish that the server or the disk refused is tried again after this long, twice as long each time
_RETRY_S, _RETRY_MOST_S = 2.0, 60.0

#: (path, device, inode, size, modified, changed) of every file of a checkpoint
Stamp = tuple[tuple[str, int, int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Found:
    """Something in the folder that looks like a checkpoint."""

    path: Path
    version: str
    stamp: Stamp

    @property
    def modified_ns(self) -> int:
        return max(file[4] for file in self.stamp)


@dataclass(frozen=True, slots=True)
class Happened:
    """What one look led to. `kind`: published, known, broken, rewritten, ambiguous, waiting."""

    kind: str
    text: str
    path: Path
    version: str = ""
    published: Published | None = None
    error: RefleetError | None = None


@dataclass(slots=True)
class Watch:
    """One folder and one publisher. `look` once per poll; `tell` hears what happened."""

    folder: Path
    publisher: Publisher
    tell: Callable[[Happened], None]
    clock: Callable[[], float] = time.monotonic
    _before: dict[Path, Stamp] = field(default_factory=dict)
    _done: dict[Path, Stamp] = field(default_factory=dict)  # published, known or reported in this state
    _folder_error: str = ""
    _retry_at: float = 0.0
    _retry_s: float = _RETRY_S

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise UsageError("the folder to watch is not there", about=str(self.folder), next=f"mkdir -p {self.folder}")

    def look(self) -> None:
        """One poll. Raises: StaleEpoch when another store took over; everything else is told and survived."""
        now = self._scan()
        settled = [found for found in now if self._before.get(found.path) == found.stamp]
        self._before = {found.path: found.stamp for found in now}
        self._done = {path: stamp for path, stamp in self._done.items() if path in self._before}
        fresh = [found for found in settled if self._done.get(found.path) != found.stamp]
        if self.clock() < self._retry_at:
            return
        for found in sorted(fresh, key=lambda found: (found.modified_ns, found.path.name)):
            if not self._take(found, now):
                return

    def _take(self, found: Found, now: list[Found]) -> bool:
        """Deal with one checkpoint. False: the server or disk is in the way, so the later ones wait too."""
        try:
            happened = self._deal(found, now)
        except CheckpointChanged:
            self._before.pop(found.path, None)  # still being written: it has to settle again
            return True
        except (CheckpointError, LimitExceeded) as error:
            happened = Happened(
                "broken", f"{found.path.name} can't be published", found.path, found.version, error=error
            )
        except (StreamError, StoreError) as error:
            self.tell(Happened("waiting", f"{found.path.name} waits", found.path, found.version, error=error))
            self._retry_at = self.clock() + self._retry_s
            self._retry_s = min(2 * self._retry_s, _RETRY_MOST_S)
            return False
        self._retry_s = _RETRY_S
        self._done[found.path] = found.stamp
        if happened.kind != "known":
            self.tell(happened)
        return True

    def _deal(self, found: Found, now: list[Found]) -> Happened:
        same = [other for other in now if other.version == found.version and other.path != found.path]
        known = self.publisher.book.version(found.version)
        if known is None:
            rivals = [other for other in same if (other.modified_ns, other.path) < (found.modified_ns, found.path)]
            if rivals:
                return self._ambiguous(found, rivals[0])
            published = self.publisher.publish(found.path, version=found.version)
            return Happened("published", found.version, found.path, found.version, published)
        untouched = found.path not in self._done and found.modified_ns <= known.created_at_ms * 1_000_000
        if untouched and not same:
            return Happened("known", found.version, found.path, found.version)
        with open_checkpoint(found.path) as checkpoint:
            fingerprint = hashed(checkpoint).fingerprint
        if fingerprint == known.fingerprint:
            return Happened("known", found.version, found.path, found.version)
        if same:
            return self._ambiguous(found, same[0])
        error = VersionExists(
            f"{found.path.name} now holds other content than version {found.version!r} had when it was published",
            about=f"fingerprint {known.fingerprint.hex()[:16]} then, {fingerprint.hex()[:16]} now",
            next="give the new content a file name of its own; a version id never changes its meaning",
        )
        return Happened(
            "rewritten", f"{found.path.name} was not published again", found.path, found.version, error=error
        )

    @staticmethod
    def _ambiguous(found: Found, other: Found) -> Happened:
        error = VersionExists(
            f"{found.path.name} and {other.path.name} would both be version {found.version!r}",
            about=str(found.path),
            next="rename one of them",
        )
        return Happened("ambiguous", f"{found.path.name} was not published", found.path, found.version, error=error)

    def _scan(self) -> list[Found]:
        try:
            paths = sorted(self.folder.iterdir())
        except OSError as error:
            if self._folder_error != str(error):
                self._folder_error = str(error)
                self.tell(Happened("waiting", f"the folder can't be read: {error.strerror}", self.folder))
            return []
        self._folder_error = ""
        found = []
        for path in paths:
            if path.name.startswith(".") or self._is_alias(path):
                continue
            stamp = stamp_of(path)
            if stamp:
                found.append(Found(path, version_id(path), stamp))
        return found

    def _is_alias(self, path: Path) -> bool:
        """A link to something else in this folder, such as `latest`: not a checkpoint of its own."""
        try:
            return path.is_symlink() and path.resolve().is_relative_to(self.folder.resolve())
        except (OSError, RuntimeError):
            return True


def stamp_of(path: Path) -> Stamp:
    """The state of every file of the checkpoint at `path`; () where there is none, or not yet all of it.

    A checkpoint is `NAME.safetensors` (but no single shard), or a folder with an index or a `model.safetensors`.
    """
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.name.endswith((_SUFFIX, f"{_SUFFIX}.index.json")))
            if not any(file.name == f"model{_SUFFIX}" or file.name.endswith(".index.json") for file in files):
                return ()
        elif path.name.endswith(_SUFFIX) and not _SHARD.search(path.name):
            files = [path]
        else:
            return ()
        return tuple(_facts(file) for file in files)
    except OSError:
        return ()  # gone between two steps: the next look sees what is there


def _facts(file: Path) -> tuple[str, int, int, int, int, int]:
    facts = file.stat()
    return (file.name, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


def version_id(path: Path) -> str:
    """A version id out of a file or folder name: what an id can't hold becomes `-`; long names keep a digest."""
    stem = path.name.removesuffix(_SUFFIX)
    text = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-")
    if not text or len(text) > 64:
        text = f"{text[:47]}-{blake3(stem.encode(errors='surrogateescape')).hexdigest(8)}".lstrip("-")
    assert VERSION_ID.match(text), text
    return text
