"""What a trainer wrote, as tensors that can be read block by block: a file, a folder of shards, or a state_dict.

Headers and index are checked completely before the first tensor is read. Files are read with preadv into one buffer of
one block, never mapped: a trainer that truncates and rewrites a file in place would kill this process with SIGBUS.
Instead a short read is CheckpointChanged, and `confirm` compares every file with what it was when it was opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ..common.errors import UnreadableCheckpoint
from ..common.limits import LIMITS
from ..common.types import TensorSpec
from .safetensors_header import Place
from .shards import find_files
from .source_file import SourceFile
from .state_dict import TensorCheckpoint

if TYPE_CHECKING:
    from typing import Self

    import torch


class Checkpoint(Protocol):
    """Tensors that become one version.

    A bad implementation is one whose `confirm` stays silent though two tensors came from different states of the
    source: the version would mix two checkpoints.
    """

    source: str  # for messages
    specs: dict[str, TensorSpec]  # sorted by UTF-8 name

    def blocks(self, name: str, *, block_bytes: int = LIMITS.block_bytes) -> Iterator[memoryview]:
        """The tensor's bytes in C order, little-endian, in read-only blocks of exactly `block_bytes`, the last one
        shorter, none for a zero-size tensor. A block is valid until the next one is taken.

        Raises: CheckpointChanged, UnreadableCheckpoint; KeyError for a name that is not in `specs`.
        """

    def read_into(self, name: str, out: NDArray[np.uint8]) -> None:
        """All of the tensor's bytes into `out`, which has just that size. Raises: as `blocks`."""

    def confirm(self) -> None:
        """Call after the last block. Raises CheckpointChanged if the source changed since it was opened."""

    def close(self) -> None:
        """Drop buffers and references; also done on leaving a `with` block."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_checkpoint(source: str | Path | Mapping[str, torch.Tensor]) -> Checkpoint:
    """Open a `.safetensors` file; a folder with a `*.safetensors.index.json` or exactly one `*.safetensors`; such an
    index file itself; or a mapping of names to tensors. Reads headers only.

    Raises: UnreadableCheckpoint for whatever can't be read completely, LimitExceeded, CheckpointChanged if a file is
    being written at this moment.
    """
    if isinstance(source, Mapping):
        return TensorCheckpoint(source)
    if not isinstance(source, str | os.PathLike):
        hint = "pass model.state_dict()" if hasattr(source, "state_dict") else "pass a path or a state_dict"
        raise UnreadableCheckpoint(f"{type(source).__name__} is not a checkpoint", next=hint)
    files, places = find_files(Path(source))
    return FileCheckpoint(str(source), files, places)


class FileCheckpoint:
    """Tensors in one or more safetensors files."""

    def __init__(self, source: str, files: Sequence[SourceFile], places: Mapping[str, tuple[SourceFile, Place]]):
        self.source = source
        self.specs = {name: places[name][1].spec for name in sorted(places, key=str.encode)}
        self._files, self._places = files, places
        self._largest_bytes = max(spec.size_bytes for spec in self.specs.values())
        # Idle buffers: one, unless a caller reads several tensors at the same time, each of which needs its own.
        self._idle: list[bytearray] = []

    def blocks(self, name: str, *, block_bytes: int = LIMITS.block_bytes) -> Iterator[memoryview]:
        file, place = self._places[name]
        size_bytes = place.spec.size_bytes
        if size_bytes == 0:
            return
        buffer = self._buffer(min(block_bytes, self._largest_bytes))
        view = memoryview(buffer)
        try:
            with file.reading() as descriptor:
                for start in range(0, size_bytes, block_bytes):
                    length = min(block_bytes, size_bytes - start)
                    file.read_into(descriptor, view[:length], place.offset + start)
                    if start + length < size_bytes:
                        file.expect_soon(descriptor, place.offset + start + length, block_bytes)
                    yield view[:length].toreadonly()
        finally:
            self._idle.append(buffer)

    def read_into(self, name: str, out: NDArray[np.uint8]) -> None:
        file, place = self._places[name]
        if out.size:
            with file.reading() as descriptor:
                file.read_into(descriptor, out.data, place.offset)

    def confirm(self) -> None:
        for file in self._files:
            file.confirm()

    def close(self) -> None:
        self._idle.clear()

    def _buffer(self, size_bytes: int) -> bytearray:
        while self._idle:
            buffer = self._idle.pop()
            if len(buffer) >= size_bytes:
                return buffer
        return bytearray(size_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
