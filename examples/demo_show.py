"""The steps that the demo's acts are made of: train, publish, wait for the workers, ask them all."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from demo_checks import Report
from demo_fleet import WORKERS, Answer, WorkerProcesses
from demo_model import Digits, Trainer, accuracy
from demo_screen import Row, Screen
from refleet.common.messages import Ack, Release
from refleet.publisher import Published, Publisher
from refleet.publisher.fleet import Fleet, fleet

VICTIM = "worker-3"  # is killed and comes back
BROKEN = "worker-2"  # is broken on request, to see the demo fail
WAIT_S = 30.0
#: what is shown as one phase, and the timings in a worker's ack that belong to it
_PHASES = {
    "stage": ("stage",),
    "apply": ("verify", "apply", "read_back", "probe", "persist"),
    "pause": ("pause",),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How long the show is."""

    versions: int  # of the training, with the untrained one
    steps: int  # of training between two of them
    warm_up: int  # so many steps at a reduced learning rate
    back_to: str  # the version that the rollback goes to
    least_accuracy: float  # of the last trained version


FULL = Plan(versions=10, steps=30, warm_up=120, back_to="step-90", least_accuracy=0.95)
QUICK = Plan(versions=6, steps=30, warm_up=120, back_to="step-60", least_accuracy=0.90)


@dataclass(frozen=True, slots=True)
class First:
    """A version when it was first served: its release, the trainer's own answers, each worker's."""

    release: Release
    trainer: bytes
    workers: dict[str, Answer]


@dataclass(slots=True)
class Tally:
    """Counts over the whole demo: acks due and good; answers, those that named their version, those alike."""

    due: int = 0
    served: int = 0
    answers: int = 0
    named: int = 0
    alike: int = 0


@dataclass(slots=True)
class Show:
    """The running demo. `sabotage` breaks one worker at chosen moments, for real."""

    plan: Plan
    publisher: Publisher
    processes: WorkerProcesses
    screen: Screen
    report: Report
    data: Digits
    trainer: Trainer
    sabotage: tuple[str, ...] = ()
    first: dict[str, First] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    def train(self) -> None:
        """The steps up to the next version."""
        for _ in range(self.plan.steps):
            self.trainer.train_step()

    def publish(self, *, without: str | None = None, breaks: tuple[str, ...] = ()) -> Release:
        """Publish the weights as they are, wait for the workers, ask them."""
        started, hashed = time.perf_counter(), 0.0

        def note(phase: str, _done: int, _total: int) -> None:
            nonlocal hashed
            if phase != "send":
                hashed = ms_since(started)

        published = self.publisher.publish(self.trainer.weights(), version=self.trainer.version, on_progress=note)
        spent = {"hash": hashed, "send": ms_since(started) - hashed}
        self.wait(published, workers=len(WORKERS) - (without is not None), spent=spent)
        for how in breaks:
            self.break_worker(how)
        answers = self.ask(published.release, without=without)
        self.first[published.version] = First(published.release, self.trainer.answer(), answers)
        self.compare(published.release, answers, spent)
        return published.release

    def wait(self, published: Published, *, workers: int, spent: dict[str, float]) -> dict[str, Ack]:
        """Until `workers` of them serve it; adds the phases of the slowest one to `spent`, in milliseconds.

        Raises: RefleetError with a worker's reason, WorkerDied.
        """
        started = time.perf_counter()

        def look(now: Fleet, _acks: dict[str, Ack]) -> None:
            self.screen.fleet = now
            self.processes.check()

        acks = published.wait(workers=workers, timeout_s=WAIT_S, on_progress=look)
        for phase, parts in _PHASES.items():
            spent[phase] = max(sum(ack.timings_ms.get(part, 0.0) for part in parts) for ack in acks.values())
        spent["acks"] = ms_since(started)
        for name, ack in acks.items():
            self.screen.receive(name, ack.order, ack.payload_bytes)
        self.tally.due += workers
        self.tally.served += sum(ack.fingerprint == published.release.fingerprint for ack in acks.values())
        self.screen.fleet = fleet(self.publisher.stream)
        return acks

    def ask(self, release: Release, *, without: str | None = None) -> dict[str, Answer]:
        """The whole test set to every worker; counts those that name `release` as what answered. Raises: WorkerDied."""
        answers = self.processes.ask(self.data.test_images, without=without)
        wanted = (release.version, release.fingerprint.hex())
        self.tally.answers += len(answers)
        self.tally.named += sum((answer.version, answer.fingerprint) == wanted for answer in answers.values())
        return answers

    def compare(self, release: Release, answers: dict[str, Answer], spent: dict[str, float] | None) -> int:
        """How many workers answered as the trainer did for this version; the worst accuracy gets on the screen."""
        alike = sum(answer.logits == self.first[release.version].trainer for answer in answers.values())
        self.tally.alike += alike
        right = min(accuracy(answer.logits, self.data.test_labels) for answer in answers.values())
        if spent is not None:
            self.screen.add(Row(release.version, release.kind, right, release.payload_bytes, release.full_bytes, spent))
        return alike

    def break_worker(self, how: str) -> None:
        """Really damage one worker: what the demo checks must find it."""
        broken = self.processes.by_id[BROKEN].post("/break", {"how": how})["broken"]
        self.screen.say(f"{BROKEN} was broken on request: {broken}")


def ms_since(started_s: float) -> float:
    """Milliseconds since a `time.perf_counter()`."""
    return (time.perf_counter() - started_s) * 1000
