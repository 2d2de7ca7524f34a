"""Packages from PyPI that are compared where they are installed: see requirements.txt."""

from __future__ import annotations

import importlib
import io
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from codec_forms import Bytes, Form

TORCH = {"BF16": torch.bfloat16, "F32": torch.float32}
ZIPNN = {"BF16": "bfloat16", "F32": "float32"}


def tensor(data: Bytes, dtype: str) -> torch.Tensor:
    return torch.from_numpy(data).view(TORCH[dtype])


def raw(made: torch.Tensor) -> Bytes:
    return made.contiguous().view(torch.uint8).numpy().reshape(-1)


def fireworks(module: ModuleType, version: str) -> Form:
    """`delta_compress` of one tensor. What it sends can hold pickles: opened here only because it was made here."""
    warnings.filterwarnings("ignore", message="The given buffer is not writable")

    def encode(new: Bytes, base: Bytes, dtype: str) -> tuple[Any, int]:
        sent, checksum = module.delta_compress(
            src=tensor(base, dtype), dst=tensor(new, dtype), compression_format=version
        )
        return (sent, checksum), sent.nbytes

    def decode(sent: Any, out: Bytes, base: Bytes, dtype: str) -> None:
        made = module.delta_decompress(
            src=tensor(base, dtype), compressed_diff=sent[0], checksum=sent[1], compression_format=version
        )
        out[:] = raw(made)

    return Form(f"fireworks {version}", encode, decode)


def zipnn(module: ModuleType, *, xor: bool) -> Form:
    """Whole values, or the XOR with the base; one thread a block."""

    def encode(new: Bytes, base: Bytes, dtype: str) -> tuple[Any, int]:
        packer = module.ZipNN(bytearray_dtype=ZIPNN[dtype], threads=1)
        sent = packer.compress((np.bitwise_xor(new, base) if xor else new).tobytes())
        return sent, len(sent)

    def decode(sent: Any, out: Bytes, base: Bytes, dtype: str) -> None:
        made = np.frombuffer(module.ZipNN(bytearray_dtype=ZIPNN[dtype], threads=1).decompress(sent), np.uint8)
        if xor:
            np.bitwise_xor(made, base, out=out)
        else:
            out[:] = made

    return Form("XOR + zipnn" if xor else "zipnn of the whole", encode, decode)


def blosc2(module: ModuleType) -> Form:
    """The XOR with the base, bits shuffled, zstd-1."""

    def encode(new: Bytes, base: Bytes, dtype: str) -> tuple[Any, int]:
        step = np.bitwise_xor(new, base)
        sent = module.compress2(
            step, typesize=4 if dtype == "F32" else 2, clevel=1, codec=module.Codec.ZSTD,
            filters=[module.Filter.BITSHUFFLE], filters_meta=[0], nthreads=1,
        )  # fmt: skip
        return sent, len(sent)

    def decode(sent: Any, out: Bytes, base: Bytes, _dtype: str) -> None:
        np.bitwise_xor(np.frombuffer(module.decompress2(sent, nthreads=1), np.uint8), base, out=out)

    return Form("XOR + blosc2 bitshuffle", encode, decode)


def deltatensors(module: ModuleType) -> Form:
    """Its `sparse` strategy with nothing left out; works on files."""

    def encode(new: Bytes, base: Bytes, dtype: str) -> tuple[Any, int]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "step.wdelta"
            new_state, base_state = ({"w": tensor(data, dtype)} for data in (new, base))
            with redirect_stdout(io.StringIO()):
                module.save_delta(path, new_state, base_state, strategy="sparse", sparsity=0.0)
            sent = path.read_bytes()
        return sent, len(sent)

    def decode(sent: Any, out: Bytes, base: Bytes, dtype: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "step.wdelta"
            path.write_bytes(sent)
            with redirect_stdout(io.StringIO()):
                made = torch.as_tensor(module.load_delta(path, {"w": tensor(base, dtype)})["w"])
        out[:] = raw(made.to(TORCH[dtype]))

    return Form("deltatensors sparse", encode, decode)


def packages() -> list[Form]:
    """Those installed, and the reasons for the others."""
    wanted: list[tuple[str, str, str, Callable[[ModuleType], Form]]] = [
        ("fireworks_delta_compression", "fireworks-delta-compression", "fireworks arc_v2",
         lambda m: fireworks(m, "arc_v2")),
        ("fireworks_delta_compression", "fireworks-delta-compression", "fireworks arc_v3",
         lambda m: fireworks(m, "arc_v3")),
        ("zipnn", "zipnn", "XOR + zipnn", lambda m: zipnn(m, xor=True)),
        ("zipnn", "zipnn", "zipnn of the whole", lambda m: zipnn(m, xor=False)),
        ("blosc2", "blosc2", "XOR + blosc2 bitshuffle", blosc2),
        ("deltatensors", "deltatensors", "deltatensors sparse", deltatensors),
    ]  # fmt: skip
    made = []
    for module, package, name, build in wanted:
        try:
            made.append(build(importlib.import_module(module)))
        except ImportError as reason:
            made.append(Form(name, _absent, _absent, missing=f"{package} is not installed ({reason})"))
    return made


def _absent(*_: Any) -> Any:
    raise NotImplementedError
