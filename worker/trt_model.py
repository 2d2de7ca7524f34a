"""One built model: engines, the PyTorch module beside them, and the proof that they compute the same.

The module is the reference that answers are compared with, and its tensors on the GPU are the version: engines are
refitted from them, by pointer where dtype and layout are the engine's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..common.digest import digest_of
from ..common.errors import NotRefittable, ProbeMismatch, RefitFailed
from . import compare
from .live_engine import LiveEngine
from .lowering import Lowering
from .plan_build import build_plan
from .probe import digest_value
from .recipe import Recipe
from .refit_plan import RefitPlan
from .resident import Resident
from .signature import Signature
from .torch_state import bits, live_state
from .torch_trt import Compiled, compiled

OnStep = Callable[[str], None]
#: makes a live engine of (compiled, name)
Load = Callable[[Compiled, str], LiveEngine]


@dataclass(slots=True)
class Model:
    """Everything that belongs to one engine build.

    `plan` None: `why_not_fast` says why. `measured`: distance of each output from PyTorch's when it was built.
    `build`: digest of the engines as they were built. `holds`: fingerprint of the version in the engines, if known.
    `lower` lowers the module again, for ways that need it; None: it came from a bundle without a factory, and only the
    fast path exists.
    """

    recipe: Recipe
    signature: Signature
    resident: Resident
    engines: Mapping[str, Compiled]
    plan: RefitPlan | None
    why_not_fast: str
    lower: Callable[[], Lowering] | None
    build: bytes
    measured: dict[str, float] = field(default_factory=dict)
    holds: bytes | None = None
    _inputs: bytes = b""

    @property
    def inputs_digest(self) -> bytes:
        """Digest of the probe inputs, copied from the device once: they never change."""
        if not self._inputs:
            self._inputs = digest_value((self.recipe.args, dict(self.recipe.kwargs)))
        return self._inputs

    def tensors(self) -> dict[str, Tensor]:
        """The version's tensors: the module's own memory."""
        return {name: tensor.detach() for name, tensor in live_state(self.recipe.module).tensors.items()}

    def answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the engines answer. Raises: TypeError for other arguments than the model was compiled for."""
        return self.signature.answered(self.resident(self.signature.flatten(args, kwargs)))

    def reference(self, values: Mapping[str, Tensor] | None = None) -> Any:
        """What PyTorch answers to the probe inputs, with the version's tensors or with `values`."""
        recipe, inputs = self.recipe, _copied((self.recipe.args, dict(self.recipe.kwargs)))
        with torch.no_grad():
            if values is None:
                return recipe.module(*inputs[0], **inputs[1])
            return torch.func.functional_call(recipe.module, dict(values), inputs[0], inputs[1])

    def probe(self) -> Any:
        """What the engines answer to the probe inputs."""
        args, kwargs = _copied((self.recipe.args, dict(self.recipe.kwargs)))
        answer = self.answer(args, kwargs)
        self.resident.synchronize()
        return answer

    def compare(self, answer: Any, expected: Any) -> None:
        """Raise ProbeMismatch if an output is farther from PyTorch's than it was ever allowed to be."""
        compare.check(compare.differences(answer, expected), self.measured, tolerance=self.recipe.tolerance)

    def close(self) -> None:
        self.resident.close()


