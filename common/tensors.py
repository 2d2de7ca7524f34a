"""torch tensors <-> dtype text and bytes in C order, little-endian.

torch is imported by the first call that needs it, never by importing this module: a publisher of files runs without it.
Bytes are never interpreted: NaN payloads, -0.0 and bools other than 0 and 1 pass unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from .errors import DigestMismatch, UnreadableCheckpoint
from .limits import LIMITS
from .types import DTYPE_BYTES, TensorSpec

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer

if sys.byteorder != "little":  # pragma: no cover - torch's own bytes would have to be swapped
    raise ImportError("refleet runs on little-endian hosts only")

#: safetensors dtype text -> name of the dtype in torch
_TORCH_NAMES: dict[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32",
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip


def dtype_text(dtype: torch.dtype) -> str:
    """The safetensors text of a torch dtype. Raises UnreadableCheckpoint for dtypes that have none here."""
    text = _texts().get(dtype)
    if text is None:
        raise UnreadableCheckpoint(f"dtype {dtype} is not supported", next=_CONVERT)
    return text


def torch_dtype(text: str) -> torch.dtype:
    """The torch dtype of a safetensors text. Raises UnreadableCheckpoint for an unknown text."""
    found = next((dtype for dtype, known in _texts().items() if known == text), None)
    if found is None:
        raise UnreadableCheckpoint(f"dtype {text[:20]!r} is not supported", next=_CONVERT)
    return found


def spec_of(name: str, tensor: object) -> TensorSpec:
    """Name, dtype and shape of a tensor that can be published.

    Raises: UnreadableCheckpoint naming it, for a bad name and for anything without plain bytes: not a tensor,
    sparse, quantized, nested, on the meta device, or of a class that redefines operations (DTensor, FakeTensor).
    """
    import torch

    if not isinstance(name, str):
        raise UnreadableCheckpoint(f"the state_dict has a key that is not text: {str(name)[:60]}")
    problem = _problem(tensor)
    if problem is not None:
        raise UnreadableCheckpoint(f"tensor {name[:200]!r} {problem[0]}", next=problem[1], tensor=name)
    assert isinstance(tensor, torch.Tensor)
    try:
        return TensorSpec(name, dtype_text(tensor.dtype), tuple(tensor.shape))
    except ValueError as error:  # name, number of dimensions, size
        raise UnreadableCheckpoint(str(error), tensor=name[:200], next="rename or reshape the tensor") from None


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers of the same size and strides, sharing its memory unless it is lazily negated.

    Integers are what can be copied, indexed and compared without touching a bit: torch's copy of a strided bool
    writes 0 and 1 whatever was there, and not every operation knows float8.
    """
    import torch

    plain = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg()
    return plain.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.element_size()])


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in C order, read-only.

    No copy for a contiguous CPU tensor (the view keeps its memory alive, and sees later changes), one for any other
    strides, one to the host for other devices. Raises UnreadableCheckpoint for a tensor without plain bytes.
    """
    problem = _problem(tensor)
    if problem is not None:
        raise UnreadableCheckpoint(f"the tensor {problem[0]}", next=problem[1])
    if tensor.numel() == 0:
        return memoryview(b"")
    try:
        return _flat_bytes(bits_of(tensor).to("cpu")).numpy().data.toreadonly()
    except RuntimeError as error:
        raise _unreadable(error) from error


def tensor_blocks(tensor: torch.Tensor, *, block_bytes: int = LIMITS.block_bytes) -> Iterator[memoryview]:
    """The bytes of `tensor_bytes` in blocks of `block_bytes`, the last one shorter, none for a zero-size tensor.

    A block is valid until the next is taken: a contiguous tensor on a GPU passes through one host buffer of one block.
    """
    import torch

    if tensor.device.type == "cpu" or tensor.numel() == 0 or not tensor.is_contiguous():
        data = tensor_bytes(tensor)
        for start in range(0, len(data), block_bytes):
            yield data[start : start + block_bytes]
        return
    try:
        flat = _flat_bytes(bits_of(tensor))
        # Pinned, so that the GPU writes it by DMA: a pageable buffer costs another copy in the driver.
        pinned = tensor.device.type == "cuda"
        buffer = torch.empty(min(block_bytes, flat.numel()), dtype=torch.uint8, pin_memory=pinned)
        view = buffer.numpy().data.toreadonly()
        for start in range(0, flat.numel(), block_bytes):
            part = flat[start : start + block_bytes]
            buffer[: part.numel()].copy_(part)
            yield view[: part.numel()]
    except RuntimeError as error:
        raise _unreadable(error) from error


def tensor_from(data: Buffer, spec: TensorSpec) -> torch.Tensor:
    """A CPU tensor over `data` (bytes in C order). It shares the memory and keeps it alive.

    A read-only buffer is copied: torch has no read-only tensors, and a write through one would crash the process.
    Raises: DigestMismatch if `data` does not have exactly `spec.size_bytes` bytes.
    """
    import torch

    view = memoryview(data).cast("B")
    if len(view) != spec.size_bytes:
        raise DigestMismatch(f"{len(view)} bytes for {spec}, which has {spec.size_bytes}", tensor=spec.name)
    dtype = torch_dtype(spec.dtype)
    if spec.size_bytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    if view.readonly:
        view = memoryview(bytearray(view))
    return torch.frombuffer(view, dtype=torch.uint8).view(dtype).view(spec.shape)


_CONVERT = f"convert it to one of {' '.join(DTYPE_BYTES)}"


@cache
def _texts() -> dict[torch.dtype, str]:
    import torch

    # A torch without one of the rarer dtypes can hold no tensor of it either.
    return {getattr(torch, name): text for text, name in _TORCH_NAMES.items() if hasattr(torch, name)}


def _flat_bytes(bits: torch.Tensor) -> torch.Tensor:
    """The tensor as one row of uint8 on its own device; copies only if it is not contiguous."""
    import torch

    plain = bits.contiguous()
    # as_strided, not view(-1): one element counts as contiguous with any stride, and keeps it in a view.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def _problem(tensor: object) -> tuple[str, str] | None:
    """Why the bytes of `tensor` can't be had, and what to do about it; None if they can."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        return f"is not a tensor but {type(tensor).__name__}", "leave it out of the state_dict"
    kind = type(tensor)
    if torch.nn.parameter.is_lazy(tensor):
        return "is not initialized", "run the model once, then publish"
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return _subclass_problem(kind.__name__)
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"is {layout}, not dense", "publish tensor.to_dense(), or its parts as tensors of their own"
    if tensor.is_meta:
        return "is on the meta device: it has no bytes", "materialize it before publishing"
    if tensor.is_quantized:
        return f"is quantized ({tensor.dtype})", "publish tensor.int_repr(), and scales and zero points as tensors"
    if tensor.dtype not in _texts():
        return f"has dtype {tensor.dtype}, which is not supported", _CONVERT
    return None


def _subclass_problem(kind: str) -> tuple[str, str]:
    if kind == "DTensor":
        return "is a DTensor: this process holds only a part of it", "gather it with tensor.full_tensor()"
    return f"is a {kind}, which has no plain bytes", "convert it to a plain torch.Tensor"


def _unreadable(error: RuntimeError) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"the tensor's bytes can't be read: {str(error).strip()[:300]}")
