"""Puts the simulated modules in the place of the real ones, in every module of refleet, and takes them out again.

No line of the production code is copied or changed: a module's global `time`, say, names the virtual clock for as long
as `installed` lasts.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import importlib
import inspect
import mmap
import os
import pathlib
import queue
import random
import secrets
import socket
import sys
import tempfile
import threading
import time
import types
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from refleet.common import crashpoint
from refleet.common.delta import Encoder, cut
from refleet.common.limits import LIMITS
from refleet.common.store import Store

from . import clocks, files, system, threads
from .kernel import Killed, idle

#: a model of a few small tensors shall have payloads of several chunks and blocks, and polls shall be rare
SMALL = replace(LIMITS, chunk_bytes=192, block_bytes=256)
SETTINGS: dict[str, dict[str, Any]] = {
    "refleet.publisher.payloads": {"_POLL_S": 0.5, "LIMITS": SMALL},
    "refleet.common.delta": {"LIMITS": SMALL},
    "refleet.publisher.service": {"_POLL_S": 1.2, "_UPKEEP_S": 2.0},
    "refleet.publisher.wait": {"_POLL_S": 2.0},
    "refleet.publisher.verify": {"_POLL_S": 2.0},
    "refleet.common.records": {"_POLL_S": 0.2},
    "refleet.common.memory": {"POOLED_BYTES": 16},
}
ANCHOR_EVERY = 3
_MODULES = (
    "refleet.publisher.publish", "refleet.publisher.serve", "refleet.publisher.watch", "refleet.publisher.verify",
    "refleet.publisher.wait", "refleet.worker.worker", "refleet.worker.memory_engine", "refleet.common.memory_stream",
)  # fmt: skip
_PLACES: dict[Any, Any] = {
    os: system.os, time: clocks.time, random: clocks.random, secrets: clocks.secrets, uuid: clocks.uuid,
    socket: clocks.socket, fcntl: system.fcntl, mmap: files.mmap, tempfile: files.tempfile,
    threading: threads.threading, queue: threads.queue, pathlib.Path: files.Path, threading.Event: threads.Event,
    crashpoint.crash_point: clocks.crash_point, time.monotonic: clocks.monotonic, time.time: clocks.wall_s,
    time.perf_counter: clocks.monotonic,
}  # fmt: skip


@contextmanager
def installed() -> Iterator[None]:
    """During the block refleet runs on the active kernel. Not to be nested."""
    for thread in threading.enumerate():  # real ones of refleet would run on simulated modules
        if thread.name.startswith("refleet-"):
            thread.join(10.0)
            assert not thread.is_alive(), f"{thread.name} still runs"
    gc.collect()
    gc.freeze()  # what is here before any run is not looked at after each of them
    undo = _swapped()
    hook = sys.unraisablehook
    # what a killed process left is finalized some time, which has no effect and is no news
    sys.unraisablehook = lambda event: None if isinstance(event.exc_value, Killed) or idle() else hook(event)
    try:
        yield
    finally:
        gc.collect()  # before a leftover could reach the real modules
        gc.unfreeze()
        sys.unraisablehook = hook
        for where, name, value in reversed(undo):
            if isinstance(where, dict):
                where[name] = value
            else:
                setattr(where, name, value)


@functools.cache
def _plan() -> list[tuple[Any, str, Any, Any]]:
    """(module, class, function or its defaults; name; real; simulated) of everything to be swapped."""
    for name in _MODULES:
        importlib.import_module(name)
    modules = {name: m for name, m in sorted(sys.modules.items()) if name.startswith("refleet.")}
    found: list[tuple[Any, str, Any, Any]] = []
    for module in modules.values():
        for name, value in list(vars(module).items()):
            if isinstance(value, types.ModuleType | type | types.FunctionType | types.BuiltinFunctionType):
                if value in _PLACES and module is not crashpoint:
                    found.append((module, name, value, _PLACES[value]))
                elif getattr(value, "__module__", None) == module.__name__:
                    found += _defaults(value)
    for module_name, settings in SETTINGS.items():
        module = modules[module_name]
        found += [(module, name, getattr(module, name), value) for name, value in settings.items()]
    given = Encoder.__init__.__kwdefaults__
    found.append((given, "chunk_bytes", given["chunk_bytes"], SMALL.chunk_bytes))
    found.append((cut, "__defaults__", cut.__defaults__, (SMALL.chunk_bytes,)))
    found.append((Store.anchor.__kwdefaults__, "every", Store.anchor.__kwdefaults__["every"], ANCHOR_EVERY))
    return found


def _defaults(owner: Any) -> list[tuple[Any, str, Any, Any]]:
    """Clocks and chunk sizes that were bound when a function was made."""
    functions = [owner] if inspect.isfunction(owner) else []
    if isinstance(owner, type):
        functions = [getattr(each, "__func__", each) for each in vars(owner).values()]
    found: list[tuple[Any, str, Any, Any]] = []
    for function in functions:
        if not inspect.isfunction(function):
            continue
        given = function.__kwdefaults__ or {}
        found += [(given, name, value, _PLACES[value]) for name, value in given.items() if _is_place(value)]
        positional = function.__defaults__ or ()
        if any(_is_place(value) for value in positional):
            swapped = tuple(_PLACES[value] if _is_place(value) else value for value in positional)
            found.append((function, "__defaults__", positional, swapped))
    return found


def _is_place(value: Any) -> bool:
    return callable(value) and getattr(value, "__hash__", None) is not None and value in _PLACES


def _swapped() -> list[tuple[Any, str, Any]]:
    undo = []
    for where, name, real, simulated in _plan():
        undo.append((where, name, real))
        if isinstance(where, dict):
            where[name] = simulated
        else:
            setattr(where, name, simulated)
    return undo
