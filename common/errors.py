"""The whole error tree on one screen.

    RefleetError
      CheckpointError  UnreadableCheckpoint IncompatibleCheckpoint CheckpointChanged VersionExists UnknownVersion
      ProtocolError    MalformedRecord LimitExceeded BadSignature UnknownKey StaleEpoch ReplayedRelease PublisherBusy
      StreamError      StreamUnavailable StreamGap StreamReset NotDurable OverBudget
      StoreError       DamagedTensor StoreBusy StoreFull
      ApplyError       WrongBase DigestMismatch NotRefittable RefitFailed ProbeMismatch Quarantined NotServing
      RolloutError     DeadlineExceeded WorkerFailed Superseded
      UsageError

Every message has four parts: what happened, to what (release, worker, tensor), what is being served now, and the
next command. `code` is the class name: it is what acks, `--json` and metrics carry.
"""

from __future__ import annotations


class RefleetError(Exception):
    """Base of all errors that refleet raises on purpose.

    Args: `what` happened; `about` which release, worker, tensor or file; `serving` what is being served now;
    `next` what to do, usually a command; `tensor` the tensor's name where there is one.
    """

    exit_code = 1

    def __init__(self, what: str, *, about: str = "", serving: str = "", next: str = "", tensor: str | None = None):  # noqa: A002
        super().__init__(what)
        self.what, self.about, self.serving, self.next, self.tensor = what, about, serving, next, tensor

    @property
    def code(self) -> str:
        return type(self).__name__

    def __str__(self) -> str:
        parts = [self.what]
        if self.about:
            parts.append(f"about: {self.about}")
        if self.serving:
            parts.append(f"serving now: {self.serving}")
        if self.next:
            parts.append(f"next: {self.next}")
        return "\n  ".join(parts)

    def to_dict(self) -> dict[str, str | None]:
        """The stable keys under `error` in every `--json` output."""
        return {
            "code": self.code,
            "what": self.what,
            "about": self.about,
            "serving": self.serving,
            "next": self.next,
            "tensor": self.tensor,
        }


class CheckpointError(RefleetError):
    """What was handed to `publish` can't become this version. Nothing was published."""


class UnreadableCheckpoint(CheckpointError):
    """Missing, truncated, corrupt, or not safetensors."""


class IncompatibleCheckpoint(CheckpointError):
    """Names, dtypes or shapes differ from the model's earlier versions."""


class CheckpointChanged(CheckpointError):
    """The file changed while it was read, so tensors of two checkpoints might have been mixed."""


class VersionExists(CheckpointError):
    """The version id is taken by other content."""


class UnknownVersion(CheckpointError):
    """The store has no such version, or no longer its tensors."""


class ProtocolError(RefleetError):
    """A record that must not be acted on."""


class MalformedRecord(ProtocolError):
    """Not a record of this format: wrong shape, type, version or range."""


class LimitExceeded(ProtocolError):
    """Larger than limits.py allows; refused before anything was allocated."""


class BadSignature(ProtocolError):
    """Signature missing where a trust file demands one, or not matching the bytes."""


class UnknownKey(ProtocolError):
    """Signed by a key that the trust file does not name."""


class StaleEpoch(ProtocolError):
    """Written by a publisher whose epoch was superseded."""


class ReplayedRelease(ProtocolError):
    """Not newer than the release already accepted, and not the same one again."""


class PublisherBusy(ProtocolError):
    """Another store holds the publisher's lease of this model."""


class StreamError(RefleetError):
    """The carrier failed. What is served is not affected."""

    exit_code = 4


class StreamUnavailable(StreamError):
    """Redis can't be reached, or refuses to serve."""


class StreamGap(StreamError):
    """Chunks of a payload are missing: trimmed, expired, or never written."""


class StreamReset(StreamError):
    """The server lost data that was acknowledged before."""


class NotDurable(StreamError):
    """The server is configured to drop keys under memory pressure."""


class OverBudget(StreamError):
    """The payload does not fit the memory granted to payloads."""


class StoreError(RefleetError):
    """The content-addressed store on local disk can't do what was asked."""


class DamagedTensor(StoreError):
    """Stored bytes no longer match their digest, or are missing: `digest` names them."""

    def __init__(self, what: str, *, digest: bytes, **parts: str):
        super().__init__(what, **parts)
        self.digest = digest


class StoreBusy(StoreError):
    """Another process holds the store's lock."""


class StoreFull(StoreError):
    """The disk has no room (ENOSPC, EDQUOT), or may not be written."""


class ApplyError(RefleetError):
    """A worker could not put a release into its engine."""


class WrongBase(ApplyError):
    """The delta is relative to a version that this worker does not hold."""


class DigestMismatch(ApplyError):
    """Rebuilt or installed bytes differ from what the publisher signed."""


class NotRefittable(ApplyError):
    """Names, dtypes or shapes differ from the engine's: refused before payload bytes moved."""


class RefitFailed(ApplyError):
    """The engine refused the new weights."""


class ProbeMismatch(ApplyError):
    """The engine's behaviour after the refit is not the version's."""


class Quarantined(ApplyError):
    """The engine's content is unknown and could not be restored: the worker stopped serving."""


class NotServing(ApplyError):
    """A request came while no verified version is served."""


class RolloutError(RefleetError):
    """A release was published, but the fleet did not get to where it was asked to be."""

    exit_code = 3


class DeadlineExceeded(RolloutError):
    """Not enough workers reached the wanted evidence in time."""


class WorkerFailed(RolloutError):
    """A worker refused or failed the release; the message carries its reason."""


class Superseded(RolloutError):
    """A newer release replaced this one before the fleet reached it."""


class UsageError(RefleetError):
    """A command or call that can't be meant as written."""

    exit_code = 2
