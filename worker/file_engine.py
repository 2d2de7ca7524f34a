"""An engine that is a file: PATH always holds one complete verified version as safetensors.

Another process reads it (a server that reloads on change, a batch job at its next start). A reader that opened the old
file keeps the old file: the new one replaces it by rename, whole or not at all.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ..common.crashpoint import crash_point
from ..common.digest import tensor_digest, tensor_digest_of
from ..common.errors import DigestMismatch, NotRefittable, RefitFailed, UsageError
from ..common.limits import KIB, LIMITS
from ..common.messages import Serving
from ..common.records import sync_path
from ..common.types import Manifest, TensorSpec
from .engine import Digest, StagedVersion, check_specs
from .on_serving import parse_command, run_command

READ_BYTES = 1024 * KIB  # stays in the L2 cache between the read and the hash
TEMP_SUFFIX = ".refleet-tmp"
METADATA_BYTES = 512  # more than `refleet.*` ever takes: version ids have 64 characters


class FileEngine:
    """Keeps the served version at `path`. `on_serving`: a command line to run after each switch, without a shell.

    Raises: UsageError when `path` can't be such a file: its folder is missing, it is a folder, or it holds something
    that is not safetensors and that a version would overwrite.
    """

    build = "file safetensors"
    applied = ""  # there is only one way

    def __init__(self, path: Path | str, *, on_serving: str | None = None, command_timeout_s: float = 30.0) -> None:
        given = Path(path).expanduser().absolute()
        about = f"engine file:{path}"
        if not given.parent.is_dir():
            raise UsageError(f"there is no folder {given.parent}", about=about, next=f"mkdir -p {given.parent}")
        self.path = given.parent.resolve() / given.name  # a link at PATH itself is replaced, not followed
        if self.path.is_dir():
            raise UsageError(
                f"{self.path} is a folder: a file engine needs the path of a file",
                about=about,
                next=f"for example file:{self.path / 'model.safetensors'}",
            )
        self._command = None if on_serving is None else parse_command(on_serving)
        self._command_timeout_s = command_timeout_s
        self._temp_prefix = f".{self.path.name}."
        try:
            # One worker per file, so every temp file of this name was left by a crash.
            for left in self.path.parent.iterdir():
                if left.name.startswith(self._temp_prefix) and left.name.endswith(TEMP_SUFFIX):
                    left.unlink()
            self._specs = self._held_specs()
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}", about=about) from error
        except ValueError as error:
            raise UsageError(
                f"{self.path} exists and is no complete safetensors file ({error}): refusing to overwrite it",
                about=about,
                next=f"move it away: mv {self.path} {self.path}.old",
            ) from error

    def check(self, manifest: Manifest, *, restructure: bool = False) -> None:
        """Any first version is accepted, later ones only with the names, dtypes and shapes of the file, unless
        `restructure`: the file is written anew as a whole."""
        # A file that was damaged while we run: then the last known specs decide, and apply heals it.
        with suppress(OSError, ValueError):
            self._specs = self._held_specs()
        if self._specs is not None and not restructure:
            check_specs(manifest, self._specs, holder=f"the file {self.path}")
        size = METADATA_BYTES + len(_header(manifest, {})[0])
        if size > LIMITS.header_bytes:
            raise NotRefittable(f"the file's header would have {size} bytes, the limit is {LIMITS.header_bytes}")

    def prepare(self, staged: StagedVersion, changed: frozenset[str]) -> bool:  # noqa: ARG002
        """Nothing to do: readers keep the old file while the new one is written."""
        return False

    def apply(self, staged: StagedVersion, changed: frozenset[str]) -> None:  # noqa: ARG002
        """Write the whole version beside PATH, one tensor at a time, and rename it over PATH.

        Raises: RefitFailed, DigestMismatch, or an error of `staged.read`; PATH then holds what it held before, unless
        the very last step, fsync of the folder, failed.
        """
        self.check(staged.manifest, restructure=staged.restructure)
        temp = self.path.with_name(f"{self._temp_prefix}{os.getpid()}{TEMP_SUFFIX}")
        try:
            try:
                self._write(temp, staged)
                crash_point("file_engine.written")
                temp.replace(self.path)
            except BaseException:
                temp.unlink(missing_ok=True)
                raise
            crash_point("file_engine.renamed")
            sync_path(self.path.parent)
        except OSError as error:
            raise RefitFailed(
                f"{self.path} could not be written: {error.strerror or error}",
                about=f"version {staged.serving.version}",
                next=f"df -h {self.path.parent}",
            ) from error
        self._specs = staged.manifest.specs

    def _write(self, temp: Path, staged: StagedVersion) -> None:
        serving = staged.serving
        facts = {
            "refleet.epoch": str(serving.epoch),
            "refleet.fingerprint": serving.fingerprint.hex(),
            "refleet.seq": str(serving.seq),
            "refleet.version": serving.version,
        }
        header, order = _header(staged.manifest, facts)
        with open(temp, "xb", buffering=0) as file:
            with suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(self.path.stat().st_mode))  # who could read it still can
            _write_all(file, memoryview(header))
            for spec in order:
                data = staged.read(spec.name)
                # The last look before readers see it: bytes that rotted since staging never reach PATH.
                if len(data) != spec.size_bytes or tensor_digest(data) != staged.manifest.by_name[spec.name].digest:
                    raise DigestMismatch(
                        f"the staged bytes of tensor {spec.name!r} are not those of its digest",
                        about=f"version {serving.version}",
                        tensor=spec.name,
                    )
                _write_all(file, data)
            os.fsync(file.fileno())

    def read_back(self, names: Iterable[str], digest: Digest = tensor_digest_of) -> Iterator[tuple[str, bytes]]:
        buffer = memoryview(bytearray(READ_BYTES))
        try:
            with open(self.path, "rb", buffering=0) as file:
                held = _read_header(file)
                for name in names:
                    if name not in held:
                        raise DigestMismatch(f"{self.path} has no tensor {name!r}", tensor=name)
                    spec, start = held[name]
                    yield name, digest(_range(file, start, spec.size_bytes, buffer))
        except (OSError, ValueError) as error:
            raise DigestMismatch(f"{self.path} can't be read back: {error}") from error

    def probe(self) -> bytes | None:
        """None: whoever reads the file runs the model."""
        return None

    def content_digest(self) -> bytes | None:
        """None: the file also names the release, so two files of one version differ."""
        return None

    def served(self, serving: Serving) -> str | None:
        """Run the `on_serving` command; its failure is a warning, as the version is in the file already."""
        if self._command is None:
            return None
        facts = {
            "REFLEET_VERSION": serving.version,
            "REFLEET_FINGERPRINT": serving.fingerprint.hex(),
            "REFLEET_PATH": str(self.path),
        }
        return run_command(self._command, facts, timeout_s=self._command_timeout_s)

    def close(self) -> None:
        """Nothing is held open; the file stays."""

    def _held_specs(self) -> dict[str, TensorSpec] | None:
        """What the file holds; None without one (an empty file, as `touch` and `mktemp` make, is none)."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            return None
        with open(self.path, "rb", buffering=0) as file:
            return {name: spec for name, (spec, _) in _read_header(file).items()}


