"""What publisher and worker agree on. Imports neither of them.

Facts and rules
    types          the facts about tensors, versions and deltas, as frozen dataclasses
    messages       what both sides say to each other: releases, offers, acks, worker status
    errors         the whole error tree, and what every message has to say
    limits         every bound in one place, checked before anything is allocated
    config         settings from `refleet.toml` and the environment
    crashpoint     places where a test may kill the process

Bytes
    digest         BLAKE3 of tensors and chunks, and the fingerprint of a version
    wire           records <-> msgpack, strict
    signing        signed envelopes, signing keys, the trust file
    codec          which codecs there are, and which one a block of a tensor gets
    zstd           safe zstd frames, and the codec that compresses byte planes
    sparse         the codec for blocks of which few elements changed
    delta          what turns a base version into a target: plan, body, chunks, index
    tensors        torch tensors <-> dtype text and bytes

Store
    store          tensors by digest, manifests by fingerprint, and small records, on local disk
    objects        its tensors: the packs of one folder, shared by several processes
    pack           one pack: many tensors in an append-only file
    retention      which packs go, which stay, which are copied
    records        small files that are there whole or not at all, and locks

Stream
    stream         what a carrier of records and chunks must do, and the table of Redis keys
    redis_stream   the carrier over Redis or Valkey
    redis_link     its connections and time limits, and the server's errors in refleet's words
    redis_replies  its replies as facts
    redis_scripts  its Lua: the fence is checked and the entry written in one step
    memory_stream  its twin in this process, for tests
"""

__all__ = [
    "types", "messages", "errors", "limits", "config", "crashpoint",
    "digest", "wire", "signing", "codec", "zstd", "sparse", "delta", "tensors",
    "store", "objects", "pack", "retention", "records",
    "stream", "redis_stream", "redis_link", "redis_replies", "redis_scripts", "memory_stream",
]  # fmt: skip