def on_device(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with its module moved to the device, and copies of its inputs there."""

    def moved(value: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to(device, copy=True), value)

    module = recipe.module.to(device).requires_grad_(False)
    return Recipe(
        module, moved(recipe.args), moved(dict(recipe.kwargs)), recipe.dynamic_shapes, recipe.options, recipe.tolerance
    )


def build_model(
    recipe: Recipe, *, device: torch.device, load: Load, concurrent: bool = False,
    engines: Mapping[str, Compiled] | None = None, plan: RefitPlan | None = None, on_step: OnStep,
    build: Callable[[Recipe], Mapping[str, Compiled]] = compiled,
) -> Model:  # fmt: skip
    """Compile the recipe's module, or take `engines` that were compiled from it, and prove them against PyTorch.

    Engines that were given may hold other weights than the module has now: they get the module's.
    Raises: NotRefittable when it can't be compiled, or when the engine differs from PyTorch right away.
    """
    given = engines is not None
    try:
        recipe = on_device(recipe, device)
    except torch.OutOfMemoryError as error:
        raise NotRefittable(f"the GPU has no memory for the module: {error}") from error
    on_step("exporting the module")
    lowering = Lowering(recipe)
    if engines is None:
        on_step("building the TensorRT engine")
        engines = build(recipe)
    graph = lowering.network(interpret=False).graph
    signature = Signature(lowering.call_spec.in_spec, lowering.call_spec.out_spec)

    def loaded(compiled_engines: Mapping[str, Compiled]) -> Resident:
        lives = {name: load(engine, name) for name, engine in compiled_engines.items()}
        return Resident(graph, lives, device=device, concurrent=concurrent)

    resident = loaded(engines)
    model = Model(recipe, signature, resident, engines, None, "", lambda: lowering, build_digest(engines))
    on_step("comparing the engine with PyTorch")
    differs = _difference_as_built(model)
    if differs and not given:
        raise NotRefittable(
            f"right after building, the engine does not compute what PyTorch does: {differs}",
            next="this version of TensorRT miscompiles the model: try another version, or other options in the recipe",
        )
    try:
        model.plan = build_plan(lowering, on_step=on_step) if plan is None else plan
        resident.check_covered(model.plan)
        on_step("proving the refit plan on the engine")
        prove_on_engine(model, as_built=not differs)
    except (NotRefittable, RefitFailed, ProbeMismatch) as error:
        resident.close()  # the proof may have left other weights in it
        if differs:
            raise NotRefittable(
                f"the compiled module does not compute what the recipe's module does ({differs}), "
                f"and its weights can't be replaced: {error.what}",
                next="give the module that it was compiled from, with the weights that it had",
            ) from error
        model.plan, model.why_not_fast = None, error.what
        model.resident = loaded(engines)
    return model


def build_digest(engines: Mapping[str, Compiled]) -> bytes:
    """Names the build: plans of one build are the same bytes, and only they answer bit-identically for sure."""
    return digest_of(*(digest_of(name.encode()) + digest_of(engines[name].plan) for name in sorted(engines)))


def prove_on_engine(model: Model, *, as_built: bool = True) -> None:
    """Refit everything twice and see that the engine follows PyTorch, and comes back to the bit.

    The first refit is the slow one of the refitter's life. `as_built=False`: the engine holds no weights yet, or others
    than the module. Raises: RefitFailed, NotRefittable, ProbeMismatch.
    """
    plan = model.plan
    assert plan is not None
    own = model.tensors()
    before = model.probe() if as_built else None
    _refit_all(model, plan, own)
    if as_built and not same_bits(model.probe(), before):
        raise ProbeMismatch("after an identity refit of all weights the engine answers differently")
    other = {name: perturbed(name, tensor) for name, tensor in own.items()}
    tied = {name: other[kept] for name, kept in plan.ties.items() if kept in other}
    expected = model.reference(other | tied)
    _refit_all(model, plan, other | tied)
    found = compare.differences(model.probe(), expected)
    compare.check(found, {d.where: 1.0 for d in found}, tolerance=model.recipe.tolerance)  # the most that is tolerated
    for difference in found:
        model.measured[difference.where] = max(model.measured.get(difference.where, 0.0), difference.error)
    again = model.probe()
    _refit_all(model, plan, own)
    if as_built and not same_bits(model.probe(), before):
        raise ProbeMismatch("after a refit to other weights and back the engine answers differently")
    if same_bits(again, model.probe()) and any(bool(t.numel()) for t in own.values()):
        raise ProbeMismatch("the probe inputs give the same answer with entirely other weights: they prove nothing")


def warm(model: Model) -> None:
    """Put in all weights that the engine holds already: the first refit of its life takes seconds. No request waits.

    Raises: RefitFailed, and ProbeMismatch if the answers are not the same bits afterwards.
    """
    plan, before = model.plan, model.probe()
    assert plan is not None
    _refit_all(model, plan, model.tensors())
    if not same_bits(model.probe(), before):
        raise ProbeMismatch("an identity refit by the plan changes what refit_module_weights put in")


def _difference_as_built(model: Model) -> str:
    """How the engine differs from PyTorch before any refit; "" and the distances in `model.measured` if it does not."""
    found = compare.differences(model.probe(), model.reference())
    try:
        compare.check(found, {d.where: 1.0 for d in found}, tolerance=model.recipe.tolerance)
    except ProbeMismatch as error:
        return error.what
    model.measured = {difference.where: difference.error for difference in found}
    return ""


def _refit_all(model: Model, plan: RefitPlan, values: Mapping[str, Tensor]) -> None:
    model.resident.stage(plan, plan.items, values.__getitem__)
    model.resident.commit()


def perturbed(name: str, tensor: Tensor) -> Tensor:
    """Other values like those: what is positive stays positive (variances), what is zero everywhere does not."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
    wide = tensor.float()
    mean, spread = wide.mean(), wide.std(correction=0)
    if bool(wide.min() > 0):
        other = wide * (0.75 + 0.5 * torch.rand(tensor.shape, device=tensor.device, generator=generator))
    else:
        spread = torch.where(spread > 0, spread, wide.new_tensor(0.02))
        other = mean + spread * torch.randn(tensor.shape, device=tensor.device, generator=generator)
    return other.to(tensor.dtype)


def same_bits(one: Any, two: Any) -> bool:
    first, second = pytree.tree_leaves(one), pytree.tree_leaves(two)
    return len(first) == len(second) and all(
        torch.equal(bits(a), bits(b)) if isinstance(a, Tensor) else a == b for a, b in zip(first, second, strict=True)
    )


def _copied(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, value)
