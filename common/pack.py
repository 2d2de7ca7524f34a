"""Pack files: many tensors' bytes in one append-only file, found by digest.

    object, padding to 64 bytes, object, ..., table, footer

    table   one line of 48 bytes per object: digest, offset (u64), size (u64), little-endian
    footer  64 bytes: offset of the table (u64), number of lines (u64), BLAKE3 of table and these two, magic

A pack is written under a temporary name and becomes visible whole; nothing changes it afterwards.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .crashpoint import crash_point
from .digest import TensorHasher, digest_of, tensor_digest
from .errors import DamagedTensor, DigestMismatch, MalformedRecord, StoreError
from .limits import MIB
from .records import TempFile

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: a batch starts a new pack beyond this, so that a crash loses little
PACK_BYTES = 256 * MIB
#: of every object, in the file and so in memory: what vector instructions like best
ALIGN_BYTES = 64

_LINE = struct.Struct("<32sQQ")
_FOOTER = struct.Struct("<QQ32s16s")
_COUNTS = struct.Struct("<QQ")
_MAGIC = b"refleet pack 1\r\n"
_BUFFER_BYTES = MIB  # gathers small tensors, many of which are dropped again; larger blocks are never copied
HEAL = "fetch or publish a version with this tensor again: that replaces the damaged copy"


def aligned(size_bytes: int) -> int:
    """Bytes that an object takes in a pack."""
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


def table_size(objects: int) -> int:
    """Bytes of table and footer."""
    return objects * _LINE.size + _FOOTER.size


def table_bytes(objects: Mapping[bytes, tuple[int, int]], *, at: int) -> bytes:
    """Table and footer of `objects` (digest -> offset, size), which lie before offset `at`."""
    table = b"".join(_LINE.pack(digest, *place) for digest, place in objects.items())
    counts = _COUNTS.pack(at, len(objects))
    return table + counts + digest_of(table, counts) + _MAGIC


class Pack:
    """A visible pack. Its table stays in memory; the file is mapped when something is first read."""

    def __init__(self, path: Path, objects: dict[bytes, tuple[int, int]], *, file_bytes: int):
        self.path, self.objects, self.file_bytes = path, objects, file_bytes
        self.data_bytes = sum(aligned(size) for _, size in objects.values())
        self._map: mmap.mmap | None = None

    @property
    def name(self) -> str:
        """Names sort by age: a later pack has the larger one."""
        return self.path.name

    @classmethod
    def open(cls, path: Path) -> Pack:
        """Reads the table. Raises: MalformedRecord for a damaged one, FileNotFoundError, StoreError."""
        try:
            with path.open("rb") as file:
                return cls.read_table(path, file.fileno())
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"a pack of tensors can't be read: {error.strerror}", about=str(path)) from error

    @classmethod
    def read_table(cls, path: Path, fd: int) -> Pack:
        """The pack in the open file `fd`. Raises: MalformedRecord."""
        file_bytes = os.fstat(fd).st_size
        footer = os.pread(fd, _FOOTER.size, max(file_bytes - _FOOTER.size, 0))
        if len(footer) == _FOOTER.size:
            start, count, checksum, magic = _FOOTER.unpack(footer)
            # the sum is checked first: it bounds what the next line reads
            if magic == _MAGIC and start + count * _LINE.size + _FOOTER.size == file_bytes:
                table = os.pread(fd, count * _LINE.size, start)
                if digest_of(table, footer[: _COUNTS.size]) == checksum:
                    objects = {digest: (offset, size) for digest, offset, size in _LINE.iter_unpack(table)}
                    return cls(path, objects, file_bytes=file_bytes)
        raise MalformedRecord("the table of a pack of tensors is damaged", about=str(path), next=HEAL)

    def read(self, digest: bytes, *, verify: bool) -> memoryview:
        """The object's bytes, a writable private mapping: writing into it changes neither file nor other readers.

        It stays valid whatever happens to this object and to the file's name.
        Raises: DamagedTensor, FileNotFoundError when another process removed the pack.
        """
        offset, size_bytes = self.objects[digest]
        mapped = self._map = self._map or self._open_map(digest)
        # asked anew each time: touching a page beyond the end of a file that was cut would kill the process (SIGBUS)
        if offset + size_bytes > min(len(mapped), mapped.size()):
            raise self._damaged(digest, "its file was cut")
        view = memoryview(mapped)[offset : offset + size_bytes]
        if verify and tensor_digest(view) != digest:
            raise self._damaged(digest, "its bytes no longer match their digest")
        return view

    def close(self) -> None:
        """Lets go of the mapping, which ends with the last view of it. Reading again maps again."""
        self._map = None  # not `mmap.close`: that fails while views exist, and races with readers in other threads

    def _open_map(self, digest: bytes) -> mmap.mmap:
        try:
            with self.path.open("rb") as file:
                length = min(os.fstat(file.fileno()).st_size, self.file_bytes)
                if not length:
                    raise self._damaged(digest, "its file was cut")
                return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"a pack can't be mapped: {error.strerror}", about=str(self.path)) from error

    def _damaged(self, digest: bytes, how: str) -> DamagedTensor:
        about = f"tensor {digest.hex()} in {self.path}"
        return DamagedTensor(f"a stored tensor is damaged: {how}", digest=digest, about=about, next=HEAL)


class PackWriter:
    """A pack in the making. `close` removes what was not committed.

    The file holds `_in_file` bytes, the buffer follows, and `_end` is where the last complete object ends. The buffer
    is our own, because one of Python's can't give up bytes without writing them first, which fails on a full disk.
    """

    def __init__(self, temp: Path):
        self._temp = TempFile(temp)
        self._end = self._in_file = 0
        self._buffer = bytearray()
        self._stray = False  # a write failed, part of it may be in the file
        self.objects: dict[bytes, tuple[int, int]] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of all objects so far, padding included."""
        return self._end

    @property
    def file_bytes(self) -> int:
        """Size of the finished file."""
        return self._end + table_size(len(self.objects))

    def add(self, blocks: Iterable[Buffer], *, expect: bytes | None, known: Container[bytes]) -> bytes:
        """Appends one object unless its digest is in `known` or in this pack; returns the digest.

        On any exception the pack is as before the call. Raises: DigestMismatch, StoreFull, StoreError, and whatever
        iterating `blocks` raises.
        """
        present = expect is not None and (expect in self.objects or expect in known)  # then there is only to check
        start = end = aligned(self._end)
        hasher = TensorHasher()
        try:
            for block in blocks:
                view = memoryview(block)
                if not view.nbytes:
                    continue  # `cast` refuses them
                view = view.cast("B")
                hasher.update(view)
                if not present:
                    if end == start:
                        self._write(bytes(start - self._end))
                    self._write(view)
                end += len(view)
            digest = hasher.digest()
            if expect is not None and digest != expect:
                raise DigestMismatch(
                    "a tensor's bytes differ from what was announced",
                    about=f"tensor {digest.hex()}, expected {expect.hex()}",
                )
            if present or end == start or digest in self.objects or digest in known:
                return digest
            self._end = end
            self.objects[digest] = (start, end - start)
        finally:
            self._give_up_rest()
        crash_point("store.object-written")
        return digest

    def finish(self) -> TempFile:
        """Writes table and footer and syncs; the caller renames the file into place, then calls `close`."""
        self._write(table_bytes(self.objects, at=self._end))
        self._flush()
        self._temp.sync("pack")
        return self._temp

    def close(self) -> None:
        self._temp.close()

    def _write(self, data: bytes | memoryview) -> None:
        if len(self._buffer) + len(data) <= _BUFFER_BYTES:
            self._buffer += data
            return
        self._flush()
        self._to_file(data)

    def _flush(self) -> None:
        self._to_file(bytes(self._buffer))  # a copy: an error's traceback would keep a view, and so the buffer's size
        self._buffer.clear()

    def _to_file(self, data: Buffer) -> None:
        self._stray = True
        self._in_file = self._temp.write(data, at=self._in_file)
        self._stray = False

    def _give_up_rest(self) -> None:
        """Back to the last complete object, at once: a dropped tensor of gigabytes should never reach the disk."""
        del self._buffer[max(self._end - self._in_file, 0) :]
        if self._stray or self._in_file > self._end:
            self._in_file = min(self._in_file, self._end)
            self._temp.cut(self._in_file)
            self._stray = False
