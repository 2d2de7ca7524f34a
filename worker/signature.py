"""How a model is called: nested arguments to the graph's flat inputs, its flat outputs to the nested answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from ..common.errors import MalformedRecord, NotRefittable


@dataclass(frozen=True)
class Signature:
    """Tree specs of the arguments (args, kwargs) and of the answer, as torch.export recorded them."""

    inputs: pytree.TreeSpec
    answer: pytree.TreeSpec

    def flatten(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> list[Any]:
        """Leaves in the order of the graph's inputs; keywords in any order. Raises: TypeError for another structure."""
        order = self.inputs.child(1).context if hasattr(self.inputs, "child") else self.inputs.children_specs[1].context
        ordered = {name: kwargs[name] for name in order if name in kwargs} | dict(kwargs)
        leaves, found = pytree.tree_flatten((args, ordered))
        if found != self.inputs:
            raise TypeError(
                f"called with {pytree.treespec_pprint(found)}, compiled for {pytree.treespec_pprint(self.inputs)}"
            )
        return leaves

    def answered(self, flat: Any) -> Any:
        """The answer with its structure."""
        return pytree.tree_unflatten(list(flat) if isinstance(flat, tuple | list) else [flat], self.answer)

    def to_data(self) -> list[str]:
        """As text, for a bundle. Raises: NotRefittable for a structure that can't be read again."""
        try:
            data = [pytree.treespec_dumps(self.inputs), pytree.treespec_dumps(self.answer)]
            self.from_data(data)
        except Exception as error:  # NotImplementedError, TypeError: a class that is not registered as torch asks for
            raise NotRefittable(
                f"the structure of the module's arguments or answer can't be stored: {error}",
                next="take and return tensors in tuples, lists and dicts",
            ) from error
        return data

    @classmethod
    def from_data(cls, data: object) -> Signature:
        """Raises: MalformedRecord."""
        match data:
            case [str() as inputs, str() as answer]:
                try:
                    for text in (inputs, answer):
                        _check_harmless(json.loads(text))
                    return cls(pytree.treespec_loads(inputs), pytree.treespec_loads(answer))
                except Exception as error:  # it raises what json and its own checks raise, RecursionError included
                    raise MalformedRecord(f"the bundle's signature can't be read: {error}") from error
        raise MalformedRecord("the bundle's signature is not a pair of texts")


def _check_harmless(data: object) -> None:
    """Raise ValueError for what makes torch import a module that the text names: an enum, a defaultdict."""
    match data:
        case dict():
            if data.get("type") == "collections.defaultdict" or "__enum__" in data:
                raise ValueError("it names a module to be imported")
            for value in data.values():
                _check_harmless(value)
        case list():
            for value in data:
                _check_harmless(value)
        case str():  # the context of a node is JSON in JSON
            inner: object = None
            with suppress(ValueError):
                inner = json.loads(data)
            _check_harmless(None if isinstance(inner, str) else inner)
