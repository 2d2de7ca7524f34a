"""Folders in this machine's memory: they survive every process, and no restart of the machine."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from .errors import StoreError

SHM = Path("/dev/shm")  # noqa: S108 - what is used in there is ours alone
#: the word for a folder in memory, where a folder is asked for
MEMORY = "memory"


def placed(given: Path | str, *parts: str) -> Path:
    """`given`; for the word `memory`, the folder `parts` of this user in memory. Raises: StoreError."""
    if str(given) != MEMORY:
        return Path(given)
    if not SHM.is_dir():
        raise StoreError("there is no /dev/shm to keep a store in", next="name a folder on disk")
    home = SHM / f"refleet-{os.getuid()}-stores"
    own_folder(home)
    return home.joinpath(*parts)


def own_folder(folder: Path) -> None:
    """`/dev/shm` is everybody's: a folder there must be a real one, ours, and closed to others. Raises: StoreError."""
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError:
        return  # there is no such memory here: everything stays private
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StoreError(
            "shared memory can't be used: the folder is somebody else's", about=str(folder), next=f"rm -r {folder}"
        )
