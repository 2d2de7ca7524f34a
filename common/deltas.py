"""Versions kept as what changed: the body of a delta, as it was sent, in a file of its own.

    body (encoded blocks), record (StoredDelta), footer

    footer  56 bytes: size of the record (u64), BLAKE3 of the record, magic

A file becomes visible whole and is never changed. It holds tensors like a pack does, only that reading them takes the
tensors that they build on. Which file a digest is in is known from the records.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import wire
from .crashpoint import crash_point
from .digest import digest_of
from .errors import MalformedRecord, RefleetError, StoreError
from .layout import Placed, placed
from .limits import LIMITS
from .records import TempFile
from .types import DTYPE_BYTES, Block, DeltaTensor, Index, Manifest, require, require_digest

if TYPE_CHECKING:
    from typing_extensions import Buffer

_FOOTER = struct.Struct("<Q32s16s")
_MAGIC = b"refleet delta 1\n"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a body, in body order; `base`: digest of the tensor that it is relative to."""

    digest: bytes
    base: bytes | None
    dtype: str
    size_bytes: int

    def __post_init__(self) -> None:
        require_digest(self.digest, "digest of a tensor")
        require_digest(self.base, "digest of a base tensor")
        require(self.dtype in DTYPE_BYTES and self.size_bytes > 0, f"a stored {self.dtype} tensor of {self.size_bytes}")


@wire.record("stored-delta")
@dataclass(frozen=True, slots=True)
class StoredDelta:
    """The table of one file; `target` is the version that it was received or made for."""

    target: bytes
    tensors: tuple[StoredTensor, ...]
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        require_digest(self.target, "target fingerprint")
        whole = sum(tensor.size_bytes for tensor in self.tensors)
        require(sum(block.size_bytes for block in self.blocks) == whole, "blocks that do not fit the tensors")

    @classmethod
    def of(cls, index: Index, order: Iterable[DeltaTensor], base: Manifest | None) -> StoredDelta:
        """Of a delta whose carried tensors are `order`, in body order; without a base none is relative to anything."""
        names = base.by_name if base else {}
        return cls(
            index.target,
            tuple(
                StoredTensor(t.digest, names[t.spec.name].digest if t.based else None, t.spec.dtype, t.spec.size_bytes)
                for t in order
            ),
            index.blocks,
        )


class DeltaFile:
    """A visible file. Its record stays in memory; the body is read with pread: a cut file would kill who maps it."""

    def __init__(self, path: Path, record: StoredDelta):
        self.path, self.record = path, record
        self.digests = frozenset(tensor.digest for tensor in record.tensors)
        self.numbers = {tensor.digest: number for number, tensor in enumerate(record.tensors)}
        #: digests of the tensors that reading any tensor of this file takes
        self.bases = frozenset(tensor.base for tensor in record.tensors if tensor.base is not None)

    @property
    def name(self) -> str:
        """Names sort by age: a later file has the larger one."""
        return self.path.name

    @classmethod
    def open(cls, path: Path) -> DeltaFile:
        """Reads the record. Raises: MalformedRecord for a damaged file, FileNotFoundError, StoreError."""
        with disk_reading(path), path.open("rb") as file:
            return cls._read(path, file.fileno())

    @classmethod
    def _read(cls, path: Path, fd: int) -> DeltaFile:
        file_bytes = os.fstat(fd).st_size
        footer = os.pread(fd, _FOOTER.size, max(file_bytes - _FOOTER.size, 0))
        if len(footer) == _FOOTER.size:
            size, checksum, magic = _FOOTER.unpack(footer)
            start = file_bytes - _FOOTER.size - size
            if magic == _MAGIC and size <= LIMITS.index_bytes and start >= 0:
                data = os.pread(fd, size, start)
                if digest_of(data) == checksum:
                    try:
                        record = wire.unpack(data, StoredDelta, max_bytes=LIMITS.index_bytes)
                        if sum(block.encoded_bytes for block in record.blocks) == start:
                            return cls(path, record)
                    except RefleetError:  # written by another version of this program
                        pass
        raise MalformedRecord("a stored delta is damaged", about=str(path))

    def places(self) -> list[Placed]:
        """All blocks, with the tensors in them."""
        return list(placed((tensor.size_bytes for tensor in self.record.tensors), self.record.blocks))

    @contextmanager
    def reading(self) -> Iterator[Callable[[int, int], bytes]]:
        """Gives `read(offset, size)` of the body; where the file was cut it gives less.

        Raises: FileNotFoundError, StoreError.
        """
        with disk_reading(self.path), self.path.open("rb", buffering=0) as file:
            yield lambda offset, size: os.pread(file.fileno(), size, offset)


@contextmanager
def disk_reading(path: Path) -> Iterator[None]:
    """The system's errors as StoreError; FileNotFoundError as it is: another process may have removed the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"a stored delta can't be read: {error.strerror}", about=str(path)) from error


class DeltaWriter:
    """A file in the making: `write` the body piece by piece, then `finish`. `close` removes what was not renamed."""

    def __init__(self, temp: Path):
        self._temp, self._end = TempFile(temp), 0

    def write(self, data: Buffer) -> None:
        """Raises: StoreFull, StoreError."""
        self._end = self._temp.write(data, at=self._end)

    def finish(self, record: StoredDelta, folder: Path, *, order_lock: Path) -> DeltaFile:
        """Visible as the newest in `folder` from now on, not synced. Raises: StoreFull, StoreError, StoreBusy."""
        data = wire.pack(record)
        end = self._temp.write(data, at=self._end)
        self._temp.write(_FOOTER.pack(len(data), digest_of(data), _MAGIC), at=end)
        crash_point("store.delta-written")
        path = self._temp.rename_as_newest(folder, "delta", order_lock=order_lock, sync=False)
        return DeltaFile(path, record)

    def close(self) -> None:
        self._temp.close()
