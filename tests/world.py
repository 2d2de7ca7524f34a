"""A whole fleet in one process: real publishers and workers over a real or in-memory carrier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from carriers import Carrier
from refleet.common.errors import RefleetError
from refleet.common.messages import Ack, Serving
from refleet.publisher import Publisher
from refleet.worker.board import Event
from refleet.worker.engine import Engine
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.worker import Worker

State = dict[str, torch.Tensor]


def checkpoint(seed: int, *, change: float = 1.0, base: State | None = None) -> State:
    """A small model of many dtypes; with `base`, about the share `change` of its elements differ from it."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "embed.weight": ((300, 64), torch.bfloat16),
        "layer.0.weight": ((256, 256), torch.float32),
        "layer.0.bias": ((256,), torch.float16),
        "scale": ((), torch.float32),
        "steps": ((3,), torch.int64),
        "empty": ((0, 4), torch.float32),
    }
    made: State = {}
    for name, (shape, dtype) in shapes.items():
        fresh = (torch.randn(shape, generator=generator) * 10).to(dtype)
        if base is not None:
            fresh = torch.where(torch.rand(shape, generator=generator) < change, fresh, base[name])
        made[name] = fresh
    return made


def restructured(state: State) -> State:
    """`checkpoint` with one tensor renamed, one gone, one new, one of another shape and one of another dtype."""
    kept = {name: tensor for name, tensor in state.items() if name not in ("embed.weight", "steps")}
    return kept | {
        "tokens.weight": state["embed.weight"],
        "head": torch.arange(12, dtype=torch.float32).reshape(3, 4),
        "layer.0.bias": state["layer.0.bias"][:200].clone(),
        "scale": state["scale"].double(),
    }


class World:
    """Publishers and workers of one model; `close` ends all of them, in order."""

    def __init__(self, carrier: Carrier, folder: Path, model: str):
        self.carrier, self.folder, self.model = carrier, folder, model
        self.publishers: list[Publisher] = []
        self.workers: dict[str, Worker] = {}
        self.events: dict[str, list[Event]] = {}
        self.notes: list[str] = []

    def publisher(self, store: str = "store", **options: Any) -> Publisher:
        made = Publisher(
            self.carrier.stream(), model=self.model, store=self.folder / store, notify=self.notes.append, **options
        )
        self.publishers.append(made)
        return made

    def worker(self, worker_id: str = "w0", *, engine: Engine | None = None, **options: Any) -> Worker:
        """A started worker; its folder is kept, so the same id again is the same worker restarted."""
        events = self.events.setdefault(worker_id, [])
        options = {"heartbeat_s": 0.1, "poll_s": 0.1} | options
        made = Worker(
            self.carrier.stream(),
            model=self.model,
            engine=engine or MemoryEngine(),
            state_dir=self.folder / worker_id,
            worker_id=worker_id,
            on_event=events.append,
            **options,
        )
        self.workers[worker_id] = made
        return made.start()

    def stop(self, worker_id: str) -> None:
        self.workers.pop(worker_id).stop()

    def acks(self, worker_id: str) -> list[Ack]:
        """Every ack of a worker, oldest first."""
        from refleet.common import wire

        stream = self.carrier.stream()
        return [wire.unpack(data, Ack) for _, data in reversed(stream.last_acks(worker_id, 1000))]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.stop()
        for publisher in self.publishers:
            publisher.close()


def holds(worker: Worker, state: State) -> bool:
    """Whether a worker with a MemoryEngine holds exactly these bytes."""
    from refleet.common.tensors import tensor_bytes

    engine = worker.engine
    assert isinstance(engine, MemoryEngine)
    return engine.tensors == {name: bytes(tensor_bytes(tensor)) for name, tensor in state.items()}


def served(worker: Worker) -> Serving | None:
    return worker.gate.current


def reason(call: Callable[[], object]) -> RefleetError:
    """The error that `call` raises."""
    try:
        call()
    except RefleetError as error:
        return error
    raise AssertionError("nothing was raised")
