"""One worker that serves v1, and a release v2 whose payload a test may spoil before the worker sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hostile import Line, Outsider, raw_lines
from refleet.common.messages import Evidence
from refleet.common.types import PayloadRef
from refleet.publisher import Publisher
from refleet.publisher.published import Published
from refleet.worker.memory_engine import MemoryEngine
from world import World, checkpoint, holds, served

Until = Callable[..., None]
FIRST = checkpoint(1)
SECOND = checkpoint(2, change=0.05, base=FIRST)


class Watched(MemoryEngine):
    """Notes what it was given, and whether the worker's store held all of it, verified, by then."""

    def __init__(self) -> None:
        super().__init__()
        self.unproven: list[str] = []

    def apply(self, staged, changed):  # type: ignore[no-untyped-def]
        self.unproven += [entry.spec.name for entry in staged.store.missing(staged.manifest)]
        for entry in staged.manifest.tensors:
            staged.store.read(entry.digest, verify=True)
        super().apply(staged, changed)


@dataclass
class Scene:
    """v1 is served; v2 is in the log with its payload in the server; the worker, stopped before, has not seen it."""

    world: World
    until: Until
    outsider: Outsider
    publisher: Publisher
    two: Published
    engine: Watched

    @classmethod
    def of(cls, world: World, until: Until) -> Scene:
        publisher, engine = world.publisher(), Watched()
        world.worker(engine=engine)
        publisher.publish(FIRST, version="v1").wait(workers=1, timeout_s=20)
        world.stop("w0")
        two = publisher.publish(SECOND, version="v2")
        assert two.release.payload is not None
        return cls(world, until, Outsider(world.carrier), publisher, two, Watched())

    @property
    def ref(self) -> PayloadRef:
        assert self.two.release.payload is not None
        return self.two.release.payload

    @property
    def base(self) -> bytes:
        assert self.two.release.base is not None
        return self.two.release.base

    def lines(self) -> list[Line]:
        """An honest delta v1 -> v2, to be spoiled."""
        store = self.publisher.store
        return raw_lines(self.publisher, store.manifest(self.two.release.fingerprint), store.manifest(self.base))

    def only(self, ref: PayloadRef) -> PayloadRef:
        """Make this payload the only one that the worker finds."""
        self.world.carrier.stream().drop_payload(self.ref.payload_id)
        self.outsider.offer(self.publisher, ref)
        return ref

    def converges(self, refused: PayloadRef, *, because: str) -> None:
        """The worker refuses that payload for this reason and serves v2 by another one; the engine saw only v2."""
        worker = self.world.worker(engine=self.engine)
        worker.wait("v2", timeout_s=20)
        self._refused(refused, because)
        assert holds(worker, SECOND)
        assert self.engine.unproven == []
        self.until(lambda: self.world.acks("w0")[-1].evidence == Evidence.SERVING, "SERVING is acknowledged")
        final = self.world.acks("w0")[-1]
        assert final.fingerprint == self.two.release.fingerprint
        assert final.failure is None

    def stays(self, refused: PayloadRef, *, because: str) -> None:
        """Without a publisher that answers, the worker asks for another payload and serves v1 meanwhile."""
        self.publisher.close()
        self.world.publishers.clear()
        worker = self.world.worker(engine=self.engine)

        def asks() -> bool:
            want = worker.board.status.want
            return want is not None and refused.payload_id in want.refused

        self.until(asks, f"{refused.payload_id} is named as refused")
        self._refused(refused, because)
        want = worker.board.status.want
        assert want is not None
        assert want.target == self.two.release.fingerprint
        assert served(worker).version == "v1"  # type: ignore[union-attr]
        assert holds(worker, FIRST)
        assert len(self.engine.written) == len(FIRST), "I3: only v1, from its own disk"
        assert self.two.release.fingerprint not in worker.store.manifests()

    def _refused(self, ref: PayloadRef, because: str) -> None:
        if because == "StreamGap":  # nothing wrong with what is there: it is only not all there
            return
        assert because in self.refusals, self.world.events["w0"]

    @property
    def refusals(self) -> list[str]:
        """Codes of the payloads that the worker refused, in order."""
        told = [e for e in self.world.events["w0"] if e.text.startswith("refused a payload")]
        return [e.failure.code for e in told if e.failure]
