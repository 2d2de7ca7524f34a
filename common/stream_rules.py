"""Rules and errors that both forms of `Stream` share: who may claim, what a fence refuses, what is too large."""

from __future__ import annotations

from .errors import LimitExceeded, PublisherBusy, StaleEpoch, StreamError, StreamGap
from .limits import Limits
from .messages import Lease
from .stream import LogId


def next_epoch(lease: Lease, *, held: Lease | None, epoch: int, floor: int, take_over: bool) -> int:
    """The rule of `claim`, given who holds the lease and the highest claimed epoch (0: none, or the server lost it)."""
    foreign = held is not None and held.publisher != lease.publisher
    if foreign and not take_over:
        raise PublisherBusy(
            f"another publisher holds the lease: {held}",
            next="its lease expires 30 s after its last command: wait, or publish with --take-over to fence it off",
        )
    if lease.epoch > 0 and max(epoch, floor) <= lease.epoch and not foreign:
        return lease.epoch
    return max(epoch, floor, lease.epoch) + 1


def fenced_off(lease: Lease, *, held: Lease | None, epoch: int) -> StaleEpoch:
    """The error for a write under `lease` that the fence refused."""
    newer = held is not None and (held.publisher != lease.publisher or held.epoch > lease.epoch)
    by = f"taken over by {held}" if newer else f"a newer publisher raised the epoch to {epoch}"
    return StaleEpoch(
        f"epoch {lease.epoch} may not publish any more: {by}",
        about=f"{lease}; nothing was written",
        next="publish from the store that took over, or claim a new epoch with --take-over",
    )


def not_next(order: LogId, *, last: str) -> StreamError:
    """The error for an append below the end of the log; `last` is the log's last id."""
    return StreamError(
        f"release {order[0]}-{order[1]} can't be appended: the log has gone on to {last}",
        next="publish again: it takes the next number",
    )


def id_taken(what: str, *, there: bool = True) -> StreamError:
    """The error for an explicit id that holds other bytes, or (not `there`) lies below the end without being used."""
    why = "is already there with other bytes" if there else "was passed over: later ones are there"
    return StreamError(f"{what} {why}", next="publish again: it takes new numbers")


def gap(payload_id: str, missing: list[int]) -> StreamGap:
    shown = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
    return StreamGap(
        f"payload {payload_id} lacks chunk {shown}: expired, dropped, never written, or lost by the server",
        next="workers ask for a new payload by themselves; `refleet serve` or the publisher answers",
    )


def check_size(size_bytes: int, limit_bytes: int, what: str) -> None:
    """Raises LimitExceeded before anything is sent that no reader would accept."""
    if size_bytes > limit_bytes:
        raise LimitExceeded(f"{what} of {size_bytes} bytes exceeds the limit of {limit_bytes}")


def check_members(count: int, limits: Limits, model: str) -> None:
    """Raises LimitExceeded before their statuses are read."""
    if count > limits.members:
        raise LimitExceeded(
            f"{count} members of {model} exceed the limit of {limits.members}",
            next="see who adds workers to this model, and remove those that are not yours",
        )


def too_large(payload_id: str, number: int, size_bytes: int, room_bytes: int) -> LimitExceeded:
    return LimitExceeded(
        f"chunk {number} of payload {payload_id} has {size_bytes} bytes, its reader expects at most {room_bytes}"
    )
