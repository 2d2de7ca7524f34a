"""What can be known of a machine that is to serve: facts, without a judgement. `doctor` judges them."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.stream import ServerFacts


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package. `version` None: there is none; `problem`: why it can't be imported, else ""."""

    name: str
    version: str | None
    problem: str = ""

    @property
    def works(self) -> bool:
        return self.version is not None and not self.problem


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device that torch sees. `problem`: why it can't be used; its memory is not known then."""

    name: str
    capability: tuple[int, int]
    free: int = 0
    total: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Server:
    """The Redis server. `address`: without a password. `problem`, `next`: why there are no facts. `releases`: whether
    it has some of `model`; None if it was not asked."""

    address: str
    facts: ServerFacts | None = None
    problem: str = ""
    next: str = ""
    model: str = ""
    releases: bool | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """The self-test. `skipped`: why it was not run. `applied`: how the engine took the versions, one by one."""

    skipped: str = ""
    problem: str = ""
    next: str = ""
    applied: tuple[str, ...] = ()
    seconds: tuple[tuple[str, float], ...] = ()

    @property
    def fast(self) -> bool:
        return bool(self.applied) and all(how.startswith("fast") for how in self.applied)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The engine that was asked for with `--engine`. `path`: which way versions will go in, "" if there is only one."""

    spec: str
    build: str = ""
    path: str = ""
    seconds: float = 0.0
    problem: str = ""
    next: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was found. `torch_build`: "CUDA 13.0", "ROCm 6.4" or "" for a CPU build. `no_gpu`: why torch sees
    no device. `driver`: version of the NVIDIA driver, "" if it is not known. None: it was not asked for."""

    python: str
    refleet: Package
    torch: Package
    torch_build: str
    torch_tensorrt: Package
    tensorrt: Package
    safetensors: Package
    redis: Package
    gpus: tuple[Gpu, ...] = ()
    no_gpu: str = ""
    driver: str = ""
    engine: str = ""  # the spec
    server: Server | None = None
    #: where workers read from, and where payloads lie, if that is not `server`
    replica: Server | None = None
    payload_server: Server | None = None
    tested: Trial | None = None
    loaded: Loaded | None = None

    @property
    def needs_tensorrt(self) -> bool:
        """Whether this machine is to serve with TensorRT: unless another kind of engine was asked for."""
        return not self.engine.startswith(("torch:", "file:"))
