"""Whether a version may follow the one before it: with the same names, dtypes and shapes, unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping

from ..common.errors import IncompatibleCheckpoint
from ..common.messages import Release
from ..common.stream import Stream
from ..common.types import Manifest, TensorSpec
from .fleet import newest_release


def restructures(
    stream: Stream, specs: Mapping[str, TensorSpec], head: Release | None, base: Manifest | None, *, version: str,
    allowed: bool,
) -> bool:  # fmt: skip
    """Whether `version` with `specs` has, or may have, another structure than the release before it.

    Args: `head` this store's last release, and `base` its manifest; None: there is none, or bit rot took it.
    Raises: IncompatibleCheckpoint when it has and that is not `allowed`; StreamError.
    """
    if not allowed:
        if head and base:
            compatible(specs, base, version=version, earlier_version=head.version)
        return False
    before = newest_release(stream)
    if base is None or (before is not None and before.fingerprint != base.fingerprint):
        return head is not None or before is not None  # another store's, or bit rot took it: nobody here knows it
    return specs != base.specs


def compatible(specs: Mapping[str, TensorSpec], earlier: Manifest, *, version: str, earlier_version: str) -> None:
    """Whether `specs` can follow `earlier` as a version of the same model: the same names, dtypes and shapes.

    Raises: IncompatibleCheckpoint naming the first tensor (by name) that is missing, extra or different, and how many
    more there are.
    """
    before = earlier.specs
    names = sorted(specs.keys() | before.keys(), key=str.encode)
    differing = [name for name in names if specs.get(name) != before.get(name)]
    if not differing:
        return
    name, further = differing[0], len(differing) - 1
    ours, theirs = specs.get(name), before.get(name)
    if ours is None:
        what = f"tensor {theirs} of {earlier_version} is missing from {version}"
    elif theirs is None:
        what = f"tensor {ours} of {version} is extra: {earlier_version} has no such tensor"
    else:
        what = (
            f"tensor {name} is {ours.dtype}{list(ours.shape)} in {version}, "
            f"but {theirs.dtype}{list(theirs.shape)} in {earlier_version}"
        )
    if further:
        what += f"; {further} further tensor{'s differ' if further > 1 else ' differs'}"
    raise IncompatibleCheckpoint(
        what,
        about=f"version {version} with {len(specs)} tensors, after {earlier_version} with {len(before)}",
        next="publish it under another --model name; or, where the workers' engines can follow, publish or roll back "
        "with --allow-structure-change",
        tensor=name,
    )
