"""Compare a checkpoint with the version before it, and send and store what changed, in one reading.

    read -> compare -> hash -> encode -> send, and into the store as the same delta

The first bytes leave before the last tensor was read. What they lead to is known at the end, so nothing is announced
and nothing becomes part of the store before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..common.crashpoint import crash_point
from ..common.delta import Encoder
from ..common.deltas import StoredDelta
from ..common.layout import in_body_order
from ..common.lowrank import Factors
from ..common.store import Store
from ..common.threads import ahead
from ..common.types import Manifest, PayloadRef
from .checkpoint import Checkpoint
from .compare import Comparison, OnBytes, RottenBaseError
from .payloads import Payloads

#: chunks that are encoded while earlier ones are being sent
_AHEAD = 2


def broadcast(
    checkpoint: Checkpoint, base: Manifest | None, store: Store, payloads: Payloads, *, resident: bool,
    factors: Mapping[str, Factors], accept: Callable[[Manifest], bool], on_progress: OnBytes,
) -> tuple[Manifest, PayloadRef | None]:  # fmt: skip
    """The checkpoint's manifest, its version in the store, and its payload in the server, if somebody needs it.

    Args: without `base` all of it is sent and stored; `resident` keeps the new version in memory, to compare the next
    one with; `factors` as for `Comparison`; `accept` is asked about the manifest when all of it was read, raises if it
    must not be published, and answers whether anybody needs the payload.
    Raises: CheckpointChanged and other CheckpointErrors, OverBudget, StreamError, StoreError, what `accept` raises.
    """
    total = sum(spec.size_bytes for spec in checkpoint.specs.values())
    while True:
        compared = Comparison(checkpoint, base, store, keep=resident, factors=factors)
        try:
            held = base.digests if base else ()
            with store.memory.pinned(held), store.delta() as delta, payloads.outgoing(base) as out:
                store.load(held)
                encoder = Encoder(compared.inputs())
                for chunk in ahead(encoder.chunks(), depth=_AHEAD):
                    out.put(chunk)
                    delta.write(chunk)
                    on_progress("send", compared.read_bytes, total)
                checkpoint.confirm()
                on_progress("send", total, total)
                manifest = compared.manifest()
                wanted = accept(manifest) and manifest != base
                index = encoder.index(compared.changed, target=manifest, base=base)
                ref = out.finish(index) if wanted else None
                if index.blocks:
                    delta.commit(StoredDelta.of(index, in_body_order(compared.changed), base))
                store.put_manifest(manifest)
        except RottenBaseError:  # that tensor travels whole then; each round loses one more, so that this ends
            continue
        crash_point("publisher.stored")
        if resident:
            store.memory.put(compared.held)
            store.memory.pin(manifest.digests)
            store.memory.trim()
        return manifest, ref
