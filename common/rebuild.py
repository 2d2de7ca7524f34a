"""Rebuild tensors that are kept as deltas: through as many files as it takes, oldest first, and only what is needed.

plan     from the newest file to the oldest: which tensors, so which blocks, so which bases
decode   from the oldest to the newest, in place where nobody else needs the base
verify   the tensors that were asked for; what lies between needs no digest of its own: they come of it
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from . import codec
from .deltas import DeltaFile
from .digest import matching
from .errors import LimitExceeded, MalformedRecord
from .layout import Bytes, Placed, decode
from .memory import Memory
from .threads import cores, in_order

#: a whole tensor by its digest: from memory, or where the store holds it whole
Given = Callable[[bytes], Bytes | None]


@dataclass(frozen=True, slots=True)
class _Part:
    """What is needed of one file: `numbers` of tensors, all their `places`; `bases` by number of what is in these."""

    file: DeltaFile
    numbers: set[int]
    places: list[Placed]
    bases: dict[int, bytes]


class Rebuild:
    """Of the tensors `wanted`. `where`: digest -> the file that it is rebuilt from."""

    def __init__(self, wanted: set[bytes], *, where: Mapping[bytes, DeltaFile], given: Given, memory: Memory):
        self._wanted, self._where, self._given, self._memory = wanted, where, given, memory
        self._parts = self._planned()
        self._uses = Counter(base for part in self._parts for base in part.bases.values())
        self._between: dict[bytes, Bytes] = {}

    def run(self) -> dict[bytes, Bytes]:
        """The verified tensors; what could not be rebuilt is not among them. Raises: StoreError."""
        sizes = {t.digest: t.size_bytes for part in self._parts for t in part.file.record.tensors}
        wanted = [digest for digest in sizes if digest in self._wanted]
        outs = dict(zip(wanted, self._memory.take_all(sizes[digest] for digest in wanted), strict=True))
        decoded: set[bytes] = set()
        for part in self._parts:
            found = self._decoded(part, outs)
            self._between.update(found)
            decoded |= found.keys()
            self._uses.subtract(part.bases.values())
            for base in part.bases.values():
                if not self._uses[base] and base not in outs:
                    self._between.pop(base, None)  # a buffer that nobody looks at is used again
        made = [digest for digest in wanted if digest in decoded]
        right = matching((outs[digest].data for digest in made), made)
        return {digest: outs[digest] for digest, good in zip(made, right, strict=True) if good}

    def _planned(self) -> list[_Part]:
        parts: list[_Part] = []
        needed: dict[str, set[bytes]] = defaultdict(set)
        for digest in self._wanted:
            needed[self._where[digest].name].add(digest)
        while needed:
            digests = needed.pop(name := max(needed))
            file = self._where[next(iter(digests))]
            part = self._part(file, {file.numbers[digest] for digest in digests})
            parts.append(part)
            for base in part.bases.values():
                older = self._where.get(base)
                if older is not None and older.name < name and self._given(base) is None:
                    needed[older.name].add(base)
        parts.reverse()
        return parts

    @staticmethod
    def _part(file: DeltaFile, numbers: set[int]) -> _Part:
        tensors = file.record.tensors
        places = [place for place in file.places() if any(span.number in numbers for span in place.spans)]
        bases = {}
        for place in places:
            if codec.needs_base(place.block.codec):
                for span in place.spans:
                    if (base := tensors[span.number].base) is not None:
                        bases[span.number] = base
        return _Part(file, numbers, places, bases)

    def _decoded(self, part: _Part, outs: dict[bytes, Bytes]) -> dict[bytes, Bytes]:
        """By digest, the part's tensors that could be decoded."""
        tensors = part.file.record.tensors
        bases = {number: base for number, digest in part.bases.items() if (base := self._base(digest)) is not None}
        into: dict[int, Bytes] = {}
        for number in {span.number for place in part.places for span in place.spans}:
            tensor = tensors[number]
            if number not in part.numbers:  # beside them in a block, maybe a copy of what another file gives
                into[number] = np.empty(tensor.size_bytes, np.uint8)
            elif tensor.digest in outs:
                into[number] = outs[tensor.digest]
            else:
                into[number] = self._out(tensor.base, tensor.size_bytes)
        try:
            with part.file.reading() as read:

                def task(place: Placed) -> set[int]:
                    """The numbers of the tensors that can't be decoded."""
                    numbers = {span.number for span in place.spans}
                    if any(n in part.bases and (n not in bases or bases[n].size != into[n].size) for n in numbers):
                        return numbers
                    dtype = tensors[place.spans[0].number].dtype
                    based = bases.__getitem__ if numbers <= bases.keys() else None
                    try:
                        encoded = read(place.offset, place.block.encoded_bytes)
                        decode(place, encoded, dtype=dtype, base=based, out=into.__getitem__)
                    except (MalformedRecord, LimitExceeded):
                        return numbers
                    return set()

                bad = set[int]().union(*in_order(task, part.places, threads=cores()))
        except FileNotFoundError:  # another process removed it
            return {}
        return {tensors[number].digest: into[number] for number in part.numbers - bad}

    def _base(self, digest: bytes) -> Bytes | None:
        found = self._between.get(digest)
        return self._given(digest) if found is None else found

    def _out(self, base: bytes | None, size: int) -> Bytes:
        """The base's own buffer, where this is the last that needs it."""
        if base is not None and base in self._between and self._uses[base] == 1 and base not in self._wanted:
            found = self._between[base]
            if found.size == size:
                return found
        return self._memory.take(size)
