"""Small records by name, one file each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from .records import disk_errors, read_file, remove, sync_path, write_file, write_files

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]*(/[A-Za-z0-9][A-Za-z0-9._@-]*)*\Z")


class NamedRecords:
    """The records in `folder`; `temp` takes records in the making."""

    def __init__(self, folder: Path, *, temp: Path):
        self._records, self._temp = folder, temp

    def put_record(self, name: str, data: bytes, *, sync: bool = True) -> None:
        """Sets the record `name` (ours, such as `release/main`): letters, digits and `._@-`, in parts between `/`.

        Without `sync` a power cut may take it: for what can be done without.
        """
        write_file(self._record_path(name), data, temp=self._temp, sync=sync)

    def put_records(self, records: Mapping[str, bytes]) -> None:
        """Sets several: each appears only after the ones before it. Durable when this returns."""
        write_files({self._record_path(name): data for name, data in records.items()}, temp=self._temp)

    def record(self, name: str) -> bytes | None:
        """The record `name`, or None. Raises: MalformedRecord naming its file when it is damaged."""
        return read_file(self._record_path(name))

    def records(self, prefix: str) -> list[str]:
        """Names of all records that begin with `prefix`, sorted."""
        names = (path.name.replace("+", "/") for path in self._records.iterdir())
        return sorted(name for name in names if name.startswith(prefix))

    def settle_records(self) -> None:
        """Every record that is visible now survives a power cut when this returns. Raises: StoreFull, StoreError."""
        with disk_errors(self._records):
            sync_path(self._records)

    def drop_record(self, name: str, *, sync: bool = True) -> None:
        """Removes the record `name`, if it is there; without `sync` a power cut may bring it back."""
        path = self._record_path(name)
        if remove(path) and sync:
            with disk_errors(path):
                sync_path(self._records)

    def _record_path(self, name: str) -> Path:
        assert NAME.match(name), name
        return self._records / name.replace("/", "+")
