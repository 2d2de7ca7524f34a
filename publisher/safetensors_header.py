"""The header of one safetensors file, checked before anything is allocated for its tensors.

A file is eight bytes with the header's size (little-endian), the header in JSON, then the tensors' bytes back to back.
The checks are those of the safetensors library and a few more: no key twice, no unknown facts about a tensor, names
and dtypes that refleet carries. What passes here, the library can read too.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import LimitExceeded, UnreadableCheckpoint
from ..common.limits import LIMITS
from ..common.types import DTYPE_BYTES, TensorSpec, tensor_name_problem
from .source_file import WAIT

PREFIX_BYTES = 9  # the header's size and its first character
PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"})
CONVERT = (
    "convert it: python -c \"import torch; from safetensors.torch import save_file; "
    "save_file(torch.load('{path}', weights_only=True, map_location='cpu'), 'model.safetensors')\""
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor and where its bytes begin in its file."""

    spec: TensorSpec
    offset: int


def header_bytes(prefix: bytes, *, file_bytes: int, path: Path) -> int:
    """The size of the JSON header, from the file's first `PREFIX_BYTES`.

    Raises: UnreadableCheckpoint if this is no safetensors file or is cut off, LimitExceeded for an oversized header.
    """
    if _is_pickle(prefix, path):
        raise UnreadableCheckpoint(
            "the checkpoint is a pickle file, which can run code when it is opened; refleet reads safetensors only",
            about=str(path),
            next=CONVERT.format(path=path),
        )
    if len(prefix) < PREFIX_BYTES:
        raise _bad(f"the file has only {file_bytes} bytes, too few for a safetensors header", path)
    size = int.from_bytes(prefix[:8], "little")
    if prefix[8:9] != b"{":
        raise _bad("the file is not a safetensors file: no header begins at byte 8", path, next="check the path")
    if size > LIMITS.header_bytes:
        raise LimitExceeded(f"a header of {size} bytes exceeds the limit of {LIMITS.header_bytes}", about=str(path))
    if 8 + size > file_bytes:
        raise _bad(f"the file has {file_bytes} bytes, but its header alone takes {8 + size}", path)
    return size


def parse_header(raw: bytes, *, file_bytes: int, path: Path) -> dict[str, Place]:
    """The tensors of a file of `file_bytes` whose JSON header is `raw`, by name.

    Raises: UnreadableCheckpoint with file, tensor and both sizes; LimitExceeded for too many tensors or dimensions.
    """
    header = load_object(raw, "header", path)
    _check_metadata(header.pop("__metadata__", {}), path)
    if len(header) > LIMITS.tensors:
        raise LimitExceeded(f"{len(header)} tensors exceed the limit of {LIMITS.tensors}", about=str(path))
    data_start = 8 + len(raw)
    ranges = [_tensor(name, facts, path) for name, facts in header.items()]
    ranges.sort(key=lambda item: item[1:])
    _check_cover(ranges, data_bytes=file_bytes - data_start, path=path)
    return {spec.name: Place(spec, data_start + begin) for spec, begin, _ in ranges}


def load_object(raw: bytes, what: str, path: Path) -> dict[str, object]:
    """The JSON object in `raw`. Raises UnreadableCheckpoint, also for a key twice: the last one would silently win."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise _bad(f"the {what} has the key {key[:200]!r} more than once", path)
        return found

    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not JSON")

    try:
        found = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise _bad(f"the {what} is nested too deeply", path) from None
    except ValueError as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise _bad(f"the {what} is not JSON: {str(error)[:120]}", path) from None
    if not isinstance(found, dict):
        raise _bad(f"the {what} is not a JSON object", path)
    return found


def _is_pickle(prefix: bytes, path: Path) -> bool:
    if path.suffix.lower() in PICKLE_SUFFIXES or prefix.startswith(b"PK\x03\x04"):
        return True
    # \x80 and the protocol begin a plain pickle; as the size of a header (640, 896 ...) a `{` follows at byte 8.
    return len(prefix) >= 2 and prefix[0] == 0x80 and 2 <= prefix[1] <= 5 and prefix[8:9] != b"{"


def _check_metadata(metadata: object, path: Path) -> None:
    if not isinstance(metadata, dict):
        raise _bad("__metadata__ in the header is not an object of strings", path)
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise _bad(f"__metadata__ in the header holds {type(value).__name__} at {key[:60]!r}, not text", path)
        try:
            (key + value).encode()
        except UnicodeEncodeError:
            raise _bad("__metadata__ in the header is not valid Unicode", path) from None


def _tensor(name: str, facts: object, path: Path) -> tuple[TensorSpec, int, int]:
    """Spec, first byte and byte after the last one in the data section."""
    problem = tensor_name_problem(name)
    if problem is not None:
        raise _bad(f"the header has {problem}", path, next="rename the tensor")
    if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(f"tensor {name!r} must have exactly dtype, shape and data_offsets in the header", path, tensor=name)
    dtype, shape = facts["dtype"], _sizes(facts["shape"])
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        known = f"convert it to one of {' '.join(DTYPE_BYTES)}"
        raise _bad(f"tensor {name!r} has dtype {str(dtype)[:20]!r}, which is not supported", path, name, next=known)
    if shape is None:
        raise _bad(f"tensor {name!r} has a shape that is not a list of sizes", path, tensor=name)
    if len(shape) > LIMITS.tensor_dims:
        what = f"tensor {name!r} has {len(shape)} dimensions, the limit is {LIMITS.tensor_dims}"
        raise LimitExceeded(what, about=str(path), tensor=name)
    try:
        spec = TensorSpec(name, dtype, shape)
    except ValueError as error:  # the tensor's size
        raise LimitExceeded(str(error)[:300], about=str(path), tensor=name) from None
    offsets = _sizes(facts["data_offsets"])
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(f"tensor {name!r} has data_offsets that are not a begin and an end", path, tensor=name)
    if offsets[1] - offsets[0] != spec.size_bytes:
        what = f"tensor {spec} needs {spec.size_bytes} bytes, the header gives it {offsets[1] - offsets[0]}"
        raise _bad(what, path, tensor=name)
    return spec, offsets[0], offsets[1]


def _sizes(value: object) -> tuple[int, ...] | None:
    """A JSON list of plain integers that could be sizes (`true` and 1.0 are not), or None."""
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n <= LIMITS.tensor_bytes for n in value):
        return None
    return tuple(value)


def _check_cover(ranges: list[tuple[TensorSpec, int, int]], *, data_bytes: int, path: Path) -> None:
    """The tensors must cover the data section without a gap: bytes of no tensor could hide anything."""
    cut = next((item for item in ranges if item[2] > data_bytes), None)
    if cut is not None:
        wanted = max(end for _, _, end in ranges)
        what = f"the file is cut off: it has {data_bytes} bytes of tensors, its header describes {wanted}"
        raise _bad(f"{what}; the first tensor that is cut is {cut[0]}, ending at {cut[2]}", path, tensor=cut[0].name)
    position = 0
    for spec, begin, end in ranges:
        if begin != position:
            how = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise _bad(f"tensor {spec} {how}: it begins at {begin}, not at {position}", path, tensor=spec.name)
        position = end
    if position != data_bytes:
        raise _bad(f"the file has {data_bytes} bytes of tensors, but its header describes {position}", path)


def _bad(what: str, path: Path, tensor: str | None = None, *, next: str = WAIT) -> UnreadableCheckpoint:  # noqa: A002
    return UnreadableCheckpoint(what, about=str(path), next=next, tensor=tensor)
