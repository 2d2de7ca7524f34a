"""Build a refit plan by trying it out: lower the model with several sets of random weights and see what follows what.

Two lowerings with independent random values in every floating tensor classify each engine weight by value: equal in
both is a constant; equal, after a cast, to one and the same tensor in both is that tensor; equal to what a captured
fold or batch norm gave in both is that formula. Further draws decide between several candidates. A last lowering with
other values, which played no part in it, must then be predicted bit for bit: a plan that fails this is never used.

Values are positive, so that square roots and logarithms in folded constants stay finite, but for the last draw: what
looks like a constant because it only depends on signs shows there. Integers keep theirs: random ones might not be valid
indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ..common.digest import digest_of, tensor_digest
from ..common.errors import NotRefittable
from ..common.tensors import bits_of, tensor_bytes
from .engine import named_few
from .graph_capture import Norm
from .lowering import Lowering, Network
from .refit_plan import Address, Formula, Item, Kind, RefitPlan
from .torch_state import live_state

#: lowerings for classification; the third and fourth only where candidates are left to tell apart
_DRAWS = (2, 4)
_SEED = 20_260_000
OnStep = Callable[[str], None]


def _silent(_text: str) -> None: ...


def build_plan(lowering: Lowering, *, on_step: OnStep = _silent) -> RefitPlan:
    """The proven plan of a lowered model.

    Raises: NotRefittable when the model can't be lowered, or when a lowering with fresh values differs from what the
    plan says, naming the weight. A weight without a rule is no error here: it is in the plan as UNKNOWN.
    """
    sources = Sources.of(lowering)
    draws: list[_Draw] = []
    while len(draws) < _DRAWS[0] or (len(draws) < _DRAWS[1] and _ambiguous(draws, sources)):
        on_step(f"lowering with random weights, {len(draws) + 1}")
        draws.append(_Draw.of(lowering, sources, _SEED + len(draws)))
    plan = _classified(draws, sources)
    on_step("proving the plan with other weights")
    prove(plan, lowering, sources)
    return plan


def prove(plan: RefitPlan, lowering: Lowering, sources: Sources, *, seed: int = _SEED - 1) -> None:
    """Lower with fresh values and compare every weight bit for bit. Raises: NotRefittable naming one that differs."""
    values = sources.drawn(seed, signed=True)
    network = lowering.network(values)
    read = plan.values(lambda name: sources.value(name, values))
    for part, weights in [*network.weights.items(), *network.attributes.items()]:
        plan.check_covers(part, weights)
        for name, value in weights.items():
            address = (part, name)
            item = plan.items[address]
            if item.kind is not Kind.UNKNOWN and not _same(read(address), value):
                raise NotRefittable(
                    f"the refit plan is wrong: its {item.kind.value} rule of {name!r} in {part} gives other bits",
                    tensor=item.origin,
                )


@dataclass(frozen=True, slots=True)
class Sources:
    """The tensors of a version, as the module holds them. `random`: those that get random values, ties once."""

    tensors: Mapping[str, Tensor]
    ties: Mapping[str, str]
    used: frozenset[str]
    random: frozenset[str]

    @classmethod
    def of(cls, lowering: Lowering) -> Sources:
        state = live_state(lowering.recipe.module)
        ties = {name: min(group) for name, group in state.ties.items()}
        tensors = {name: tensor.detach() for name, tensor in state.tensors.items()}
        read = lowering.used()
        used = frozenset(ties.get(name, name) for name in read if name in tensors)
        random = frozenset(name for name in used if tensors[name].is_floating_point() or tensors[name].is_complex())
        return cls(tensors, ties, used, random)

    def drawn(self, seed: int, *, signed: bool = False) -> dict[str, Tensor]:
        """Independent random values for every name, tied names the same; on the module's devices."""
        drawn: dict[str, Tensor] = {}
        for number, name in enumerate(sorted(self.random)):
            tensor = self.tensors[name]
            generator = torch.Generator(tensor.device).manual_seed(seed * 1_000_003 + number)
            drawn[name] = _values(tensor, generator, signed=signed)
        return drawn | {name: drawn[kept] for name, kept in self.ties.items() if kept in drawn}

    def value(self, name: str, drawn: Mapping[str, Tensor]) -> Tensor:
        return drawn[name] if name in drawn else self.tensors[name]


