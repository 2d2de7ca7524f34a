"""A live TensorRT engine: its execution contexts, and one refitter for its whole life.

One refitter, because the first refit through a refitter costs seconds and the next ones milliseconds; the cost belongs
to the refitter, not to the engine. Every weight that is set is put in at every refit, and the refitter keeps the
`Weights` object of every call, so names are set once, on buffers that stay, and the buffers' contents change.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.errors import NotRefittable, RefitFailed, UsageError


def tensorrt() -> Any:
    """The TensorRT module, standard or RTX: the one that torch_tensorrt uses, where that is installed.

    Raises: UsageError when there is none.
    """
    errors = []
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            return __import__(name)
        except Exception as error:  # without a driver it raises what it likes
            errors.append(f"{name}: {type(error).__name__}: {error}")
    raise UsageError(
        f"TensorRT can't be imported ({'; '.join(errors)})",
        next="pip install 'refleet[tensorrt]' or 'refleet[tensorrt-rtx]'; `refleet-worker doctor` says what is missing",
    )


def version() -> str:
    """For example `tensorrt_rtx 1.4.0.76`."""
    trt = tensorrt()
    return f"{trt.__name__} {trt.__version__}"


class TensorRTLive:
    """Deserializes `plan` on the current CUDA device.

    Args: `plan` a serialized engine built with the REFIT flag; `inputs`, `outputs` names of its bindings in the order
    of the graph; `contexts` how many requests may run at once, each on a stream of its caller.
    Raises: NotRefittable when it can't be deserialized here, has no refittable weight, or there is no memory for it.
    """

    def __init__(self, plan: bytes, inputs: Sequence[str], outputs: Sequence[str], *, name: str, contexts: int = 1):
        trt = self._trt = tensorrt()
        self.name, self.inputs, self.outputs = name, tuple(inputs), tuple(outputs)
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise NotRefittable(
                f"{version()} can't load the engine of {name}: it was built by another version or for another GPU",
                next="start the worker with the factory and without the bundle, or build the bundle on this machine",
            )
        found = {self._engine.get_tensor_name(n) for n in range(self._engine.num_io_tensors)}
        if found != {*self.inputs, *self.outputs}:
            raise NotRefittable(f"the engine of {name} has the bindings {sorted(found)}, not those of the graph")
        self._refitter = trt.Refitter(self._engine, self._logger)
        self.weights = frozenset(self._refitter.get_all_weights())
        if not self.weights:
            raise NotRefittable(
                f"the engine of {name} has no refittable weight", next="build it with immutable_weights=False"
            )
        self._contexts = [_Context(self._engine.create_execution_context()) for _ in range(contexts)]
        if any(context.trt is None for context in self._contexts):
            raise NotRefittable(f"no memory for {contexts} execution contexts of {name}")
        self._free = threading.Condition()
        self._pool = list(self._contexts)
        self._dtypes = {name: _torch_dtype(self._engine.get_tensor_dtype(name)) for name in found}
        self._shape_inputs = {name for name in self.inputs if self._engine.is_shape_inference_io(name)}
        self._held: dict[str, Tensor] = {}  # the refitter takes no copies

    def prototype(self, name: str) -> tuple[torch.dtype, int]:
        wanted = self._refitter.get_weights_prototype(name)
        return _torch_dtype(wanted.dtype), int(wanted.size)

    def set(self, name: str, value: Tensor) -> bool:
        trt = self._trt
        weights = trt.Weights(_trt_dtype(trt, value.dtype), value.data_ptr(), value.numel())
        if not self._refitter.set_named_weights(name, weights, trt.TensorLocation.DEVICE):
            return False
        self._held[name] = value
        return True

    def unset(self, name: str) -> bool:
        if not self._refitter.unset_named_weights(name):
            return False
        del self._held[name]
        return True

    def missing(self) -> list[str]:
        return list(self._refitter.get_missing_weights())

    def refit(self) -> bool:
        """On the current stream, which must be that of the requests; with several contexts, after all of them."""
        if len(self._contexts) > 1:
            torch.cuda.synchronize()
            return bool(self._refitter.refit_cuda_engine())
        return bool(self._refitter.refit_cuda_engine_async(torch.cuda.current_stream().cuda_stream))

    def run(self, inputs: Sequence[Tensor | int]) -> list[Tensor]:
        with self._free:
            self._free.wait_for(lambda: self._pool)
            context = self._pool.pop()
        try:
            return context.run(self, inputs)
        finally:
            with self._free:
                self._pool.append(context)
                self._free.notify()

    def serialize(self, *, with_weights: bool = True) -> bytes:
        return self._serialized(self._engine, with_weights=with_weights)

    def content(self) -> bytes:
        """The bytes that this engine serializes to, however it came to its weights and how often it was loaded.

        Each loading turns the order of TensorRT's own tables around, so that an engine has two forms; this is the
        smaller one. Takes memory for a second engine. Raises: RefitFailed.
        """
        one = self.serialize()
        again = self._runtime.deserialize_cuda_engine(one)
        if again is None:
            raise RefitFailed(
                f"{version()} can't load what it serialized of {self.name}: no memory for another engine?"
            )
        return min(one, self._serialized(again))

    def _serialized(self, engine: Any, *, with_weights: bool = True) -> bytes:
        trt = self._trt
        config = engine.create_serialization_config()
        if not with_weights:  # it stays refittable by itself
            config.set_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
            return bytes(engine.serialize_with_config(config))
        config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
        if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):  # without it the copy could not be refitted
            config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
        return bytes(engine.serialize_with_config(config))

    def close(self) -> None:
        self._pool, self._contexts = [], []
        self._held = {}
        del self._refitter, self._engine


class _Context:
    """One execution context; used by one request at a time."""

    def __init__(self, trt: Any):
        self.trt = trt
        self._keep: list[object] = []  # inputs until the next request: the kernels may still read them
        self._done: torch.cuda.Event | None = None  # of the last request, which may have been on another stream

    def run(self, live: TensorRTLive, inputs: Sequence[Tensor | int]) -> list[Tensor]:
        if len(inputs) != len(live.inputs):
            raise RuntimeError(f"{live.name} takes {len(live.inputs)} inputs, not {len(inputs)}")
        stream = torch.cuda.current_stream()
        if self._done is not None:
            stream.wait_event(self._done)
        keep: list[object] = []
        for name, given in zip(live.inputs, inputs, strict=True):
            self._bind(live, name, given, keep)
        outputs = []
        for name in live.outputs:
            shape = tuple(self.trt.get_tensor_shape(name))
            if -1 in shape:
                raise RuntimeError(f"the shape of output {name} of {live.name} depends on data: {shape}")
            output = torch.empty(shape, dtype=live._dtypes[name], device="cuda")
            self.trt.set_tensor_address(name, (output if output.numel() else _placeholder(output)).data_ptr())
            outputs.append(output)
        if not self.trt.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"TensorRT could not run {live.name}")
        self._done = stream.record_event(self._done)
        self._keep = keep
        return outputs

    def _bind(self, live: TensorRTLive, name: str, given: Tensor | int, keep: list[object]) -> None:
        if name in live._shape_inputs:  # read by the host while shapes are inferred
            host = torch.as_tensor(given).to("cpu", torch.int64).contiguous().view(-1).numpy().copy()
            keep.append(host)
            self.trt.set_tensor_address(name, host.ctypes.data)
            return
        dtype = live._dtypes[name]
        tensor = given if isinstance(given, Tensor) else torch.tensor(given, dtype=dtype)
        if tensor.dtype != dtype:
            raise RuntimeError(f"input {name} of {live.name} has dtype {tensor.dtype}, not {dtype}")
        tensor = tensor.to("cuda").contiguous()
        if not self.trt.set_input_shape(name, tuple(tensor.shape)):
            raise RuntimeError(f"{live.name} does not take input {name} of shape {tuple(tensor.shape)}")
        bound = tensor if tensor.numel() else _placeholder(tensor)
        keep.append(bound)
        self.trt.set_tensor_address(name, bound.data_ptr())


def _placeholder(like: Tensor) -> Tensor:
    return torch.empty(1, dtype=like.dtype, device="cuda")  # TensorRT takes no null pointer for an empty tensor


_NAMES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32, "INT64": torch.int64,
    "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool, "FP8": torch.float8_e4m3fn,
}  # fmt: skip


def _torch_dtype(dtype: Any) -> torch.dtype:
    if dtype.name not in _NAMES:
        raise NotRefittable(f"the engine uses the TensorRT type {dtype.name}, which refleet does not know")
    return _NAMES[dtype.name]


def _trt_dtype(trt: Any, dtype: torch.dtype) -> Any:
    name = next((name for name, known in _NAMES.items() if known == dtype), None)
    if name is None:
        raise NotRefittable(f"TensorRT has no weights of type {dtype}")
    return getattr(trt.DataType, name)
