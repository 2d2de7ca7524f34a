"""Workers, publishers and requests of the simulated fleet, each in a process of its own on its host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from refleet.common.errors import NotServing, RefleetError
from refleet.publisher import serve
from refleet.publisher.publish import Publisher
from refleet.worker.state import probe_name
from refleet.worker.worker import Worker

from . import threads
from .contents import Content
from .engine import SimEngine
from .faults import Host
from .files import Path
from .kernel import Process, kernel

if TYPE_CHECKING:
    from .world import World

MODEL = "m"
#: reading a log waits for so long; a worker is stale after `STALE_S` without an answer
_POLL_S, STALE_S = 2.0, 5.0


class WorkerActor:
    """One worker id with its disk: started, killed and started again."""

    def __init__(self, world: World, worker_id: str, host: Host, *, keep: int, twin: bool = False, **engine: Any):
        """`twin`: another one has this id."""
        self.world, self.id, self.host, self.keep, self.twin = world, worker_id, host, keep, twin
        self.engine_options = engine
        self.process: Process | None = None
        self.worker: Worker | None = None
        self.engine: SimEngine | None = None
        self.wanted = False  # whether it should be running
        self.started_s = 0.0
        self.seen: tuple[Any, ...] = ()  # what the oracle looked at last
        self.trust = world.trust

    def start(self) -> None:
        """In a new process. A start that fails ends it."""
        self.wanted = True
        self.process = kernel().process(self.id, self.host)
        self.process.on_death.append(self._died)
        self.process.spawn(self._main, "main")

    def leave(self) -> None:
        """As SIGTERM asks it to."""
        self.wanted = False
        if self.worker is not None and self.process is not None:
            worker, process = self.worker, self.process

            def stop() -> None:
                worker.stop()
                kernel().kill(process, "stopped")

            process.spawn(stop, "stop")

    def _died(self) -> None:
        self.world.graveyard.append((self.worker, self.engine))
        self.worker = self.engine = None
        self.world.worker_died(self)

    def _main(self) -> None:
        run, world = kernel(), self.world
        process = self.process
        assert process is not None
        engine = SimEngine(faults=world.faults, watch=self._watch, may_lie=self._probed, **self.engine_options)
        stream = world.network.stream(self.host)
        try:
            worker = Worker(
                stream, model=MODEL, engine=engine, state_dir=Path("/state"), worker_id=self.id, trust=self.trust,
                keep=self.keep, heartbeat_s=1.5, stale_after_s=STALE_S, drain_s=4.0, poll_s=_POLL_S,
                on_event=lambda event: run.note(f"{event.state}: {event.text.splitlines()[0]}"),
            )  # fmt: skip
            worker.acks.listen(lambda ack: world.oracle.acked(self, ack))
            self.engine, self.worker, self.started_s = engine, worker, run.now
            world.oracle.starts(self, stream)
            worker.start()
        except RefleetError as error:
            run.note(f"the worker did not start: {error.what}")
            run.kill(process, "did not start")
        self._requests(worker, engine)

    def _watch(self, what: str, staged: Any, changed: frozenset[str]) -> Any:
        kernel().note(f"engine.{what} {staged.serving.version} {len(changed)} tensors")
        return self.world.oracle.given(self, what, staged)

    def _probed(self, fingerprint: bytes) -> bool:
        """Whether this worker wrote down what its engine answers at this version."""
        records = self.host.disk.folders.get("/state/records")
        return records is not None and probe_name("memory", fingerprint) in records.entries

    def _requests(self, worker: Worker, engine: SimEngine) -> None:
        """A client that reads the weights one by one, as a forward pass does."""
        run = kernel()
        while True:
            run.sleep(run.rng.uniform(0.5, 4.0))
            try:
                with worker.gate.serving(run.rng.uniform(0.1, 3.0)) as serving:
                    seen = {}
                    for name in list(engine.tensors):
                        seen[name] = engine.tensors.get(name)
                        run.maybe()
                    self.world.oracle.answered(self, serving, seen)
                    if run.rng.random() < 0.1:
                        run.sleep(run.rng.uniform(0.5, 2.0 if self.world.healing else 6.0))
            except NotServing:
                self.world.oracle.checked["requests refused"] += 1


class PublisherActor:
    """One store on its host: commands on it, and at most one daemon."""

    def __init__(self, world: World, name: str, host: Host, *, keep: int):
        self.world, self.name, self.host, self.keep = world, name, host, keep
        self.records = f"/store/{MODEL}/records"
        self.key = world.keys[0] if world.keys else None
        self.daemon: Process | None = None
        self.daemon_wanted = False
        self.commands: list[Process] = []
        self.base: Content | None = None  # what the trainer wrote last
        self.writing = False  # whether the trainer is in the middle of a file

    def command(self, name: str, work: Callable[[Publisher], object], *, take_over: bool = False) -> Process:
        """Run `work` as one run of `refleet` would."""
        run = kernel()
        process = run.process(f"{self.name}:{name}", self.host)

        def main() -> None:
            try:
                with self._publisher(take_over=take_over, answer=True, resident=False) as publisher:
                    work(publisher)
            except RefleetError as error:
                run.note(f"{name} failed: {error.code}: {error.what}")
                self.world.failures[error.code] += 1
            run.kill(process, "ended")

        process.spawn(main, "main")
        self.commands = [each for each in self.commands if each.alive] + [process]
        return process

    def serve(self, *, take_over: bool = False) -> None:
        """As `refleet serve --watch` does."""
        run = kernel()
        self.daemon_wanted = True
        process = self.daemon = run.process(f"{self.name}:serve", self.host)
        process.on_death.append(lambda: self.world.daemon_died(self))

        def main() -> None:
            try:
                with (
                    self._publisher(take_over=take_over, answer=True, resident=True) as publisher,
                    publisher.store.lock("serve", wait_s=5.0, holder="refleet serve"),
                ):
                    serve.start(publisher)
                    serve.run(publisher, None, poll_s=1.0, stop=threads.Event())
            except RefleetError as error:
                run.note(f"serve ended: {error.code}: {error.what}")
                self.world.failures[error.code] += 1
            run.kill(process, "ended")

        process.spawn(main, "main")

    def store_id(self) -> str:
        """The id of the store on its disk, which names the publisher in every release; "" where there is none."""
        try:
            return bytes(self.host.disk.find(f"/store/{MODEL}/id").data).split()[-1].decode()
        except (FileNotFoundError, IndexError):
            return ""

    def payloads(self) -> list[str]:
        """Payloads that this store knows to be in the server."""
        return [name for name in self.host.disk.folders[self.records].entries if name.startswith("payload-")]

    def processes(self) -> list[Process]:
        return [each for each in (*self.commands, self.daemon) if each is not None and each.alive]

    def _publisher(self, **options: Any) -> Publisher:
        world = self.world
        return Publisher(
            world.network.stream(self.host), model=MODEL, store=Path("/store"), key=self.key, keep=self.keep,
            notify=lambda text: kernel().note(f"notify: {text}"), budget_wait_s=5.0, **options,
        )  # fmt: skip

    # ------------------------------------------------------------------ the trainer

    def write_checkpoint(self, content: Content, path: str, *, slowly: bool) -> None:
        """The trainer writes a file in place; `slowly`: piece by piece, which whoever reads meanwhile must notice."""
        disk, run = self.host.disk, kernel()
        disk.make_folder("/ckpt")
        full, disk.full = disk.full, False
        inode = disk.file(path)
        disk.full = full
        inode.cut(len(content.file))
        pieces = run.rng.randrange(2, 8) if slowly else 1
        step = -(-len(content.file) // pieces)

        def write(start: int) -> None:
            inode.write(content.file[start : start + step], start)
            inode.mtime_ns = disk.now_ns()
            self.writing = start + step < len(content.file)
            if self.writing:
                run.call_at(run.now + run.rng.uniform(0.001, 0.015), lambda: write(start + step))

        write(0)