def _values(tensor: Tensor, generator: torch.Generator, *, signed: bool) -> Tensor:
    """Sizes of 0.25 to 4, evenly over the exponents: a half-precision scalar has a few thousand to choose from."""

    def draw() -> Tensor:
        size = torch.exp2(4 * torch.rand(tensor.shape, device=tensor.device, generator=generator) - 2)
        if not signed:
            return size
        return size * (2 * torch.randint(0, 2, tensor.shape, device=tensor.device, generator=generator) - 1)

    return (torch.complex(draw(), draw()) if tensor.is_complex() else draw()).to(tensor.dtype)


# ---------------------------------------------------------------------- classification


@dataclass(frozen=True, slots=True)
class _Draw:
    """One lowering and, by content, what its weights may have come from."""

    network: Network
    norms: dict[str, Norm]  # by the name of the formula that they become
    by_content: dict[tuple[torch.dtype, bytes], set[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, lowering: Lowering, sources: Sources, seed: int) -> _Draw:
        values = sources.drawn(seed)
        network = lowering.network(values)
        draw = cls(network, {f"batchnorm{number}": norm for number, norm in enumerate(network.norms)})
        wanted: dict[int, set[torch.dtype]] = {}
        for weight in draw.weights.values():
            wanted.setdefault(weight.numel(), set()).add(weight.dtype)
        for norm in network.norms:
            for part in norm.parts:
                wanted.setdefault(part.numel(), set()).add(part.dtype)
        for name in sources.used:
            draw._note(name, sources.value(name, values), wanted)
        for name, fold in network.folds.items():
            draw._note(name, fold.value, wanted)
        for name, norm in draw.norms.items():
            draw._note(f"{name}.scale", norm.scale, wanted)
            draw._note(f"{name}.shift", norm.shift, wanted)
        return draw

    @property
    def weights(self) -> dict[Address, Tensor]:
        parts = self.network.weights | self.network.attributes
        return {(part, name): value for part, weights in parts.items() for name, value in weights.items()}

    def candidates(self, weight: Tensor) -> set[str]:
        return self.by_content.get(_content(weight), set())

    def _note(self, name: str, value: Tensor, wanted: Mapping[int, set[torch.dtype]]) -> None:
        for dtype in wanted.get(value.numel(), ()):
            if dtype == value.dtype or (dtype.is_floating_point and value.is_floating_point()):
                self.by_content.setdefault(_content(value.to(dtype)), set()).add(name)


def _content(value: Tensor) -> tuple[torch.dtype, bytes]:
    return value.dtype, digest_of(tensor_bytes(value.contiguous()))


def _candidates(draws: list[_Draw], address: Address) -> set[str]:
    """What gave this weight in every draw."""
    first, *others = (draw.candidates(draw.weights[address]) for draw in draws)
    return first.intersection(*others)


def _constant(draws: list[_Draw], address: Address) -> bool:
    return all(_same(draws[0].weights[address], draw.weights[address]) for draw in draws[1:])


def _ambiguous(draws: list[_Draw], sources: Sources) -> bool:
    return any(len(_candidates(draws, address) & sources.random) > 1 for address in draws[0].weights)


def _classified(draws: list[_Draw], sources: Sources) -> RefitPlan:
    first = draws[0]
    for draw in draws[1:]:
        if draw.weights.keys() != first.weights.keys() or draw.norms.keys() != first.norms.keys():
            raise NotRefittable("lowering the module gives other engine weights for other values: no plan is possible")
    constants: dict[str, Tensor] = {}
    formulas = _formulas(draws, sources, constants)
    items = {}
    for address, weight in first.weights.items():
        kind, origin, why = _rule(address, draws, sources, formulas)
        if kind is Kind.CONST and not origin:
            origin = f"constant:{address[0]}:{address[1]}"
            constants[origin] = weight
        items[address] = Item(kind, origin, weight.dtype, tuple(weight.shape), why)
    names = frozenset(sources.tensors)
    unproven = {name: tensor_digest(tensor_bytes(sources.tensors[name])) for name in sources.used - sources.random}
    needed = {item.origin for item in items.values()}
    formulas, constants = _reachable(needed, formulas, constants)
    return RefitPlan(
        items, formulas, constants, sources.used, names - sources.used - sources.ties.keys(), unproven, sources.ties,
        tuple(part for part in first.network.weights),
    )  # fmt: skip


def _rule(
    address: Address, draws: list[_Draw], sources: Sources, formulas: Mapping[str, Formula]
) -> tuple[Kind, str, str]:
    """(kind, origin, why not) of one weight."""
    found = _candidates(draws, address)
    direct, derived = found & sources.random, found - sources.used
    if len(direct) == 1:
        return Kind.DIRECT, direct.pop(), ""
    if direct:
        return Kind.UNKNOWN, "", f"{named_few(sorted(direct))} all gave it in {len(draws)} tries"
    known = sorted(derived & formulas.keys())
    if known:  # several folds of the same content are computed from the same tensors: any of them will do
        return Kind.BATCHNORM if known[0].startswith("batchnorm") else Kind.FOLDED, known[0], ""
    if _constant(draws, address):
        return Kind.CONST, "", ""
    return Kind.UNKNOWN, "", "its value follows from the model's tensors in a way that no rule describes"


def _formulas(draws: list[_Draw], sources: Sources, constants: dict[str, Tensor]) -> dict[str, Formula]:
    """A formula for each fold, and for each batch norm with known inputs. What else they need goes to `constants`."""
    formulas: dict[str, Formula] = {}
    folds = draws[0].network.folds
    for name, fold in folds.items():
        inputs = []
        for attribute, value in fold.inputs.items():
            kept = sources.ties.get(attribute, attribute)
            if attribute not in folds and kept not in sources.used:
                kept = f"attribute:{attribute}"
                constants[kept] = value
            inputs.append(kept)
        formulas[name] = Formula(fold.graph, tuple(inputs))
    for name, norm in draws[0].norms.items():
        parts = [_norm_input(draws, name, number, sources, constants) for number in range(len(norm.parts))]
        if all(parts):
            for number, which in enumerate(("scale", "shift")):
                formulas[f"{name}.{which}"] = Formula(_norm_graph(norm, number), tuple(parts))
    return formulas


def _norm_input(draws: list[_Draw], name: str, number: int, sources: Sources, constants: dict[str, Tensor]) -> str:
    """Where an input of a batch norm comes from; "" if that is not known."""
    parts = [draw.norms[name].parts[number] for draw in draws]
    if all(_same(parts[0], part) for part in parts[1:]):
        # the converter has it on the CPU, and the formula takes it together with the module's own tensors
        constants[f"{name}.{number}"] = parts[0].to(next(iter(sources.tensors.values())).device)
        return f"{name}.{number}"
    first, *others = (draw.candidates(part) for draw, part in zip(draws, parts, strict=True))
    found = first.intersection(*others)
    direct = found & sources.random
    if len(direct) == 1:
        return direct.pop()
    folded = sorted(found & draws[0].network.folds.keys())
    return folded[0] if folded and not direct else ""


def _norm_graph(norm: Norm, number: int) -> torch.fx.Graph:
    """The library's own arithmetic with this layer's eps, as a graph: the same operations give the same bits."""

    def folded(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        result: Tensor = norm.function(weight, bias, mean, variance, norm.eps)[number]
        return result

    return make_fx(folded)(*norm.parts).graph


def _reachable(
    needed: Iterable[str], formulas: Mapping[str, Formula], constants: Mapping[str, Tensor]
) -> tuple[dict[str, Formula], dict[str, Tensor]]:
    """Without the formulas and constants that no item needs."""
    kept: set[str] = set()
    stack = list(needed)
    while stack:
        name = stack.pop()
        if name not in kept:
            kept.add(name)
            stack += formulas[name].inputs if name in formulas else ()
    return {n: f for n, f in formulas.items() if n in kept}, {n: t for n, t in constants.items() if n in kept}


def _same(one: Tensor, two: Tensor) -> bool:
    """Bit for bit, NaNs with any payload being equal: the signs of the last draw make some."""
    one, two = one.cpu().contiguous(), two.cpu().contiguous()
    if one.dtype != two.dtype or one.numel() != two.numel():
        return False
    same = bits_of(one).view(-1) == bits_of(two).view(-1)
    if one.is_floating_point():
        same |= one.view(-1).isnan() & two.view(-1).isnan()
    return bool(same.all())
