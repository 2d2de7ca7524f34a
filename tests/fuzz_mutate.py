"""Inputs that are nearly valid: bytes, numbers, words and msgpack trees of valid ones, changed in a few places."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

#: where formats change their minds: msgpack's heads, the ends of integers
_BYTES = bytes(
    [0, 1, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xC0, 0xC1, 0xC4, 0xC6, 0xCF, 0xD9, 0xDB, 0xDC, 0xDD, 0xDF, 0xFF]
)
_SIZES = (0, 1, 2, 127, 128, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 48, (1 << 64) - 1)
_VALUES: tuple[Any, ...] = (None, True, False, "", "x" * 600, b"", b"\0" * 32, [], {}, -1, 1.5, float("nan"), *_SIZES)
_MOST_BYTES = 1 << 16

Edit = Callable[[bytearray], None]


class Mutator:
    """Deterministic: the same `random` gives the same inputs."""

    def __init__(self, chance: random.Random):
        self._chance = chance
        self._edits: list[Edit] = [
            self._flip, self._flip, self._set, self._set, self._number, self._cut, self._repeat, self._insert,
            self._drop,
        ]  # fmt: skip

    def mutated(self, data: bytes, pool: Sequence[bytes], words: Sequence[bytes]) -> bytes:
        """One input out of `data`; `pool` are others of the same format."""
        chance = self._chance
        kind = chance.random()
        if kind < 0.02:
            return chance.randbytes(chance.randrange(200))
        if kind < 0.25 and (tree := self._tree(data)) is not None:
            return tree
        if kind < 0.35:
            data = self._spliced(data, chance.choice(pool))
        made = bytearray(data)
        for _ in range(1 + min(int(chance.expovariate(0.6)), 12)):
            if words and chance.random() < 0.4:
                at = chance.randrange(len(made) + 1)
                made[at : at + chance.choice((0, 0, 1, 4))] = chance.choice(words)
            else:
                chance.choice(self._edits)(made)
        return bytes(made[:_MOST_BYTES])

    def _at(self, made: bytearray) -> int:
        """Often near the start or the end, where heads and footers are."""
        near = min(len(made), 64)
        where = self._chance.random()
        if where < 0.3:
            return self._chance.randrange(near)
        if where < 0.5:
            return len(made) - 1 - self._chance.randrange(near)
        return self._chance.randrange(len(made))

    def _flip(self, made: bytearray) -> None:
        if made:
            made[self._at(made)] ^= 1 << self._chance.randrange(8)

    def _set(self, made: bytearray) -> None:
        if made:
            made[self._at(made)] = self._chance.choice(_BYTES)

    def _number(self, made: bytearray) -> None:
        if made:
            at, width = self._at(made), self._chance.choice((2, 4, 8))
            value = self._chance.choice(_SIZES) + self._chance.randrange(-1, 2)
            order = self._chance.choice(("little", "big"))
            made[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]

    def _cut(self, made: bytearray) -> None:
        if made:
            del made[self._at(made) :]

    def _drop(self, made: bytearray) -> None:
        if made:
            at = self._at(made)
            del made[at : at + 1 + self._chance.randrange(16)]

    def _repeat(self, made: bytearray) -> None:
        if made:
            at = self._at(made)
            part = made[at : at + 1 + self._chance.randrange(64)]
            made[at:at] = part * self._chance.choice((1, 1, 2, 40))

    def _insert(self, made: bytearray) -> None:
        at = self._chance.randrange(len(made) + 1)
        made[at:at] = self._chance.randbytes(1 + self._chance.randrange(8))

    def _spliced(self, data: bytes, other: bytes) -> bytes:
        return data[: self._chance.randrange(len(data) + 1)] + other[self._chance.randrange(len(other) + 1) :]

    def _tree(self, data: bytes) -> bytes | None:
        """The msgpack array in `data`, perhaps behind a checksum, with other values in places; None: there is none."""
        for start in (0, 32):
            try:
                tree = msgpack.unpackb(data[start:], strict_map_key=False)
            except (ValueError, TypeError, msgpack.UnpackException):
                continue
            if not isinstance(tree, list) or not tree:
                continue
            for _ in range(self._chance.choice((1, 1, 2))):
                inner: Any = tree
                while True:
                    places = range(len(inner)) if isinstance(inner, list) else list(inner)
                    place = self._chance.choice(places)
                    below = inner[place]
                    if not (isinstance(below, (list, dict)) and below) or self._chance.random() < 0.15:
                        break
                    inner = below
                inner[place] = self._value(below)
            try:
                return data[:start] + bytes(msgpack.packb(tree))
            except (ValueError, OverflowError):
                return None
        return None

    def _value(self, before: Any) -> Any:
        kind = self._chance.random()
        if kind < 0.3 and isinstance(before, int):
            return max(min(before + self._chance.choice((-1, 1, 2, 1000)), (1 << 64) - 1), -(1 << 63))
        if kind < 0.3 and isinstance(before, list):
            return before * 2
        if kind < 0.4:
            return [before]
        if kind < 0.45:
            deep: Any = 0
            for _ in range(self._chance.choice((30, 300, 510))):
                deep = [deep]
            return deep
        return self._chance.choice(_VALUES)
