"""Every bound in one place. Checked before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds in bytes and counts. Both sides use `LIMITS`; tests may pass smaller ones."""

    record_bytes: int = MIB  # one signed record of the log
    index_bytes: int = 64 * MIB  # the table of one delta: about 120 bytes a tensor
    chunk_bytes: int = 4 * MIB - 64 * KIB  # a little below a power of two: jemalloc wastes 25 % at the power itself
    chunk_bytes_max: int = 64 * MIB  # what a reader accepts
    block_bytes: int = 16 * MIB  # decoded bytes of one codec block: bounds the memory of encode and decode
    preface_bytes: int = 4 * KIB  # what stands before an encoded block
    tensors: int = 100_000
    tensor_name_bytes: int = 512
    tensor_dims: int = 16
    tensor_bytes: int = 1 << 48  # a sanity bound on one tensor; memory and disk are bounded by blocks, not by this
    header_bytes: int = 16 * MIB  # JSON header of one safetensors file
    shards: int = 10_000
    message_bytes: int = 4096
    held_versions: int = 16  # versions that a worker names as possible bases
    lacking: int = 1024  # damaged tensors that a worker asks for one by one; beyond that it asks for everything
    ack_entries: int = 1000
    control_entries: int = 256
    log_entries: int = 10_000
    members: int = 100_000
    bundle_record_bytes: int = 256 * MIB  # of an engine bundle: its graphs are the bulk, some 200 bytes a node
    bundle_graphs: int = 10_000


LIMITS = Limits()
