"""TensorRT engines for `--engine`: compiled from a factory's recipe, or from a bundle that saves compiling."""

from __future__ import annotations

from pathlib import Path

import torch

from ..common.errors import ApplyError, NotRefittable, ProtocolError, RefleetError, StoreError
from .bundle import Bundle, save
from .bundle_place import check_place
from .bundle_record import BundleRecord
from .recipe import Recipe
from .tensorrt_engine import TensorRTEngine, cuda
from .torch_trt import compiled
from .trt_make import Build, Factory, Maker, called
from .trt_model import Load, Model, OnStep


def load_tensorrt(
    factory: Factory, *, apply: str, contexts: int, bundle: Path | None, on_step: OnStep,
    device: torch.device | None = None, load: Load | None = None, build: Build = compiled,
) -> TensorRTEngine:  # fmt: skip
    """An engine of the factory's recipe. `bundle`: used if it fits this machine and the factory, else replaced by one
    that does. Raises: UsageError, NotRefittable.
    """
    place = None if bundle is None else check_place(bundle)
    device = device or cuda()
    maker = Maker(device, contexts, on_step, factory, load, build)
    recipe = called(factory)
    model = None if place is None else _from_bundle(place, recipe, maker)
    if model is None:
        model = maker.model(recipe)
        if place is not None:
            _write(model, place, on_step)
    return _engine(model, maker, apply)


def load_bundle(
    folder: Path, *, apply: str, contexts: int, on_step: OnStep, device: torch.device | None = None,
    load: Load | None = None,
) -> TensorRTEngine:  # fmt: skip
    """An engine without its factory. Raises: NotRefittable when it can't be used here, and as `Bundle.open`."""
    on_step(f"reading the bundle {folder}")
    bundle = Bundle.open(folder)
    misfit = bundle.misfit()
    if misfit:
        raise NotRefittable(
            f"the bundle can't be used here: {misfit}", about=f"bundle {folder}",
            next="build one on this machine: refleet-worker build --engine tensorrt:package.module:factory --out",
        )  # fmt: skip
    maker = Maker(device or cuda(), contexts, on_step, None, load)
    return _engine(maker.bundled(bundle), maker, apply)


def build_bundle(
    factory: Factory, folder: Path, *, stripped: bool, on_step: OnStep, device: torch.device | None = None,
    load: Load | None = None, build: Build = compiled,
) -> tuple[Model, BundleRecord]:  # fmt: skip
    """Compile the factory's recipe, prove it, and write the bundle. Close the model. Raises: as `save`, UsageError."""
    place = check_place(folder)
    model = Maker(device or cuda(), 1, on_step, factory, load, build).model(called(factory))
    try:
        on_step(f"writing the bundle {folder}")
        return model, save(model, place, stripped=stripped)
    except BaseException:
        model.close()
        raise


def _engine(model: Model, maker: Maker, apply: str) -> TensorRTEngine:
    try:
        return TensorRTEngine(
            model, apply=apply, contexts=maker.contexts, on_step=maker.on_step, device=maker.device, load=maker.load,
            build=maker.build, factory=maker.factory,
        )  # fmt: skip
    except BaseException:
        model.close()
        raise


def _from_bundle(folder: Path, recipe: Recipe, maker: Maker) -> Model | None:
    """The model, or None after saying why the bundle is not used."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    maker.on_step(f"reading the bundle {folder}")
    try:
        bundle = Bundle.open(folder)
        why = bundle.misfit()
        if why is None:
            return maker.bundled(bundle, recipe)
    except (ApplyError, ProtocolError, StoreError) as error:
        why = error.what
    maker.on_step(f"the bundle is not used, the engine is built from the factory: {why}")
    return None


def _write(model: Model, folder: Path, on_step: OnStep) -> None:
    """A bundle that can't be written is no reason not to serve."""
    on_step(f"writing the bundle {folder}")
    try:
        save(model, folder)
    except RefleetError as error:
        on_step(f"the bundle was not written, the next start compiles again: {error.what}")
