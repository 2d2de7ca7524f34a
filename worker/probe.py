"""Fixed inputs run through a torch module, and the digest of every bit that comes out."""

from __future__ import annotations

import copy
import dataclasses
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from blake3 import blake3
from torch import Tensor, nn

from ..common.errors import ProbeMismatch, RefleetError, UsageError
from ..common.tensors import tensor_bytes

SEED = 0  # of the probe's own random state: a module in training mode draws the same dropout mask every time


class _Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> object: ...


@dataclass(frozen=True, slots=True)
class ProbeInputs:
    args: tuple[object, ...]
    kwargs: dict[str, object]

    @classmethod
    def of(cls, given: object) -> ProbeInputs:
        """From a tuple of arguments or a pair (arguments, keyword arguments). Raises: UsageError for anything else.

        Copied, so that neither the caller nor a module that writes into its inputs changes what is probed.
        """
        args: object = given
        kwargs: dict[str, object] = {}
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], tuple) and isinstance(given[1], dict):
            args, kwargs = given
        if not isinstance(args, tuple):
            raise UsageError(
                f"probe inputs are a tuple of arguments or (arguments, keywords), not a {type(given).__name__}",
                next="for example probe_inputs=(torch.zeros(1, 64),)",
            )
        try:
            inputs = cls(*copy.deepcopy((args, kwargs)))
            inputs.digest()
        except ProbeMismatch as error:
            raise UsageError(f"probe inputs: {error.what}") from error
        except Exception as error:  # deepcopy of whatever the user's objects are
            raise UsageError(
                f"the probe inputs can't be copied: {error}", next="detach tensors that need no grad"
            ) from error
        return inputs

    def digest(self) -> bytes:
        return digest_value((self.args, self.kwargs))


def run_probe(module: nn.Module, inputs: ProbeInputs, *, cuda: Iterable[torch.device]) -> bytes:
    """Digest of everything the module answers, in its present mode, without gradients.

    The random state and every sub-module's training mode are as before afterwards. Not in inference mode: what a module
    caches in there could never be used outside. Raises: ProbeMismatch for an exception in the module.
    """
    try:
        with torch.no_grad(), _own_random_state(list(cuda)), _kept_modes(module):
            args, kwargs = copy.deepcopy((inputs.args, inputs.kwargs))
            return digest_value(module(*args, **kwargs))
    except RefleetError:
        raise
    except Exception as error:  # the module is the user's code
        what = f"the module raised {type(error).__name__} on its probe inputs: {error}"
        raise ProbeMismatch(what, next="run the module on its probe inputs with these weights") from error


def digest_value(value: object) -> bytes:
    """BLAKE3 over structure, dtypes, shapes and bytes of nested tuples, lists, mappings and dataclasses.

    Raises: ProbeMismatch for an object that has no defined bytes.
    """
    hasher = blake3(b"refleet probe 1\0")
    _feed(hasher, value, "the output")
    return hasher.digest()


def _feed(hasher: _Hasher, value: object, where: str) -> None:
    match value:
        case Tensor():
            _text(hasher, "tensor", str(value.dtype))
            hasher.update(struct.pack(f"<I{value.dim()}Q", value.dim(), *value.shape))
            try:
                # As pairs of reals: probes may answer in complex dtypes that no checkpoint has.
                plain = torch.view_as_real(value.detach().resolve_conj()) if value.is_complex() else value
                hasher.update(tensor_bytes(plain))
            except RefleetError as error:
                raise ProbeMismatch(f"{where}: {error.what}") from error
        case None | bool() | int() | float() | complex() | str() | bytes() | torch.dtype() | torch.device():
            _text(hasher, type(value).__name__, repr(value))
        case Mapping():
            named = ((f"{type(key).__name__} {key!r}", item) for key, item in value.items())
            items = sorted(named, key=lambda pair: pair[0])
            _text(hasher, "mapping", str(len(items)))
            for key, item in items:
                _text(hasher, "key", key)
                _feed(hasher, item, f"{where}[{key}]")
        case tuple() | list():
            _text(hasher, "list" if isinstance(value, list) else "tuple", str(len(value)))
            for n, item in enumerate(value):
                _feed(hasher, item, f"{where}[{n}]")
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            _text(hasher, "dataclass", type(value).__qualname__)
            _feed(hasher, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, where)
        case _:
            raise ProbeMismatch(
                f"{where} is a {type(value).__name__}, which has no defined bytes to compare",
                next="return tensors, numbers, strings, or tuples, lists and dicts of them",
            )


def _text(hasher: _Hasher, kind: str, text: str) -> None:
    data = text.encode(errors="surrogatepass")
    hasher.update(struct.pack(f"<B{len(kind)}sQ", len(kind), kind.encode(), len(data)) + data)


@contextmanager
def _own_random_state(cuda: Sequence[torch.device]) -> Iterator[None]:
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(SEED)  # torch.manual_seed would also seed devices that were not forked
        for device in cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(SEED)
        yield


@contextmanager
def _kept_modes(module: nn.Module) -> Iterator[None]:
    before = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
