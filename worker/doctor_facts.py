"""Gathers what `refleet-worker doctor` judges. Whatever can hang or crash runs in a child and has a time limit."""

from __future__ import annotations

import json
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import metadata
from typing import Any, TypeVar

from ..common.config import redacted
from ..common.errors import RefleetError
from ..common.redis_stream import RedisStream
from .doctor_child import MARK, one_line
from .machine import Facts, Gpu, Loaded, Package, Server, Trial

T = TypeVar("T")

IMPORT_S = 180.0  # a first import of torch from a slow disk takes minutes
SMI_S = 20.0
SERVER_S = 20.0
SELF_TEST_S = 600.0
ENGINE_S = 3600.0  # compiling a large model
_REPLY_S = 5.0


def gather(
    *, redis: str | None = None, read_from: str = "", payload_redis: str = "", model: str = "", engine: str = "",
    self_test: bool = True, say: Callable[[str], None] = lambda _text: None,
) -> Facts:  # fmt: skip
    """Look at this machine. Args: `redis` url of the server, None: ask none; `read_from`, `payload_redis` urls of a
    replica and of another server for payloads, where there are; `say` hears what takes time.
    """
    torch = child("torch", limit_s=IMPORT_S)
    compiler = _compiler()
    gpus = tuple(_gpu(found) for found in torch.get("gpus", []))
    tested = None
    if self_test:
        why = _no_test(torch, gpus, compiler[0])
        if not why:
            say("self-test: building a tiny engine, which takes about a minute")
        tested = Trial(skipped=why) if why else _tested()
    loaded = None
    if engine:
        say(f"loading the engine {engine}")
        loaded = _loaded(engine)
    return Facts(
        python=f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        refleet=_installed("refleet", "refleet"),
        torch=_package("torch", torch, installed("torch")),
        torch_build=torch.get("build", ""),
        torch_tensorrt=compiler[0],
        tensorrt=compiler[1],
        safetensors=_installed("safetensors", "safetensors"),
        redis=_installed("redis", "redis"),
        gpus=gpus,
        no_gpu=torch.get("no_gpu", ""),
        driver=driver(),
        engine=engine,
        server=None if redis is None else server_facts(redis, model),
        replica=server_facts(read_from, model) if read_from else None,
        payload_server=server_facts(payload_redis, "") if payload_redis else None,
        tested=tested,
        loaded=loaded,
    )


def child(*arguments: str, limit_s: float) -> dict[str, Any]:
    """The result of `doctor_child`; with the key `problem` when it failed, crashed or took too long."""
    command = [sys.executable, "-P", "-m", f"{__package__}.doctor_child", *arguments]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False)
        output, said, code = done.stdout, done.stderr, done.returncode
        how = f"the process that tried it ended with {code}"
        if code < 0:
            how = f"the process that tried it was ended by {signal.Signals(-code).name}"
    except subprocess.TimeoutExpired as error:
        output, said, how = error.stdout or b"", error.stderr or b"", f"no answer within {limit_s:.0f} s"
    except OSError as error:
        return {"problem": f"{sys.executable} can't be started: {error.strerror}"}
    found = _result(output.decode(errors="replace"))
    if found is not None:  # what happens to the process afterwards, while it ends, does not matter
        return found
    last = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()][-1:]
    return {"problem": how + (f"; the last that it said: {last[0][:300]}" if last else "")}


def _result(output: str) -> dict[str, Any] | None:
    for line in reversed(output.splitlines()):
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return found
    return None


# ---------------------------------------------------------------------- packages


