"""Rebuilt tensors that all workers of a host share: decoded and hashed by one of them, mapped by the others.

    /dev/shm/refleet-<user>-<id of what is shared>/NAME.image     tensors and their table, as in a pack (host_image.py)

An image stays as long as one of the workers needs a tensor that it has no newer copy of. What nobody looks at is
overwritten by the next version, or removed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from .errors import MalformedRecord, StoreError
from .folder_stamp import FolderStamp
from .host_image import Image, Making, images, sweep
from .memory import Bytes, Memory
from .shm import SHM, own_folder


class HostMemory(Memory):
    """The memory of one process over the images of its host. What does not fit into `/dev/shm` stays private."""

    def __init__(self, shared_id: str, *, shm: Path = SHM):
        """For everybody who names the same `shared_id`. Raises: StoreError when the folder is somebody else's."""
        super().__init__()
        self.folder = shm / f"refleet-{os.getuid()}-{shared_id}"
        self._stamp = FolderStamp(self.folder)
        self._images: dict[str, Image] = {}
        self._where: dict[bytes, Image] = {}  # digest -> the newest image that holds it
        self._forgotten: set[tuple[str, bytes]] = set()  # (image, digest): bytes that proved damaged
        self._making: list[Making] = []
        own_folder(self.folder)
        sweep(self.folder)
        self._sweep_others()

    @property
    def size_bytes(self) -> int:
        with self._guard:
            shared = sum(image.data.size for image in self._images.values())
        return shared + super().size_bytes

    def take_all(self, sizes: Iterable[int]) -> list[Bytes]:
        """Buffers that `put` makes visible to the other workers, side by side in one image."""
        wanted = list(sizes)
        if any(wanted):
            with suppress(OSError, StoreError):  # no room there, or the folder was taken from us
                return self._make(wanted)
        return super().take_all(wanted)

    def get(self, digest: bytes) -> Bytes | None:
        found = super().get(digest)
        if found is not None:
            return found
        with self._guard:
            if digest not in self._where:
                self._look()
            image = self._where.get(digest)
            return image.read(digest) if image else None

    def put(self, found: Mapping[bytes, Bytes]) -> None:
        rest = dict(found)
        with self._guard:
            for making in list(self._making):
                places = {digest: place for digest, data in rest.items() if (place := making.place(data))}
                if places:
                    self._making.remove(making)
                    with suppress(OSError, MalformedRecord):  # the folder was removed: they stay ours alone
                        self._take(Image.open(making.finish(places)))
                        rest = {digest: data for digest, data in rest.items() if digest not in places}
        super().put(rest)

    def drop(self, digest: bytes) -> None:
        super().drop(digest)
        with self._guard:
            self._forgotten.update((name, digest) for name, each in self._images.items() if digest in each.objects)
            self._index()

    def trim(self, *, free: bool = False) -> None:
        super().trim(free=free)
        with self._guard:
            self._images = {name: self._images[name] for name in self._needed()}
            self._stamp = FolderStamp(self.folder)  # another worker's image may be wanted again
            self._index()

    def close(self) -> None:
        super().close()
        sweep(self.folder)
        with suppress(OSError):  # others use it
            self.folder.rmdir()

    # ------------------------------------------------------------------ images

    def _make(self, sizes: list[int]) -> list[Bytes]:
        """Raises: OSError, StoreError."""
        with self._guard:
            own_folder(self.folder)
            making = Making(self.folder, sizes, self._survivors())
            self._making = [*(each for each in self._making if each.alive), making]
            buffers, making.buffers = making.buffers, []
            return buffers

    def _sweep_others(self) -> None:
        """Workers that were all killed, and whose store nobody opens any more, left their memory behind."""
        for folder in self.folder.parent.glob(f"refleet-{os.getuid()}-{'[0-9a-f]' * 32}"):
            with suppress(OSError, StoreError):  # in use, or somebody else's
                own_folder(folder)
                sweep(folder)
                if folder != self.folder:
                    folder.rmdir()

    def _survivors(self) -> dict[bytes, Bytes]:
        """What is needed of images that are mostly garbage. It moves into the next one, so that these can go."""
        found: dict[bytes, Bytes] = {}
        for name, digests in self._needed().items():
            image = self._images[name]
            if 2 * sum(image.objects[digest][1] for digest in digests) < image.data.size:
                found.update((digest, image.read(digest)) for digest in digests)
        return found

    def _needed(self) -> dict[str, list[bytes]]:
        """By image, the tensors that are kept and that no newer image has."""
        needed: dict[str, list[bytes]] = {}
        for digest in self._kept() - self._held.keys():
            if digest in self._where:
                needed.setdefault(self._where[digest].name, []).append(digest)
        return needed

    def _look(self) -> None:
        """Map what others made since the last look."""
        with suppress(StoreError):  # there is no folder any more
            if not self._stamp.changed():
                return
        for path in images(self.folder):
            if path.name not in self._images:
                with suppress(OSError, MalformedRecord):  # gone, being overwritten, or no image of this program
                    self._take(Image.open(path))
        self._forgotten = {(name, digest) for name, digest in self._forgotten if name in self._images}

    def _take(self, image: Image) -> None:
        self._images[image.name] = image
        self._index()

    def _index(self) -> None:
        self._where = {
            digest: image
            for name, image in sorted(self._images.items())
            for digest in image.objects
            if (name, digest) not in self._forgotten
        }
