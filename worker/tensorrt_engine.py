"""A live TensorRT engine on the fleet's version.

prepare  the version's tensors go to the GPU, PyTorch computes what the probe must answer, and the way is decided:
         fast       the refit plan covers the change: its values are computed into buffers
         reference  `refit_module_weights` makes a second engine beside the one that serves
         rebuild    the second engine is compiled anew
apply    with the gate closed: one refit enqueued on the live engine, or the second engine takes over
probe    the engine's answers against PyTorch's, and as a digest for the comparison with earlier ones
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..common.digest import digest_of, tensor_digest_of
from ..common.errors import NotRefittable, ProbeMismatch, RefitFailed, RefleetError, UsageError
from ..common.messages import Serving
from ..common.types import Manifest
from . import official, trt_live
from .device_tensors import DeviceTensors
from .engine import Digest, StagedVersion
from .probe import digest_value
from .recipe import Recipe
from .refit_plan import Address
from .torch_trt import compiled
from .trt_make import Build, Factory, Maker, called
from .trt_model import Load, Model, OnStep

AUTO, FAST, REFERENCE = "auto", "fast", "reference"
APPLY = (AUTO, FAST, REFERENCE)


@dataclass(slots=True)
class _Prepared:
    """What `apply` is going to do. `model`: the engine that takes over; None: the live one is refitted."""

    fingerprint: bytes
    model: Model | None
    applied: str


class TensorRTEngine:
    """Refits, probes and serves TensorRT engines made from a recipe.

    Args: `made` a Recipe, a model, or a factory that returns what `as_recipe` takes; only with a factory can the worker
    build another structure: `factory` names that of a model. `compiled_module` what torch_tensorrt made of the recipe's
    module before, or loaded from disk: its engines are taken and nothing is compiled. `apply` which way versions go in:
    `fast` or `reference` alone, or `auto`: fast where it is proven, else reference, else rebuild. `contexts` how many
    requests may run at once, each on its caller's stream; with 1 they run one after the other on the engine's stream,
    and a refit needs no synchronization. `on_step` hears what takes time. Raises: UsageError, NotRefittable.
    """

    def __init__(
        self, made: Factory | Recipe | Model, *, apply: str = AUTO, contexts: int = 1,
        on_step: OnStep = lambda _text: None, device: torch.device | None = None, load: Load | None = None,
        build: Build = compiled, compiled_module: nn.Module | torch.export.ExportedProgram | None = None,
        factory: Factory | None = None,
    ) -> None:  # fmt: skip
        if apply not in APPLY:
            raise UsageError(f"apply {apply!r}: choose {', '.join(APPLY)}")
        if contexts < 1:
            raise UsageError(f"contexts {contexts}: at least one request must be possible")
        if callable(made) and not isinstance(made, Recipe | Model):
            factory = made
        self._apply, self._device = apply, device or cuda()
        self._maker = Maker(self._device, contexts, on_step, factory, load, build)
        if isinstance(made, Model):
            self._model = made
        else:
            engines = None if compiled_module is None else official.from_compiled(compiled_module)
            self._model = self._maker.model(made if isinstance(made, Recipe) else called(made), engines=engines)
        self._tensors = DeviceTensors(self._model.recipe.module)
        if apply == FAST and self._model.plan is None:
            raise NotRefittable(
                f"the fast path can't be used: {self._model.why_not_fast}", next="use --apply auto or --apply reference"
            )
        self.applied = ""
        self._prepared: _Prepared | None = None
        self._replaced: Model | None = None  # until the version is served, so that going back is to take it again
        self._pending: frozenset[str] = frozenset()  # tensors that were written and are not in the engine yet
        self._expected: tuple[bytes, Any] | None = None  # PyTorch's answer to the probe, by fingerprint

    # ------------------------------------------------------------------ requests

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer one request, as the module would. Call it while holding the gate (`Worker.serving`).

        Returns tensors that are ready on the caller's current stream. Raises: TypeError for another structure of
        arguments, RuntimeError for shapes that the engine was not built for.
        """
        return self._model.answer(args, kwargs)

    # ------------------------------------------------------------------ the engine protocol

    @property
    def build(self) -> str:
        """TensorRT, GPU, torch, module class and a digest of the engines as they were built."""
        model, module = self._model, self._model.recipe.module
        where = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        rest = digest_of(model.build, model.inputs_digest, repr(self._maker.concurrent).encode()).hex()[:16]
        return f"{_version()}, {where}, torch {torch.__version__}, {type(module).__qualname__} {rest}"

    @property
    def model(self) -> Model:
        """The engine that serves, with everything that belongs to it."""
        return self._model

    @property
    def plan_summary(self) -> str:
        """For people: whether the fast path is there, and why not."""
        model = self._model
        if model.plan is None:
            return f"reference path only: {model.why_not_fast}"
        return f"fast path: {len(model.plan.items)} engine weights covered"

    def check(self, manifest: Manifest, *, restructure: bool = False) -> None:
        try:
            self._tensors.check(manifest)
        except NotRefittable as error:
            if restructure and self._maker.factory is not None:
                return
            if restructure:
                error.next = "start the worker with a factory: only then it can build an engine of another structure"
            raise

    def prepare(self, staged: StagedVersion, changed: frozenset[str]) -> bool:
        manifest = staged.manifest
        self._drop_prepared()
        if not self._tensors.fit(manifest):
            if not staged.restructure:
                self._tensors.check(manifest)
            self._prepared = self._restructured(staged)
            return False
        names = (changed | self._pending) & manifest.by_name.keys()
        self._pending = names
        self._tensors.write(staged, names)
        self._expected = (manifest.fingerprint, _expected(self._model))
        back = self._replaced is not None and self._replaced.holds == manifest.fingerprint
        if back:
            self._prepared = _Prepared(
                manifest.fingerprint, self._replaced, f"back to the engine of {staged.serving.version}"
            )
        else:
            self._prepared = self._way(manifest, names)
        return True

    def apply(self, staged: StagedVersion, changed: frozenset[str]) -> None:
        fingerprint = staged.manifest.fingerprint
        try:
            if self._prepared is None or self._prepared.fingerprint != fingerprint:
                self.prepare(staged, changed)
            prepared, self._prepared = self._prepared, None
            assert prepared is not None
            if prepared.model is None:
                self._model.holds = None
                count = self._model.resident.commit()
                total = sum(len(live.weights) for live in self._model.resident.engines.values())
                self.applied = prepared.applied.format(count=count, total=total)
            else:
                self._take(prepared.model)
                self.applied = prepared.applied
            self._model.holds, self._pending = fingerprint, frozenset()
        except RefleetError:
            raise
        except Exception as error:  # torch and TensorRT raise what they like: RuntimeError, out of memory
            raise RefitFailed(
                f"refitting the engine failed: {type(error).__name__}: {error}",
                about=f"version {staged.serving.version}",
            ) from error

    def read_back(self, names: Iterable[str], digest: Digest = tensor_digest_of) -> Iterator[tuple[str, bytes]]:
        """What the GPU memory holds that the engines are refitted from. The engines themselves: `content_digest`."""
        return self._tensors.read_back(names, digest)

    def probe(self) -> bytes:
        """Every output against PyTorch's with the same weights; the digest of their bits."""
        model = self._model
        try:
            expected = self._expected[1] if self._expected and self._expected[0] == model.holds else _expected(model)
            answer = model.probe()
        except RefleetError:
            raise
        except Exception as error:
            raise ProbeMismatch(f"the probe could not be run: {type(error).__name__}: {error}") from error
        model.compare(answer, expected)
        return digest_value(answer)

    def served(self, serving: Serving) -> str | None:  # noqa: ARG002
        """The engine that was replaced is not needed any more."""
        if self._replaced is not None:
            self._replaced.close()
            self._replaced = None
        return None

    def content_digest(self) -> bytes:
        """BLAKE3 over the serialized engines and the tensors of torch-executed parts: what they hold, read back."""
        return self._model.resident.content_digest()

    def close(self) -> None:
        """Free the engines."""
        for model in (self._model, self._replaced):
            if model is not None:
                model.close()

    # ------------------------------------------------------------------ which way

    def _way(self, manifest: Manifest, names: frozenset[str]) -> _Prepared:
        """Stage the change for the live engine, or make another one, and say why. Raises: ApplyError."""
        fingerprint, digests = manifest.fingerprint, {name: entry.digest for name, entry in manifest.by_name.items()}
        why = "asked for" if self._apply == REFERENCE else self._stage(names, digests)
        if not why:
            return _Prepared(fingerprint, None, "fast: {count} of {total} engine weights refitted")
        if self._model.holds == fingerprint:  # going back before the engine was touched
            return _Prepared(fingerprint, self._model, "the engine holds it already")
        if self._apply == FAST:
            raise NotRefittable(f"only the fast path is allowed, and it can't be used: {why}", next=_OTHER_WAYS)
        model = self._model
        if model.lower is None:
            raise NotRefittable(
                f"the fast path can't be used, and a bundle without its factory has no other: {why}", next=_OTHER_WAYS
            )
        if self._apply == AUTO and model.plan is not None and model.plan.outdated(digests):
            # another engine with the old plan would never be on the fast path again
            return _Prepared(fingerprint, self._maker.rebuilt(model), f"rebuilt: {why}")
        try:
            return _Prepared(fingerprint, self._maker.reference(model), f"reference: {why}")
        except (RefitFailed, ProbeMismatch, NotRefittable) as error:
            if self._apply == REFERENCE:
                raise
            why = f"{why}; refit_module_weights: {error.what}"
        return _Prepared(fingerprint, self._maker.rebuilt(model), f"rebuilt: {why}")

    def _stage(self, names: frozenset[str], digests: Mapping[str, bytes]) -> str:
        """Compute the fast path's values. Returns why it can't be used, or ""."""
        model = self._model
        if model.plan is None:
            return model.why_not_fast
        try:
            affected: list[Address] = model.plan.affected(names, digests)
            live = model.tensors()
            model.resident.stage(model.plan, affected, lambda name: live[name])
        except NotRefittable as error:
            return error.what
        return ""

    def _restructured(self, staged: StagedVersion) -> _Prepared:
        """An engine of another structure, built and proven beside the one that serves."""
        manifest, replaced = staged.manifest, self._replaced
        if replaced is not None and replaced.holds == manifest.fingerprint:
            return _Prepared(manifest.fingerprint, replaced, f"back to the engine of {staged.serving.version}")
        model = self._maker.restructured(staged)
        return _Prepared(manifest.fingerprint, model, "rebuilt: the version has another structure")

    def _drop_prepared(self) -> None:
        """Forget what was prepared and not applied; an engine that was made for it is freed."""
        prepared, self._prepared, self._expected = self._prepared, None, None
        if prepared is not None and prepared.model not in (None, self._model, self._replaced):
            assert prepared.model is not None
            prepared.model.close()

    def _take(self, model: Model) -> None:
        """Serve with this one from now on; the other is kept until `served`."""
        now = self._model
        if self._replaced is not None and self._replaced is not model:
            self._replaced.close()
        self._model, self._replaced = model, None if model is now else now
        if model.recipe.module is not now.recipe.module:
            self._tensors = DeviceTensors(model.recipe.module)


_OTHER_WAYS = "start the worker with its factory and --apply auto, or publish a version that changes other tensors"


def _expected(model: Model) -> Any:
    """PyTorch's answer to the probe. Raises: ProbeMismatch when the version's tensors make the module raise."""
    try:
        return model.reference()
    except Exception as error:  # the module is the user's code
        raise ProbeMismatch(
            f"PyTorch can't answer the probe inputs with this version: {type(error).__name__}: {error}"
        ) from error


def cuda() -> torch.device:
    if not torch.cuda.is_available():
        raise UsageError("a TensorRT engine needs a CUDA device, and torch sees none", next="refleet-worker doctor")
    return torch.device("cuda", torch.cuda.current_device())


def _version() -> str:
    try:
        return trt_live.version()
    except UsageError:
        return "no TensorRT"  # engines of another kind were given
