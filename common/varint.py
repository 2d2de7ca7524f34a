"""Small numbers in few bytes (LEB128), and a reader that never goes beyond the end of what it was given."""

from __future__ import annotations

from .errors import MalformedRecord


def varint(value: int) -> bytes:
    """7 bits a byte, lowest first; the top bit says that more follow."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


class Reader:
    """Takes an encoded block of the codec `name` apart from front to back. Raises: MalformedRecord, in every method."""

    def __init__(self, view: memoryview, name: str):
        self._rest, self._name = view, name

    def take(self, size: int) -> memoryview:
        """The next `size` bytes, without a copy."""
        if size > len(self._rest):
            raise MalformedRecord(f"a {self._name} block ends {size - len(self._rest)} bytes early")
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        """A number below 2**35."""
        value = 0
        for shift in range(0, 35, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise MalformedRecord(f"a {self._name} block with an endless number")

    def rest(self) -> memoryview:
        """All that is left."""
        return self.take(len(self._rest))

    def finish(self) -> None:
        """Refuses anything that is left."""
        if len(self._rest):
            raise MalformedRecord(f"a {self._name} block with {len(self._rest)} bytes too many")
