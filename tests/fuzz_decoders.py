"""Every decoder of bytes from outside, with valid inputs to begin from: what the fuzzer and its corpus run.

A decoder may refuse with an error of refleet's tree, or accept. Anything else is a finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fuzz_files
import numpy as np
import refleet.publisher.book
import refleet.worker.state  # noqa: F401 - both register records
from fuzz_scene import Decoder, body_between, manifest_of, two_versions
from refleet.common import codec, lowrank, preface, wire
from refleet.common.delta import target_manifest, unpack_index
from refleet.common.limits import MIB
from refleet.common.signing import Trust, open_envelope, seal
from refleet.common.store import Store
from refleet.common.types import DTYPE_BYTES, Index
from refleet.worker.early_decode import EarlyDecoder
from test_wire import GOLDEN, KEY, RECORDS


def decoders(folder: Path, *, only: Sequence[str] = ()) -> list[Decoder]:
    """All of them; `folder` is empty and theirs."""
    made = [*_records(), *_codecs(), *_bodies(folder), *fuzz_files.decoders(folder)]
    return [decoder for decoder in made if not only or decoder.name in only]


# ---------------------------------------------------------------------- records


def _records() -> list[Decoder]:
    golden = [bytes.fromhex(text) for text in GOLDEN.values()]
    kinds = tuple(wire._TAGS)
    trust = Trust({KEY.key_id: KEY._private.public_key()})
    sealed = [seal(wire.pack(record), key) for record in list(RECORDS.values())[:6] for key in (KEY, None)]
    indexes = [data for data in golden if b"index" in data[:8]]

    def envelope(data: bytes) -> None:
        for trusted in (None, trust):
            wire.unpack_any(open_envelope(data, trusted).payload, kinds)

    def index(data: bytes) -> None:
        target_manifest(unpack_index(data), None)

    return [
        Decoder("record", lambda data: wire.unpack_any(data, kinds), golden),
        Decoder("envelope", envelope, sealed),
        Decoder("index", index, [wire.pack(Index(None, b"t" * 32, (), (), 4096, 0, (), ())), *indexes]),
    ]


# ---------------------------------------------------------------------- codecs and bodies

_ELEMENTS = 700
_DTYPES = ("BF16", "F32", "U8", "F64", "F16")


def _pair(dtype: str) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    random = np.random.default_rng(3)
    base = random.integers(0, 256, _ELEMENTS * DTYPE_BYTES[dtype], dtype=np.uint8)
    new = base.copy()
    new.view(f"<u{DTYPE_BYTES[dtype]}")[:: random.integers(5, 30)] += 1
    return base, new


def _factored(new: np.ndarray, base: np.ndarray, dtype: str) -> bytes:  # type: ignore[type-arg]
    """A lowrank block, whether it is small or not; of a product that is zero."""
    rows, rank = 70, 2
    a, b = np.ones(rank * _ELEMENTS // rows, "<f4"), np.zeros(rows * rank, "<f4")
    factors = lowrank.Factors(a.view(np.uint8), b.view(np.uint8), "F32", rows, _ELEMENTS // rows, rank)
    number, rest = codec.encode_block(new, lowrank.predict(base, factors, dtype=dtype), dtype=dtype)
    return lowrank.pack_factors(factors) + bytes([number]) + bytes(rest)


def _codecs() -> list[Decoder]:
    """The first byte of an input chooses the dtype."""

    def decoder(number: int) -> Decoder:
        def decode(data: bytes) -> None:
            dtype = _DTYPES[data[0] % len(_DTYPES)] if data else "U8"
            base, _ = _pair(dtype)
            room = np.full(base.size + 128, 0xA5, np.uint8)
            try:
                codec.decode_block(number, data[1:], room[64:-64], base, dtype=dtype)
            finally:
                assert (room[:64] == 0xA5).all() and (room[-64:] == 0xA5).all(), "wrote outside of the block"

        seeds = []
        for at, dtype in enumerate(_DTYPES):
            base, new = _pair(dtype)
            smooth = np.zeros_like(new)
            for target in (new, smooth, base):
                encoded = codec.CODECS[number].encode(target, base, dtype=dtype)
                if encoded is not None:
                    seeds.append(bytes([at]) + bytes(encoded))
                if number == codec.LOWRANK and dtype in lowrank.DTYPES:
                    seeds.append(bytes([at]) + _factored(target, base, dtype))
        return Decoder(f"codec-{codec.CODECS[number].name}", decode, seeds)

    return [decoder(number) for number in sorted(codec.CODECS)]


def _bodies(folder: Path) -> list[Decoder]:
    before, _ = two_versions()
    manifest, store = manifest_of(before), Store(folder / "store")
    with store.batch() as batch:
        for data in before.values():
            batch.add((data.data,))
    body = body_between()

    def early(data: bytes) -> None:
        decoder = EarlyDecoder(manifest, store)
        for start in range(0, len(data), 500):
            decoder.feed(memoryview(data)[start : start + 500])

    return [
        Decoder("preface", preface.unpacked, [body, preface.packed(1, 9, (3, 9), 4, 70)]),
        Decoder("body", early, [body], memory_bytes=24 * MIB),
    ]
