"""Which versions stay in the publisher's store, and why."""

from __future__ import annotations

from ..common.messages import Release
from .book import SentPayload
from .fleet import Fleet


def reasons_to_keep(
    releases: list[Release], fleet: Fleet, payloads: list[SentPayload], *, keep: int
) -> dict[bytes, str]:
    """Fingerprint -> the first reason why this version must stay; every other version may go.

    The last `keep` distinct versions (the rollback window, the target among them), what these were sent relative to,
    what any worker serves (the base of its next delta), and what a payload in the server leads to.
    """
    reasons: dict[bytes, str] = {}
    recent = list(dict.fromkeys(release.fingerprint for release in reversed(releases)))
    for number, fingerprint in enumerate(recent[:keep]):
        reasons[fingerprint] = "the target" if number == 0 else f"one of the last {keep}"
    for release in releases:
        if release.fingerprint in reasons and release.payload and release.payload.base not in (None, release.base):
            reasons.setdefault(release.payload.base, f"{release.version} was sent relative to it")
    for worker in fleet.workers:
        if worker.status and worker.status.serving:
            reasons.setdefault(worker.status.serving.fingerprint, f"worker {worker.id} serves it")
    for payload in payloads:
        reasons.setdefault(payload.target, "a payload towards it is in the server")
    return reasons