def _header(manifest: Manifest, facts: dict[str, str]) -> tuple[bytes, list[TensorSpec]]:
    """The file's bytes before the first tensor, and the order of tensors: widest elements first, then by name.

    That order aligns every tensor to its element size, as the format allows no gaps; the padded header aligns the
    first one to 8.
    """
    order = sorted((entry.spec for entry in manifest.tensors), key=lambda s: (-s.item_bytes, s.name.encode()))
    table: dict[str, object] = {"__metadata__": facts}
    start = 0
    for spec in order:
        stop = start + spec.size_bytes
        table[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _read_header(file: BinaryIO) -> dict[str, tuple[TensorSpec, int]]:
    """Spec and start in the file of every tensor. Raises: ValueError for anything but a complete safetensors file."""
    file_bytes = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(LIMITS.header_bytes, file_bytes - 8):
        raise ValueError(f"its header claims {length} bytes")
    try:
        table = json.loads(file.read(length))
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(table, dict):
        raise ValueError("its header is no table")
    table.pop("__metadata__", None)
    held = {}
    for name, item in table.items():
        try:
            spec = TensorSpec(name, item["dtype"], tuple(item["shape"]))
            start, stop = (8 + length + offset for offset in item["data_offsets"])
        except (TypeError, KeyError) as error:
            raise ValueError(f"its entry {name!r} is malformed") from error
        if start < 8 + length or stop - start != spec.size_bytes or stop > file_bytes:
            raise ValueError(f"tensor {name!r} does not lie inside it")
        held[name] = spec, start
    return held


def _range(file: BinaryIO, start: int, size_bytes: int, buffer: memoryview) -> Iterator[memoryview]:
    """So many bytes of the file, in blocks that are valid until the next is taken."""
    left = size_bytes
    file.seek(start)
    while left:
        count = file.readinto(buffer[: min(left, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            raise ValueError("it ends inside a tensor")
        yield buffer[:count]
        left -= count


def _write_all(file: BinaryIO, data: memoryview) -> None:
    rest = data.cast("B") if data.nbytes else memoryview(b"")
    while rest:
        rest = rest[file.write(rest) :]  # Linux writes at most 2 GiB a call
