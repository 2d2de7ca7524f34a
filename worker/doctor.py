"""What `refleet-worker doctor` thinks of a machine: facts in, checks out. It looks at nothing itself.

`doctor_facts` gathers the facts, `doctor_child` and `self_test` try things out in a process of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .machine import Facts, Loaded, Package, Server, Trial

OK, WARN, FAIL = "ok", "warn", "fail"
#: less free GPU memory than this leaves no room for an engine and the tensors beside it
_LITTLE = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table. `next`: what to do where it is not ok, else ""."""

    name: str
    status: str
    text: str
    next: str = ""


@dataclass(frozen=True, slots=True)
class Known:
    """A combination that was met. `text` may name {torch}, {torch_tensorrt} and {tensorrt}, the versions found."""

    name: str
    status: str
    applies: Callable[[Facts], bool]
    text: str
    next: str = ""


def checks(facts: Facts) -> list[Check]:
    """The verdict, in the order of the table."""
    found = [*_packages(facts), *_gpus(facts), *_known(facts)]
    if facts.server is not None:
        found += _server(facts.server)
    if facts.replica is not None:
        found += _answers(facts.replica, "replica")
        found += _has_releases(facts.replica, "replica model")
    if facts.payload_server is not None:
        found += _answers(facts.payload_server, "payload server")
        found += _evicts_nothing(facts.payload_server, "payload eviction")
    if facts.tested is not None:
        found += [_tested(facts.tested)]
    if facts.loaded is not None:
        found += [_loaded(facts.loaded)]
    return found


