"""What Prometheus reads of one worker. Gauges are read off the board when asked; the rest counts what its acks say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..common.messages import Ack, Evidence, WorkerStatus
from .board import STATES

if TYPE_CHECKING:
    from .worker import Worker

#: phases of a switch as acks name them; `pause` is how long requests had to wait
PHASES = ("stage", "verify", "prepare", "apply", "read_back", "probe", "persist", "pause")
#: a pause of a small module takes a millisecond, staging of a large model an hour
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class Metrics:
    """The metrics of `worker`, in a registry of their own. Counts from the moment it is made."""

    def __init__(self, worker: Worker):
        self.registry = CollectorRegistry()
        self._switches = Counter(
            "refleet_worker_switches", "Switches of the engine that were proven and served.", registry=self.registry
        )
        self._failures = Counter(
            "refleet_worker_failures",
            "Releases or checks that failed here, by error.",
            ["code"],
            registry=self.registry,
        )
        phase = Histogram(
            "refleet_worker_phase_seconds", "Time per phase.", ["phase"], buckets=_BUCKETS_S, registry=self.registry
        )
        self._phases = {name: phase.labels(name) for name in PHASES}
        self.registry.register(_Facts(worker))
        worker.acks.listen(self._count)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)

    def _count(self, ack: Ack) -> None:
        if ack.failure is not None:
            self._failures.labels(ack.failure.code).inc()
        elif ack.evidence == Evidence.SERVING and "apply" in ack.timings_ms:  # else it repeats or verifies
            self._switches.inc()
        for name, milliseconds in ack.timings_ms.items():
            # staging is told twice: when it is done, and again with the switch
            if name in self._phases and (name == "stage") == (ack.evidence == Evidence.STAGED):
                self._phases[name].observe(milliseconds / 1000)


class _Facts(Collector):
    """What the worker's board says now."""

    def __init__(self, worker: Worker):
        self._worker = worker

    def collect(self) -> Iterable[Metric]:
        worker, board = self._worker, self._worker.board
        status, current = board.status, worker.gate.current
        yield _info(
            "refleet_worker_info", "The worker.", worker=status.worker, model=status.model, instance_id=status.instance,
            engine=status.engine_build, signed=str(status.signed).lower(),
        )  # fmt: skip
        yield _info(
            "refleet_worker_serving_info", "What answers requests; 0 when nothing does.",
            value=0.0 if current is None else 1.0,
            version=current.version if current else "", fingerprint=current.fingerprint.hex() if current else "",
            state=status.state,
        )  # fmt: skip
        state = GaugeMetricFamily("refleet_worker_state", "1 for the present state.", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(name == status.state))
        yield state
        if status.target is not None:
            target = status.target
            yield _info(
                "refleet_worker_target_info", "The release to reach, or reached.",
                version=target.version, fingerprint=target.fingerprint.hex(),
            )  # fmt: skip
            yield _gauge("refleet_worker_target_epoch", "Epoch of the target.", target.epoch)
            yield _gauge("refleet_worker_target_seq", "Number of the target in the log.", target.seq)
        if (lag := lag_releases(status)) is not None:
            yield _gauge("refleet_worker_lag_releases", "Releases between what is served and the target.", lag)
        yield _gauge("refleet_worker_behind_seconds", "For how long the target has not been served.", board.behind_s)
        yield _gauge("refleet_worker_evidence", "For the target: 0 NONE ... 5 SERVING.", status.evidence)
        yield _gauge("refleet_worker_silence_seconds", "Since the server answered last.", board.silence_s)
        yield _gauge("refleet_worker_up", "1 while the worker follows the fleet.", worker.alive)
        yield _gauge("refleet_worker_start_time_seconds", "When it started, Unix time.", status.started_at_ms / 1000)
        yield CounterMetricFamily("refleet_worker_received_bytes", "Payload bytes received.", board.received_total)
        yield CounterMetricFamily(
            "refleet_worker_early_bytes", "Payload bytes that came before their release.", board.early_total
        )
        yield CounterMetricFamily("refleet_worker_refused_records", "Records not acted on.", status.refused)


def lag_releases(status: WorkerStatus) -> int | None:
    """How many releases lie between what is served and the target; 0 only if they are the same. None: can't be said."""
    if status.target is None or status.serving is None:
        return None
    if status.target == status.serving:
        return 0
    return max(status.target.seq - status.serving.seq, 1)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, float(value))


def _info(name: str, text: str, *, value: float = 1.0, **labels: str) -> GaugeMetricFamily:
    """Facts as labels, as Prometheus has no texts."""
    gauge = GaugeMetricFamily(name, text, labels=list(labels))
    gauge.add_metric(list(labels.values()), value)
    return gauge
