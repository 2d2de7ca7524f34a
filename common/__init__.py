"""What publisher and worker agree on. Imports neither of them.

Facts and rules
    types          the facts about tensors, versions and deltas, as frozen dataclasses
    messages       what both sides say to each other: releases, offers, acks, worker status
    errors         the whole error tree, and what every message has to say
    limits         every bound in one place, checked before anything is allocated
    config         settings from `refleet.toml` and the environment
    crashpoint     places where a test may kill the process

Bytes
    digest         of tensors, chunks and whole versions
    wire           records <-> msgpack, strict
    signing        signed envelopes, signing keys, the trust file
    codec          which codecs there are, and which one a block gets
    sparse         the codec for blocks of which few elements changed, by class of the base's exponent
    planes, zstd   the codecs that take elements apart into byte planes, and safe zstd frames
    lowrank        a low-rank update predicted from its factors
    preface        what stands before each block, so that it can be decoded early
    kernels        the work per element, in C or numpy: kernels_numpy, kernels_symbols, kernels_types, varint
    layout         where the tensors of a delta lie in its blocks
    delta          what turns a base version into a target: plan, body, chunks, index
    tensors        torch tensors <-> dtype text and bytes
    threads        work over threads, in order and ahead, with bounded memory

Store
    store          tensors by digest, manifests by fingerprint, and small records, on local disk
    objects, pack  its whole tensors: packs, append-only files of many, shared by several processes
    derived, deltas   its tensors kept as changes to others; rebuild: through several of them
    memory         its tensors in this process's memory, in buffers that are used again
    host_memory, host_image   its tensors in memory that the workers of a host share
    store_folder, named_records   its identity, who keeps what, and small records by name
    shm            folders in this machine's memory
    manifests      its versions; folder_stamp: whether another process changed a folder
    retention      which packs go, which stay, which are copied
    records        small files that are there whole or not at all, and locks; unsettled: visible, and synced later

Stream
    stream         what a carrier of records and chunks must do, and the table of Redis keys
    redis_stream   the carrier over Redis or Valkey
    redis_link     its connections and time limits, and the server's errors in refleet's words
    redis_payload, redis_reader, redis_wire   payload bytes from and into the caller's memory, on raw sockets
    redis_replies  its replies as facts
    redis_scripts  its Lua: the fence is checked and the entry written in one step
    stream_rules   decisions and errors that all forms share
    memory_stream, memory_server   its twin in this process, for tests
"""

__all__ = [
    "types", "messages", "errors", "limits", "config", "crashpoint",
    "digest", "wire", "signing", "codec", "sparse", "planes", "zstd", "lowrank", "kernels", "layout", "preface",
    "delta", "tensors", "threads",
    "store", "objects", "pack", "derived", "deltas", "rebuild", "memory", "host_memory", "host_image", "manifests",
    "folder_stamp", "retention", "records", "unsettled", "store_folder", "named_records", "shm",
    "stream", "redis_stream", "redis_link", "redis_payload", "redis_reader", "redis_wire", "redis_replies",
    "redis_scripts", "stream_rules", "memory_stream", "memory_server",
]  # fmt: skip
