"""kill -9 at every named point of real publishers and workers: what is served is whole, and the fleet converges.

I15, I24. The file that a worker keeps (`file:`) is what is served: it is opened after every crash.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from processes import Processes
from refleet.common import wire
from refleet.common.messages import Ack, Evidence
from refleet.common.redis_stream import RedisStream
from refleet.common.store import Store
from refleet.publisher.book import Book
from safetensors.torch import load_file, save_file
from servers import Server
from world import State, checkpoint

Until = Callable[..., None]

#: all "+1": the worker passes each of them once on its way to v1
WORKER_POINTS = [
    "worker.accepted",
    "worker.received-chunk",
    "store.delta-written",
    "store.delta-renamed",
    "worker.staged",
    "worker.prepared",
    "file_engine.written",
    "file_engine.renamed",
    "worker.applied",
    "worker.persisted",
    "worker.switched",
]
PUBLISHER_POINTS = [
    "publisher.stored-tensor",
    "store.delta-written",
    "store.delta-renamed",
    "publisher.stored",
    "publisher.sent-chunk",
    "publisher.sent-all",
    "publisher.before-record",
    "publisher.recorded",
    "publisher.announced",
]


@pytest.fixture
def versions(tmp_path: Path) -> dict[str, Path]:
    """Checkpoint files of two versions."""
    first = checkpoint(1)
    found = {"v1": first, "v2": checkpoint(2, change=0.5, base=first)}
    for name, state in found.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    return {name: tmp_path / f"{name}.safetensors" for name in found}


@pytest.fixture
def processes(tmp_path: Path, model: str) -> Iterator[Processes]:
    made = Processes(tmp_path, model)
    yield made
    made.close()


def same(a: State, b: State) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k].flatten().view(torch.uint8), b[k].flatten().view(torch.uint8)) for k in a
    )


def which(served: Path, versions: dict[str, Path]) -> str:
    """The one version that the file is, whole. A file that can't be opened is no version."""
    state = load_file(served)  # once: the worker may be replacing it
    (found,) = [name for name, path in versions.items() if same(state, load_file(path))]
    return found


def serving_acks(url: str, model: str, worker: str) -> list[Ack]:
    stream = RedisStream(url, model)
    acks = [wire.unpack(data, Ack) for _, data in reversed(stream.last_acks(worker, 1000))]
    stream.close()
    return [ack for ack in acks if ack.evidence == Evidence.SERVING]


@pytest.mark.parametrize("point", WORKER_POINTS)
def test_a_worker_killed_at_any_point_serves_one_whole_version_and_then_converges(
    server: Server, processes: Processes, versions: dict[str, Path], point: str, until: Until
) -> None:
    processes.redis = server.url
    armed = processes.worker("w0", crash_at=f"{point}+1")
    processes.refleet("publish", versions["v1"], "--version", "v1", "--wait", "--timeout", "60")
    processes.refleet("publish", versions["v2"], "--version", "v2")
    assert armed.wait(60) == -signal.SIGKILL, f"{point} was not reached"
    left = which(processes.served("w0"), versions)
    claimed = {ack.version for ack in serving_acks(server.url, processes.model, "w0")}
    assert "v2" not in claimed or left == "v2", "an ack said SERVING of what is not served"
    if point in ("worker.accepted", "worker.received-chunk", "worker.staged", "worker.prepared"):
        assert left == "v1"
    processes.worker("w0")
    until(lambda: processes.serving_of("w0") == "v2", "the restarted worker serves v2", timeout_s=60)
    assert which(processes.served("w0"), versions) == "v2"


@pytest.mark.parametrize("point", ["worker.received-chunk", "store.delta-written", "store.delta-renamed"])
def test_a_worker_killed_while_it_takes_its_first_version_takes_it_when_it_starts_again(
    valkey: Server, processes: Processes, versions: dict[str, Path], point: str, until: Until
) -> None:
    processes.redis = valkey.url
    armed = processes.worker("w0", crash_at=point)
    processes.refleet("publish", versions["v1"], "--version", "v1")
    assert armed.wait(60) == -signal.SIGKILL, f"{point} was not reached"
    assert serving_acks(valkey.url, processes.model, "w0") == []
    processes.worker("w0")
    until(lambda: processes.serving_of("w0") == "v1", "the restarted worker serves v1", timeout_s=60)
    assert which(processes.served("w0"), versions) == "v1"


@pytest.mark.parametrize("point", PUBLISHER_POINTS)
def test_a_publisher_killed_at_any_point_leaves_the_state_before_or_after_and_can_be_run_again(
    server: Server, processes: Processes, versions: dict[str, Path], point: str, until: Until
) -> None:
    processes.redis = server.url
    processes.worker("w0")
    processes.refleet("publish", versions["v1"], "--version", "v1", "--wait", "--timeout", "60")
    crashed = processes.run("publish", versions["v2"], "--version", "v2", crash_at=point)
    assert crashed.returncode == -signal.SIGKILL, f"{point} was not reached: {crashed.stderr}"
    assert which(processes.served("w0"), versions) in ("v1", "v2")
    processes.refleet("publish", versions["v2"], "--version", "v2", "--wait", "--timeout", "60")
    assert which(processes.served("w0"), versions) == "v2"
    with Store(processes.folder / "store" / processes.model) as store:
        book = Book(store)
        assert [release.version for release in book.releases()] == ["v1", "v2"]
    processes.refleet("rollback", "--to", "v1", "--wait", "--timeout", "60")
    assert which(processes.served("w0"), versions) == "v1"
    with server.client() as client:

        def left() -> list[bytes]:
            processes.refleet("gc")
            return list(client.scan_iter(match=f"refleet:{{{processes.model}:*"))

        until(lambda: not left(), "no payload is left behind in the server", timeout_s=60)


def test_sigterm_in_the_middle_of_everything_drains_and_exits_with_zero(
    valkey: Server, processes: Processes, versions: dict[str, Path], until: Until
) -> None:
    processes.redis = valkey.url
    worker = processes.worker("w0")
    processes.refleet("publish", versions["v1"], "--version", "v1", "--wait", "--timeout", "60")
    processes.refleet("publish", versions["v2"], "--version", "v2")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    assert which(processes.served("w0"), versions) in ("v1", "v2")
