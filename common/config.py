"""Settings from `refleet.toml` and the environment. Nothing else in refleet reads environment variables.

Environment wins over file; the command lines' flags win over both.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .crashpoint import arm
from .errors import UsageError
from .shm import MEMORY

CONFIG_FILE = "refleet.toml"
_CONFIG_BYTES = 1 << 20
_PATHS = ("store", "key", "trust")


@dataclass(frozen=True, slots=True)
class Settings:
    """What both command lines take when their flags don't say otherwise."""

    redis: str = field(default="redis://127.0.0.1:6379", repr=False)  # may hold a password: see `redacted`
    store: Path | None = None  # folder of the publisher's or worker's store
    key: Path | None = None  # private key that signs records
    trust: Path | None = None  # public keys whose records are accepted
    crash_at: str = ""  # for tests: see crashpoint.py
    payload_redis: str = field(default="", repr=False)  # server of the payloads; "": the same one
    read_from: str = field(default="", repr=False)  # replica that a worker reads from; "": none
    carrier: str = "auto"  # of payloads: auto, stream, blobs


def settings(environ: Mapping[str, str]) -> Settings:
    """Settings out of `environ` (REFLEET_REDIS, REFLEET_STORE and so on, one for each field) over the TOML file
    REFLEET_CONFIG, or `refleet.toml` in the current folder if there is one, with the same keys in lower case.

    An empty variable counts as unset. A relative path in the file starts at the file's folder. Raises: UsageError.
    """
    home = environ.get("HOME", "")
    found = Settings()
    if named := environ.get("REFLEET_CONFIG"):
        found = _from_file(_path(named, home=home), found, home=home)
    elif (default := Path(CONFIG_FILE)).exists():
        found = _from_file(default, found, home=home)
    for name in _names():
        if text := environ.get(f"REFLEET_{name.upper()}"):
            found = _with(found, name, text, home=home)
    return found


def command_settings(arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Settings of one command line; arms the crash point that a test asked for. Raises: UsageError."""
    try:
        found = settings(environ)
    except UsageError:
        if {"-h", "--help", "--version"} & {*arguments} or not arguments:
            return Settings()  # a broken configuration must not take the help away
        raise
    arm(found.crash_at)
    return found


def redacted(url: str) -> str:
    """A Redis URL for messages: whatever may be a password in it is replaced by `***`."""
    url = re.sub(r"([?&][^=&#]*pass[^=&#]*=)[^&#]*", r"\1***", url, flags=re.IGNORECASE)
    scheme, separator, rest = url.rpartition("://") if url.count("://") == 1 else ("", "", url)
    user_info, at, server = rest.rpartition("@")  # the last one: a password may hold an unquoted @ or /
    if at:
        user, colon, _ = user_info.partition(":")
        user_info = f"{user}:***" if colon else "***"
    return f"{scheme}{separator}{user_info}{at}{server}"


def _names() -> list[str]:
    return [item.name for item in fields(Settings)]


def _from_file(path: Path, base: Settings, *, home: str) -> Settings:
    try:
        with path.open("rb") as file:
            data = file.read(_CONFIG_BYTES + 1)
    except OSError as error:
        raise UsageError(f"can't read the configuration: {error.strerror}", about=str(path)) from None
    if len(data) > _CONFIG_BYTES:
        raise UsageError(f"the configuration is larger than {_CONFIG_BYTES} bytes", about=str(path))
    try:
        table = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, or nested without end
        raise UsageError(f"the configuration is not TOML: {error}", about=str(path)) from None
    for name, value in table.items():
        if name not in _names():
            raise UsageError(
                f"unknown key {name!r} in the configuration", about=str(path), next=f"use {', '.join(_names())}"
            )
        if not isinstance(value, str) or not value:
            found = type(value).__name__ if value != "" else "an empty one"
            raise UsageError(
                f"the value of {name} must be a text, not {found}",
                about=str(path),
                next=f'write {name} = "..."; the keys are {", ".join(_names())}',
            )
        base = _with(base, name, value, home=home, folder=path.parent)
    return base


def _with(base: Settings, name: str, text: str, *, home: str, folder: Path | None = None) -> Settings:
    value: Any = Path(text) if name in _PATHS else text
    if name in _PATHS and text != MEMORY:
        value = _path(text, home=home) if folder is None else folder / _path(text, home=home)
    return replace(base, **{name: value})


def _path(text: str, *, home: str) -> Path:
    """A path; `~/` stands for the home folder, since neither TOML nor compose files expand it."""
    return Path(home, text[2:]) if home and text.startswith("~/") else Path(text)
