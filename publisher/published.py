"""A release, and the way to wait for the workers to serve it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..common.messages import Ack, Evidence, Release
from ..common.stream import Stream
from .fleet import Fleet
from .wait import as_evidence, wait_for


@dataclass(frozen=True, slots=True)
class Published:
    """A release and the way to wait for it. `release` has version, fingerprint, payload_bytes, full_bytes..."""

    release: Release
    stream: Stream
    already: bool = False  # it was the target before: nothing was sent

    @property
    def version(self) -> str:
        return self.release.version

    def wait(
        self,
        workers: int | None = None,
        *,
        evidence: str | Evidence = Evidence.SERVING,
        timeout_s: float = 60.0,
        on_progress: Callable[[Fleet, dict[str, Ack]], None] = lambda _fleet, _acks: None,
    ) -> dict[str, Ack]:
        """Acks by worker once `workers` of them (default: every live one) reached `evidence`.

        Raises: WorkerFailed with the worker's reason, DeadlineExceeded naming who is missing, Superseded.
        """
        return wait_for(
            self.stream, self.release, workers=workers, evidence=as_evidence(evidence), timeout_s=timeout_s,
            on_progress=on_progress,
        )  # fmt: skip