def installed(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed, without importing anything."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _package(name: str, found: dict[str, Any], version: str | None) -> Package:
    """What a child found of a package, and the version that its metadata gives."""
    if "problem" not in found:
        return Package(name, found["version"])
    if version is None and found.get("missing") == name:
        return Package(name, None)
    return Package(name, version or "of unknown version", found["problem"])


def _installed(name: str, distribution: str) -> Package:
    version = installed(distribution)
    try:
        __import__(name)
    except Exception as error:
        return Package(name, version, f"{type(error).__name__}: {one_line(error)}")
    return Package(name, version or str(getattr(sys.modules[name], "__version__", "of unknown version")))


def _compiler() -> tuple[Package, Package]:
    """torch_tensorrt, and the TensorRT that it uses, or the one that is there."""
    found = child("torch_tensorrt", limit_s=IMPORT_S)
    package = _package("torch_tensorrt", found, installed("torch-tensorrt", "torch-tensorrt-rtx"))
    if package.works:
        return package, Package(found["tensorrt"], found["tensorrt_version"])
    rtx = installed("torch-tensorrt") is None and installed("torch-tensorrt-rtx") is not None
    problem: Package | None = None
    for name in ("tensorrt_rtx", "tensorrt") if rtx else ("tensorrt", "tensorrt_rtx"):
        there = _package(name, child("import", name, limit_s=IMPORT_S), installed(name))
        if there.works:
            return package, there
        problem = problem or (there if there.version is not None else None)
    return package, problem or Package("tensorrt", None)


# ---------------------------------------------------------------------- GPU


def _gpu(found: dict[str, Any]) -> Gpu:
    major, minor = found["capability"]
    return Gpu(found["name"], (major, minor), found.get("free", 0), found.get("total", 0), found.get("problem", ""))


def driver() -> str:
    """Version of the NVIDIA driver; "" if nvidia-smi can't say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines and lines[0][0].isdigit() else ""


# ---------------------------------------------------------------------- Redis


def server_facts(url: str, model: str) -> Server:
    """What the server says of itself, and whether it has releases of the model, if one is named."""

    address = redacted(url)

    def ask() -> Server:
        stream = RedisStream(url, model or "doctor", timeout_s=_REPLY_S)
        try:
            facts = stream.facts()
            releases = stream.last_ids()[0] > (0, 0) if model else None
        finally:
            stream.close()
        return Server(address, facts, model=model, releases=releases)

    try:
        return within(ask, SERVER_S)  # a name server may be slow, which redis-py does not bound
    except RefleetError as error:
        return Server(address, problem=error.what, next=error.next)
    except TimeoutError:
        return Server(address, problem=f"no answer within {SERVER_S:.0f} s", next="check address and name server")
    except Exception as error:
        said = re.sub(r"\S+://\S+", lambda found: redacted(found[0]), one_line(error))
        return Server(address, problem=f"{type(error).__name__}: {said}", next="check the Redis url")


def within(function: Callable[[], T], limit_s: float) -> T:
    """The function's result. Raises: TimeoutError when it takes longer; it is left to itself then."""
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


# ---------------------------------------------------------------------- what is tried


def _no_test(torch: dict[str, Any], gpus: tuple[Gpu, ...], compiler: Package) -> str:
    """Why the self-test can't be run, or ""."""
    if "problem" in torch:
        return "torch can't be imported"
    if not torch["build"]:
        return "torch is a CPU build"
    if all(gpu.problem for gpu in gpus):
        return "there is no GPU that can be used"
    return "" if compiler.works else "torch_tensorrt can't be imported"


def _tested() -> Trial:
    found = child("self-test", limit_s=SELF_TEST_S)
    seconds = tuple((str(what), float(time)) for what, time in found.get("seconds", []))
    return Trial(
        problem=found.get("problem", ""), next=found.get("next", ""), applied=tuple(found.get("applied", [])),
        seconds=seconds,
    )  # fmt: skip


def _loaded(spec: str) -> Loaded:
    found = child("engine", spec, limit_s=ENGINE_S)
    return Loaded(
        spec, found.get("build", ""), found.get("path", ""), found.get("seconds", 0.0), found.get("problem", ""),
        found.get("next", ""),
    )  # fmt: skip
