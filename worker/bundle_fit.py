"""Whether a bundle is of the model that a factory makes: without exporting the module, which is what a bundle saves.

What this can't see, other code in `forward`, the proof on the engine does: it compares the answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..common.digest import digest_of
from ..common.errors import NotRefittable
from ..common.tensors import dtype_text
from .bundle_record import BundleRecord, StoredLeaf
from .recipe import Recipe
from .signature import Signature
from .torch_engine import ADDRESS
from .torch_state import LiveState, live_state, unwrapped

NEXT = "build the bundle again with this factory: refleet-worker build"


def check_fits(record: BundleRecord, recipe: Recipe, signature: Signature, leaves: list[Any]) -> None:
    """`leaves`: the bundle's probe inputs. Raises: NotRefittable with the first difference."""
    difference = _difference(record, recipe, signature, leaves)
    if difference:
        raise NotRefittable(f"the bundle does not fit the factory: {difference}", next=NEXT)


def _difference(record: BundleRecord, recipe: Recipe, signature: Signature, leaves: list[Any]) -> str | None:
    state = live_state(recipe.module)
    ties = ties_of(state)
    stored = {entry.spec.name: entry for entry in record.state}
    for name, spec in state.specs.items():
        if name not in stored:
            return f"the module has the tensor {name!r}, which the bundle lacks"
        if spec != stored[name].spec:
            return f"the module's tensor is {spec}, the bundle's {stored[name].spec}"
        if ties.get(name, "") != stored[name].same_as:
            here, there = (first or "nothing" for first in (ties.get(name), stored[name].same_as))
            return f"the module ties {name!r} to {here}, the bundle to {there}"
    for name in stored:
        if name not in state.specs:
            return f"the bundle has the tensor {name!r}, which the module lacks"
    try:
        found = signature.flatten(recipe.args, recipe.kwargs)
    except TypeError as error:
        return f"other probe inputs, {error}"
    for number, (leaf, known) in enumerate(zip(found, leaves, strict=True)):
        if _described(leaf) != _described(known):
            return f"probe input {number} is {_described(leaf)}, the bundle's is {_described(known)}"
    if options_text(recipe.options) != record.options:
        return f"its compile options are {options_text(recipe.options)}, the bundle's were {record.options}"
    if layers_digest(recipe.module) != record.layers:
        return "the module's layers, or their settings, are others"
    return None


def ties_of(state: LiveState) -> dict[str, str]:
    """Each name that shares memory with others -> the first of these names."""
    return {name: min(group) for name, group in state.ties.items()}


def options_text(options: Mapping[str, object]) -> str:
    """The same text for the same options, in every process."""
    return _text(dict(options))


def layers_digest(module: nn.Module) -> bytes:
    """Of what the module prints: its layers and their settings, for example the eps of a norm."""
    return digest_of(ADDRESS.sub("", repr(unwrapped(module))).encode())


def _text(value: object) -> str:
    match value:
        case dict():
            return "{" + ", ".join(sorted(f"{_text(key)}: {_text(item)}" for key, item in value.items())) + "}"
        case set() | frozenset():
            return "{" + ", ".join(sorted(map(_text, value))) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_text, value)) + "]"
        case type():
            return f"{value.__module__}.{value.__qualname__}"
    return ADDRESS.sub("", repr(value))


def _described(leaf: object) -> str:
    if isinstance(leaf, Tensor):
        return f"{dtype_text(leaf.dtype)}{list(leaf.shape)}"
    stored = StoredLeaf.of(leaf)
    return f"the {stored.kind} {stored.text}" if stored else f"a {type(leaf).__name__}"
