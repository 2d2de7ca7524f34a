"""The manifests of a store: one record per version held, named by its fingerprint."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from . import wire
from .digest import digest_of
from .errors import LimitExceeded, MalformedRecord, UnknownVersion
from .limits import LIMITS
from .records import disk_errors, read_file, remove, sync_path, write_file
from .types import Manifest
from .unsettled import Unsettled

#: tensors in all manifests that stay in memory: 100 MB of them at most
_REMEMBERED = 1 << 18


class Manifests:
    """The records in `folder`; `temp` takes records in the making."""

    def __init__(self, folder: Path, *, temp: Path, unsettled: Unsettled):
        self.folder, self._temp, self._unsettled = folder, temp, unsettled
        # by the digest of their records, oldest first: whoever asks again spares the unpacking, never the checksum
        self._remembered: dict[bytes, Manifest] = {}

    def put(self, manifest: Manifest) -> None:
        """Held from now on, durable once it is settled. Raises: StoreFull, StoreError."""
        path, data = self._path(manifest.fingerprint), wire.pack(manifest)
        if not self._holds(path, data):  # what is durable must not be replaced by what is not yet
            write_file(path, data, temp=self._temp, sync=False)
        self._unsettled.add(path)
        remove(self._damaged_path(manifest.fingerprint))
        self._remember(digest_of(data), manifest)

    @staticmethod
    def _holds(path: Path, data: bytes) -> bool:
        with suppress(MalformedRecord):
            return read_file(path) == data
        return False

    def get(self, fingerprint: bytes) -> Manifest:
        """Raises: UnknownVersion, also for a damaged one, which is then put aside."""
        path = self._path(fingerprint)
        how = "is not in this store"
        try:
            data = read_file(path)
            if data is not None:
                manifest = self._unpacked(data)
                if manifest.fingerprint == fingerprint:
                    return manifest
                raise MalformedRecord("the manifest of another version")
        except (MalformedRecord, LimitExceeded):
            how = "can't be used: its manifest is damaged"
            with suppress(OSError):  # a read-only disk: then it is found damaged again next time
                path.rename(self._damaged_path(fingerprint))
        raise UnknownVersion(
            f"version {fingerprint.hex()[:16]} {how}",
            about=str(path),
            next="fetch or publish this version again",
        )

    def held(self) -> list[bytes]:
        """Fingerprints of all versions held, sorted."""
        return sorted(bytes.fromhex(path.name) for path in self.folder.iterdir() if len(path.name) == 64)

    def drop(self, keep: Collection[bytes], *, grace_s: float) -> tuple[tuple[bytes, ...], int]:
        """Removes those not in `keep` and older than `grace_s`; returns them, and the bytes freed."""
        removed = tuple(f for f in self.held() if f not in keep and self._age_s(f) >= grace_s)
        freed_bytes = sum(remove(self._path(fingerprint)) for fingerprint in removed)
        if removed:
            with disk_errors(self.folder):
                sync_path(self.folder)  # before its tensors go: a power cut must not bring a manifest back
        return removed, freed_bytes

    def live(self, kept: frozenset[bytes]) -> tuple[set[bytes], set[bytes]]:
        """Digests that the manifests need, and those of `kept` whose manifest is damaged."""
        live: set[bytes] = set()
        whole: set[bytes] = set()
        for fingerprint in self.held():
            with suppress(UnknownVersion):  # damaged; put aside now, if it was not before
                live |= stored_digests(self.get(fingerprint))
                whole.add(fingerprint)
        aside = {bytes.fromhex(path.stem) for path in self.folder.glob("*.damaged")}
        return live, ((aside | set(self.held())) & kept) - whole

    def drop_damaged(self, keep: Iterable[bytes]) -> int:
        """Removes what was put aside, but for `keep`; returns the bytes freed."""
        kept = set(keep)
        return sum(remove(p) for p in self.folder.glob("*.damaged") if bytes.fromhex(p.stem) not in kept)

    def _unpacked(self, data: bytes) -> Manifest:
        """Raises: MalformedRecord, LimitExceeded."""
        key = digest_of(data)
        manifest = self._remembered.get(key) or wire.unpack(data, Manifest, max_bytes=LIMITS.index_bytes)
        self._remember(key, manifest)
        return manifest

    def _remember(self, key: bytes, manifest: Manifest) -> None:
        """As the newest."""
        older = [item for item in self._remembered.items() if item[0] != key]
        tensors = len(manifest.tensors) + sum(len(each.tensors) for _, each in older)
        while older and tensors > _REMEMBERED:
            tensors -= len(older.pop(0)[1].tensors)
        self._remembered = {**dict(older), key: manifest}  # at once: other threads look into it

    def _path(self, fingerprint: bytes) -> Path:
        return self.folder / fingerprint.hex()

    def _damaged_path(self, fingerprint: bytes) -> Path:
        return self.folder / f"{fingerprint.hex()}.damaged"

    def _age_s(self, fingerprint: bytes) -> float:
        try:
            return time.time() - self._path(fingerprint).stat().st_mtime
        except FileNotFoundError:
            return 0.0


def stored_digests(manifest: Manifest) -> set[bytes]:
    """What a store has to hold for it: zero-size tensors are never stored."""
    return {entry.digest for entry in manifest.tensors if entry.spec.size_bytes}
