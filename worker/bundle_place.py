"""The folder of a bundle, in the file system: it is there whole or not at all, also while it is replaced."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..common.crashpoint import crash_point
from ..common.errors import StoreError, UsageError
from ..common.records import sync_path
from .bundle_record import is_bundle_file

_TEMP_SUFFIX = ".refleet-tmp"
_EXCHANGE, _AT_FDCWD = 2, -100  # renameat2
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


def check_place(folder: Path | str) -> Path:
    """The folder's full path, if a bundle may be written there. Raises: UsageError when there is something else."""
    given = Path(folder).expanduser().absolute()
    if not given.parent.is_dir():
        raise UsageError(
            f"there is no folder {given.parent}", about=f"bundle {folder}", next=f"mkdir -p {given.parent}"
        )
    path = given.parent.resolve() / given.name
    if path.exists() or path.is_symlink():
        try:
            others = [each.name for each in path.iterdir() if not is_bundle_file(each.name)]
        except OSError as error:
            raise UsageError(
                f"{path} is no folder: {error.strerror}", about=f"bundle {folder}", next="choose another path"
            ) from error
        if others:
            raise UsageError(
                f"{path} holds {others[0]!r}, which is no part of a bundle: refusing to replace it",
                about=f"bundle {folder}", next="choose a path that does not exist",
            )  # fmt: skip
        if path.is_symlink():
            path = path.resolve()
    return path


def replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put a folder with these files in the place of `folder`. Raises: StoreError, with `folder` as it was."""
    try:
        _sweep(folder)
        with _temp_beside(folder) as temp:
            for name, data in files.items():
                with open(temp / name, "xb", buffering=0) as file:
                    rest = memoryview(data)
                    while rest:
                        rest = rest[file.write(rest) :]  # Linux writes at most 2 GiB a call
                    os.fsync(file.fileno())
            sync_path(temp)
            crash_point("bundle.written")
            _exchange(temp, folder)
            crash_point("bundle.renamed")
            sync_path(folder.parent)
    except OSError as error:
        raise StoreError(
            f"the bundle could not be written: {error.strerror or error}", about=str(folder),
            next=f"df -h {folder.parent}",
        ) from error  # fmt: skip


@contextmanager
def _temp_beside(folder: Path) -> Iterator[Path]:
    """A new folder, locked so that nobody takes it for abandoned; at the end it is removed with what is in it then."""
    temp = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}{_TEMP_SUFFIX}")
    temp.mkdir()
    fd = os.open(temp, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temp
    finally:
        os.close(fd)
        shutil.rmtree(temp, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what processes that died while writing this bundle left beside it."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*{_TEMP_SUFFIX}"):
        with suppress(OSError):
            fd = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(fd)


def _exchange(temp: Path, folder: Path) -> None:
    """`temp` becomes `folder`, and what was there is at `temp`, or gone if it was nothing."""
    if not folder.exists():
        temp.rename(folder)
        return
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(temp), _AT_FDCWD, os.fsencode(folder), _EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NOT_SUPPORTED:
            raise OSError(code, os.strerror(code))
    # a file system that can't exchange: for a moment there is no bundle, as if none had ever been written
    before = temp.with_name(temp.name.removesuffix(_TEMP_SUFFIX) + "-before" + _TEMP_SUFFIX)
    folder.rename(before)
    temp.rename(folder)
    shutil.rmtree(before, ignore_errors=True)
