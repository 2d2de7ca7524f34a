"""The refit plan: for every weight of every engine, how it follows from the tensors of a version.

A plan is built once per engine (`plan_build`) and answers two questions for each version: what is the value of an
engine weight, and which engine weights depend on a changed tensor. Whatever it can't answer makes the version
`NotRefittable` on this path; it never guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor, fx

from ..common.errors import NotRefittable
from .engine import named_few


class Kind(Enum):
    """How a weight follows from a version's tensors."""

    CONST = "const"  # it doesn't: equal for all versions
    DIRECT = "direct"  # it is one tensor, cast to the weight's dtype
    FOLDED = "folded"  # the compiler computed it from tensors, and so does its formula
    BATCHNORM = "batchnorm"  # scale or shift of a folded batch norm, with the eps of its layer
    UNKNOWN = "unknown"  # no rule was found


@dataclass(frozen=True)
class Formula:
    """A derived tensor: `graph` computes it from `inputs`, in the order of its placeholders.

    An input is the name of a version's tensor, of another formula, or of a constant of the plan.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]

    @cached_property
    def module(self) -> fx.GraphModule:
        return fx.GraphModule(torch.nn.Module(), self.graph)


@dataclass(frozen=True, slots=True)
class Item:
    """The rule of one weight. `origin` names a tensor (DIRECT), a formula (FOLDED, BATCHNORM) or a constant (CONST)."""

    kind: Kind
    origin: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    why: str = ""  # UNKNOWN: what was tried

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


#: a weight's address: part of the model (an engine, or a torch-executed part) and name in it
Address = tuple[str, str]


@dataclass(frozen=True)
class RefitPlan:
    """Rules of all weights of one lowered model.

    `items`: by address. `formulas`, `constants`: by origin. `sources`: names of the version's tensors that the model
    uses; `unused`: names that it provably never reads (no node of the exported graph refers to them). `unproven`: names
    that it reads but whose effect could not be tried out, with the digest of the bytes that they had (integer tensors
    keep their value while the plan is built: another one might not be a valid index). `ties`: names of the same memory
    -> the one of them that is used.
    """

    items: Mapping[Address, Item]
    formulas: Mapping[str, Formula]
    constants: Mapping[str, Tensor]
    sources: frozenset[str]
    unused: frozenset[str]
    unproven: Mapping[str, bytes]
    ties: Mapping[str, str] = field(default_factory=dict)
    engines: tuple[str, ...] = ()  # parts that are engines; the others are executed by torch

    @cached_property
    def unknown(self) -> list[Address]:
        return [address for address, item in self.items.items() if item.kind is Kind.UNKNOWN]

    @cached_property
    def _roots(self) -> dict[str, frozenset[str]]:
        """The version's tensors that each formula depends on, through other formulas too."""
        found: dict[str, frozenset[str]] = {}

        def roots(name: str) -> frozenset[str]:
            if name not in found:
                formula = self.formulas[name]
                parts = (roots(i) if i in self.formulas else frozenset({i} & self.sources) for i in formula.inputs)
                found[name] = frozenset().union(*parts)
            return found[name]

        for name in self.formulas:
            roots(name)
        return found

    def depends_on(self, item: Item) -> frozenset[str]:
        """Names of the version's tensors that the item's value follows from."""
        if item.kind is Kind.DIRECT:
            return frozenset({item.origin})
        return self._roots.get(item.origin, frozenset())

    @cached_property
    def _affected(self) -> dict[str, tuple[Address, ...]]:
        affected: dict[str, list[Address]] = {name: [] for name in self.sources}
        for address, item in self.items.items():
            for name in self.depends_on(item):
                affected[name].append(address)
        return {name: tuple(found) for name, found in affected.items()}

    def outdated(self, digests: Mapping[str, bytes]) -> str | None:
        """A tensor that had other bytes when the plan was built than in the version of these `digests`, and matters."""
        return next((name for name, built in self.unproven.items() if digests.get(name, built) != built), None)

    def affected(self, changed: Iterable[str], digests: Mapping[str, bytes] | None = None) -> list[Address]:
        """Every weight that depends on a changed tensor, each once, in the plan's order.

        `digests`: those of the version's tensors, by name. Raises: NotRefittable, naming the tensor, when the plan
        can't prove that it knows all of them.
        """
        touched: set[Address] = set()
        for name in sorted(changed):
            used = self.ties.get(name, name)
            if used in self.unused:
                continue
            if used in self.unproven:
                if digests is None or digests.get(name) != self.unproven[used]:
                    raise _not_covered(name, "it holds integers that the model reads, and they are other ones")
                continue
            if self.unknown:
                part, weight = self.unknown[0]
                why = self.items[self.unknown[0]].why
                raise _not_covered(name, f"the engine weight {weight!r} of {part} has no known rule: {why}")
            if not self._affected.get(used):
                raise _not_covered(name, "no engine weight is known to depend on it")
            touched.update(self._affected[used])
        return [address for address in self.items if address in touched]

    def check_covers(self, part: str, weights: Iterable[str]) -> None:
        """Raise NotRefittable if engine `part` has a weight that the plan lacks."""
        lacking = [name for name in weights if (part, name) not in self.items]
        if lacking:
            raise NotRefittable(
                f"the refit plan lacks {len(lacking)} weights that {part} has: {named_few(lacking)}",
                next="start the worker without the bundle, or build the bundle again",
            )

    def values(self, read: Callable[[str], Tensor]) -> Values:
        """Lazily evaluated values of the weights for the version whose tensors `read` gives, on their device."""
        return Values(self, read)


class Values:
    """Values of some weights for one version; what several of them share is computed once."""

    def __init__(self, plan: RefitPlan, read: Callable[[str], Tensor]):
        self._plan, self._read = plan, read
        self._derived: dict[str, Tensor] = {}

    def __call__(self, address: Address) -> Tensor:
        """The weight in its dtype and shape, contiguous. May share memory with the version's tensor, never write to it.

        Raises: NotRefittable for a weight without a rule, one that can't be computed, or has another size than the
        engine's.
        """
        item = self._plan.items[address]
        if item.kind is Kind.UNKNOWN:
            raise _not_covered(address[1], item.why)
        value = self._origin(item.origin)
        if value.numel() != item.numel:
            raise NotRefittable(
                f"{item.origin!r} gives {value.numel()} elements where {address[1]!r} of {address[0]} has {item.numel}",
                tensor=item.origin,
            )
        return value.detach().to(item.dtype).contiguous().view(item.shape)

    def _origin(self, name: str) -> Tensor:
        if name in self._plan.constants:
            return self._plan.constants[name]
        if name not in self._plan.formulas:
            return self._read(name)
        if name not in self._derived:
            formula = self._plan.formulas[name]
            inputs = [self._origin(i) for i in formula.inputs]
            try:
                with torch.no_grad():
                    self._derived[name] = formula.module(*inputs)
            except Exception as error:  # whatever its operations raise: then it is no rule
                raise NotRefittable(f"{name!r} can't be computed: {type(error).__name__}: {error}") from error
        return self._derived[name]


def _not_covered(name: str, why: str) -> NotRefittable:
    return NotRefittable(f"the refit plan does not cover a change of {name!r}: {why}", tensor=name)