def numbers(version: str | None) -> tuple[int, int]:
    """Major and minor of a version; (0, 0) if there is none."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else (0, 0)


# ---------------------------------------------------------------------- packages


def _packages(facts: Facts) -> Iterator[Check]:
    yield Check("python", OK, facts.python)
    yield _package(facts.refleet, "pip install refleet")
    built = f"built for {facts.torch_build}" if facts.torch_build else "a CPU build"
    yield _package(facts.torch, "pip install 'torch>=2.11'", more=f", {built}")
    install = "pip install 'refleet[tensorrt]', or 'refleet[tensorrt-rtx]' for TensorRT-RTX"
    if facts.torch_tensorrt.works or facts.needs_tensorrt:
        # without a device nothing else can be expected of it
        repair = _ANEW if _usable(facts) else "see the check named gpu first"
        yield _package(facts.torch_tensorrt, install, repair=repair)
        yield _package(facts.tensorrt, install)
    yield _package(facts.safetensors, "pip install safetensors")
    yield _package(facts.redis, "pip install redis")


_ANEW = "install it anew, in the minor version of torch, and look whether `python -c 'import torch_tensorrt'` works"


def _package(package: Package, install: str, *, more: str = "", repair: str = "") -> Check:
    if package.version is None:
        reason = f" ({package.problem})" if package.problem else ""
        return Check(package.name, FAIL, f"{package.name} is not installed{reason}", install)
    if package.problem:
        text = f"{package.name} {package.version} can't be imported: {package.problem}"
        return Check(package.name, FAIL, text, repair or install)
    return Check(package.name, OK, f"{package.name} {package.version}{more}")


# ---------------------------------------------------------------------- GPU


def _gpus(facts: Facts) -> Iterator[Check]:
    bad = FAIL if facts.needs_tensorrt else WARN
    without = "" if facts.needs_tensorrt else f"; {facts.engine.partition(':')[0]}: engines work without"
    driver = f"driver {facts.driver}" if facts.driver else "driver unknown"
    if not facts.torch.works:
        yield Check("gpu", bad, "without torch no GPU can be looked for" + without, "see the check named torch")
    elif not facts.torch_build:
        there = f", though the NVIDIA {driver} is there" if facts.driver else ""
        yield Check(
            "gpu", bad, f"torch {facts.torch.version} is a CPU build: it can't use a GPU{there}{without}",
            "install a CUDA build of torch: https://pytorch.org/get-started/locally",
        )  # fmt: skip
    elif not facts.gpus:
        reason = f": {facts.no_gpu}" if facts.no_gpu else ""
        yield Check(
            "gpu", bad, f"torch is built for {facts.torch_build}, but no GPU is visible{reason}{without}",
            f"the {driver} is installed: see nvidia-smi and CUDA_VISIBLE_DEVICES" if facts.driver
            else "install the NVIDIA driver; a container must be given its GPUs (docker run --gpus all)",
        )  # fmt: skip
    for number, gpu in enumerate(facts.gpus):
        text = f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        if gpu.problem:
            yield Check(f"gpu {number}", bad, f"{text}: it can't be used: {gpu.problem}", "see nvidia-smi")
            continue
        text += f", {gpu.free / 2**30:.1f} of {gpu.total / 2**30:.1f} GiB free, {driver}"
        if gpu.free < _LITTLE:
            yield Check(f"gpu {number}", WARN, text + ": hardly room for an engine", "nvidia-smi shows who has it")
        else:
            yield Check(f"gpu {number}", OK, text)


def _usable(facts: Facts) -> bool:
    return any(not gpu.problem for gpu in facts.gpus)


# ---------------------------------------------------------------------- combinations


def _known(facts: Facts) -> Iterator[Check]:
    """What is known of the versions that were found; they need not be importable."""
    versions = {
        "torch": facts.torch.version, "torch_tensorrt": facts.torch_tensorrt.version, "tensorrt": facts.tensorrt.version
    }  # fmt: skip
    for known in KNOWN:
        if known.applies(facts):
            yield Check(known.name, known.status, known.text.format(**versions), known.next)


def _torch_tensorrt(facts: Facts) -> tuple[int, int]:
    return numbers(facts.torch_tensorrt.version)


def _differ(facts: Facts) -> bool:
    one, two = numbers(facts.torch.version), _torch_tensorrt(facts)
    return one != (0, 0) and two != (0, 0) and one != two


def _cached_refit(facts: Facts) -> bool:
    return (2, 11) <= _torch_tensorrt(facts) <= (2, 12)


KNOWN = (
    Known(
        "versions", WARN, _differ,
        "torch {torch} and torch_tensorrt {torch_tensorrt} differ in their minor version: each is built for its own",
        "install torch and torch_tensorrt of one minor version",
    ),
    Known(
        "torch_tensorrt age", FAIL, lambda facts: (0, 0) < _torch_tensorrt(facts) < (2, 11),
        "torch_tensorrt {torch_tensorrt}: the refit plan was never tested with versions before 2.11",
        "pip install --upgrade 'refleet[tensorrt]'",
    ),
    Known(
        "weight map", OK, _cached_refit,
        "refit_module_weights of torch_tensorrt {torch_tensorrt} has a weight map that takes equal tensors for one "
        "another: the worker switches it off",
    ),
    Known(
        "batch norm", OK, _cached_refit,
        "with that weight map it would also fold every BatchNorm with eps 1e-5, whatever the module says: not so here",
    ),
    Known(
        "bias", WARN, lambda facts: facts.tensorrt.name == "tensorrt" and numbers(facts.tensorrt.version) == (11, 3),
        "TensorRT {tensorrt} may drop the bias of a matrix product in a refittable build: every engine is compared "
        "with PyTorch after it was built, and one that is off is refused",
        "if your engine is refused, use another version of TensorRT, or TensorRT-RTX",
    ),
)  # fmt: skip


# ---------------------------------------------------------------------- Redis


def _server(server: Server) -> Iterator[Check]:
    yield from _answers(server, "server")
    yield from _evicts_nothing(server, "eviction")
    if server.facts is None:
        return
    if server.facts.aof:
        yield Check("AOF", OK, "the server keeps its data (append-only file)")
    elif server.facts.aof is None:
        yield Check("AOF", WARN, "the server does not tell whether it keeps its data", "appendonly should be yes")
    else:
        text = "the append-only file is off: after a restart the server has nothing until the publisher writes again"
        yield Check("AOF", WARN, text, _set("appendonly yes"))
    yield from _has_releases(server, "model")


def _answers(server: Server, name: str) -> Iterator[Check]:
    facts = server.facts
    if facts is None:
        yield Check(name, FAIL, server.problem, server.next)
        return
    kind, _, version = facts.server.partition(" ")
    if numbers(version) == (0, 0):
        text = f"{server.address} answers, but does not tell its version"
        yield Check(name, WARN, text, "it must be Redis 6.2 or newer, or Valkey")
    elif kind == "Redis" and numbers(version) < (6, 2):
        yield Check(name, FAIL, f"{facts.server} at {server.address} is too old", "use Redis 6.2 or newer, or Valkey")
    else:
        yield Check(name, OK, f"{facts.server} at {server.address}")


def _evicts_nothing(server: Server, name: str) -> Iterator[Check]:
    if server.facts is None:
        return
    policy = server.facts.policy
    if policy == "noeviction":
        yield Check(name, OK, "maxmemory-policy is noeviction")
    elif policy:
        text = f"maxmemory-policy is {policy}: it would drop releases and payloads in silence"
        yield Check(name, FAIL, text, _set("maxmemory-policy noeviction"))
    else:
        yield Check(name, WARN, "the server does not tell its maxmemory-policy", "it must be noeviction")


def _has_releases(server: Server, name: str) -> Iterator[Check]:
    if server.releases:
        yield Check(name, OK, f"model {server.model!r} has releases")
    elif server.releases is not None:
        text = f"the server has no release of model {server.model!r}: a worker would wait for the first"
        yield Check(name, WARN, text, f"refleet publish PATH --model {server.model}; or check the name")


def _set(setting: str) -> str:
    return f"redis-cli config set {setting}, and the same in the server's configuration"


# ---------------------------------------------------------------------- what was tried


def _tested(tested: Trial) -> Check:
    times = ", ".join(f"{what} {duration(seconds)}" for what, seconds in tested.seconds)
    after = f" ({times})" if times else ""
    if tested.skipped:
        return Check("self-test", WARN, f"skipped: {tested.skipped}", "run it again when that check is ok")
    if tested.problem:
        return Check("self-test", FAIL, tested.problem + after, tested.next or "report it with this whole output")
    if not tested.fast:
        slow = next((how for how in tested.applied if not how.startswith("fast")), "nothing was applied")
        return Check(
            "self-test", WARN, f"versions go in and come back bit for bit, but not on the fast path: {slow}{after}",
            "such updates take seconds; report it with this whole output",
        )  # fmt: skip
    return Check("self-test", OK, f"A, B, A: answers as PyTorch, and A came back bit for bit, on the fast path{after}")


def _loaded(loaded: Loaded) -> Check:
    if loaded.problem:
        return Check("engine", FAIL, f"{loaded.spec}: {loaded.problem}", loaded.next or "see what the factory does")
    parts = [part for part in (loaded.build, loaded.path) if part]
    return Check("engine", OK, f"{loaded.spec}: {'; '.join(parts)} (loaded in {duration(loaded.seconds)})")


def duration(seconds: float) -> str:
    """For people: 41 ms, 3.2 s, 2 min 5 s."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else "<1 ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
