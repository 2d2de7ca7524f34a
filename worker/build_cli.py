"""`refleet-worker build` and `export`: engines on disk, to be used without compiling them again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..common.errors import UsageError
from .load_engine import load_engine, named_factory

if TYPE_CHECKING:
    from .bundle_record import BundleRecord
    from .tensorrt_engine import TensorRTEngine
    from .trt_model import Model

FILE = click.Path(path_type=Path)
PROGRAMS = (".ep", ".pt2")
BUILD_EXAMPLE = """\b
Example:
  refleet-worker build --engine tensorrt:serving:make_recipe --out ./bundle
  refleet-worker run --model policy --engine bundle:./bundle --state ./w0
"""
EXPORT_EXAMPLE = """\b
Example:
  refleet-worker export --engine bundle:./bundle --state ./w0 --out ./step-100
"""
_PHASES = {
    "compile": ("exporting", "building"),
    "plan": ("lowering", "proving the plan"),
    "proof": ("comparing", "proving the refit plan", "proving the engines"),
}


class Steps:
    """Shows what goes on, on standard error, and adds up how long it took."""

    def __init__(self, *, quiet: bool):
        self._quiet = quiet
        self._begun: list[tuple[float, str]] = []

    def __call__(self, text: str) -> None:
        self._begun.append((time.perf_counter(), text))
        if not self._quiet:
            click.echo(f"{text} ...", err=True)

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, until now."""
        ends = [*(at for at, _ in self._begun[1:]), time.perf_counter()]
        spent = dict.fromkeys(_PHASES, 0.0)
        for (at, text), end in zip(self._begun, ends, strict=True):
            for phase, words in _PHASES.items():
                if text.startswith(words):
                    spent[phase] += end - at
        return {phase: round(total, 3) for phase, total in spent.items()}


@click.command(epilog=BUILD_EXAMPLE)
@click.option("--engine", required=True, metavar="SPEC", help="tensorrt:package.module:factory.")
@click.option("--out", required=True, type=FILE, metavar="DIR", help="The bundle; one that is there is replaced.")
@click.option("--strip-weights", is_flag=True, help="Write the engines without weights: a first version fills them.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; its keys are in docs/worker.md.")
def build(engine: str, out: Path, strip_weights: bool, as_json: bool) -> int:
    """Compile a TensorRT engine, prove it, and write it as a bundle.

    A bundle holds everything to serve and refit the model, on this kind of GPU and with this version of TensorRT,
    without compiling it again and without its code.
    """
    if not engine.startswith("tensorrt:"):
        raise UsageError(
            "a bundle is built from a factory", about=f"engine {engine!r}",
            next="for example tensorrt:mypackage.serving:make_recipe",
        )  # fmt: skip
    factory = named_factory(engine)
    from . import trt_load

    steps = Steps(quiet=as_json)
    model, record = trt_load.build_bundle(factory, out, stripped=strip_weights, on_step=steps)
    try:
        facts = _facts(model, record, out) | {"seconds": steps.seconds}
    finally:
        model.close()
    click.echo(json.dumps(facts) if as_json else "\n".join(_table(facts)))
    return 0


def _facts(model: Model, record: BundleRecord, out: Path) -> dict[str, Any]:
    weights = {(part, name) for part, live in model.resident.engines.items() for name in live.weights}
    covered = weights & model.plan.items.keys() if model.plan else set()
    files = [engine.file.size_bytes for engine in record.engines]
    return {
        "bundle": str(out), "bytes": sum(each.stat().st_size for each in out.iterdir()),
        "engines": [{"part": e.part, "bytes": size} for e, size in zip(record.engines, files, strict=True)],
        "torch_parts": ["/".join(graph.path) for graph in record.graphs if graph.path],
        "weights": len(weights), "covered": len(covered), "path": "fast" if model.plan else "reference",
        "why": model.why_not_fast, "stripped": record.stripped, "gpu": record.platform.gpu,
        "tensorrt": record.platform.tensorrt, "build": record.build.hex(),
    }  # fmt: skip


def _table(facts: dict[str, Any]) -> list[str]:
    engines, parts, seconds = facts["engines"], facts["torch_parts"], facts["seconds"]
    path = "fast: weights go into the live engine" if facts["path"] == "fast" else f"reference only: {facts['why']}"
    rows = {
        "bundle": f"{facts['bundle']}, {facts['bytes'] / 1e6:.1f} MB{', without weights' if facts['stripped'] else ''}",
        "for": f"{facts['gpu'] or 'no GPU'}, {facts['tensorrt'] or 'no TensorRT'}",
        "parts": f"{len(engines)} by TensorRT, {len(parts)} by PyTorch",
        "weights": f"{facts['covered']} of {facts['weights']} covered by the refit plan",
        "path": path,
        "seconds": ", ".join(f"{phase} {spent:.1f}" for phase, spent in seconds.items()),
    }
    return [f"{name:<8} {text}" for name, text in rows.items()]


@click.command(epilog=EXPORT_EXAMPLE)
@click.option("--engine", required=True, metavar="SPEC", help="tensorrt:package.module:factory, or bundle:DIR.")
@click.option("--state", required=True, type=FILE, metavar="DIR", help="Folder of the worker that has the version.")
@click.option("--version", "wanted", metavar="ID", help="Version id, or begin of a fingerprint.  [the served one]")
@click.option("--out", required=True, type=FILE, metavar="PATH", help="A bundle, or a file ending in .ep or .pt2.")
@click.option("--bundle", type=FILE, metavar="DIR", help="With tensorrt: use this bundle if it fits, else write it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; its keys are in docs/worker.md.")
def export(engine: str, state: Path, wanted: str | None, out: Path, bundle: Path | None, as_json: bool) -> int:
    """Write an engine with the weights of one version: as a bundle, or for torch_tensorrt.load.

    The worker whose folder it is may be running; nothing is written there.
    """
    _check_export(engine, out)
    from .export import opened, put_in, take

    steps = Steps(quiet=as_json)
    with opened(state) as store:
        steps("reading the version")
        taken = take(store, wanted)
        made: Any = load_engine(engine, bundle=bundle, on_step=steps)
        try:
            steps("putting the version in")
            put_in(made, taken, store)
            steps(f"writing {out}")
            _write(made, out, taken.id, taken.manifest.fingerprint)
            applied = made.applied
        finally:
            made.close()
    facts = {
        "path": str(out), "kind": "program" if out.suffix else "bundle", "version": taken.id or None,
        "fingerprint": taken.manifest.fingerprint.hex(), "applied": applied,
    }  # fmt: skip
    named = f"version {taken.id}, " if taken.id else ""
    click.echo(json.dumps(facts) if as_json else f"{out} holds {named}fingerprint {facts['fingerprint']}")
    return 0


def _check_export(engine: str, out: Path) -> None:
    """Raise UsageError for what can't work, before anything is loaded."""
    about, kind = f"engine {engine!r}", engine.partition(":")[0]
    if kind not in ("tensorrt", "bundle"):
        raise UsageError(
            "only TensorRT engines can be exported", about=about,
            next="choose --engine tensorrt:package.module:factory or --engine bundle:DIR",
        )  # fmt: skip
    if out.suffix and out.suffix not in PROGRAMS:
        raise UsageError(
            f"{out.name!r} is neither a file for torch_tensorrt.load ({' or '.join(PROGRAMS)}) nor a bundle, which has "
            "no suffix", about=f"--out {out}", next=f"for example --out {out.with_suffix('.ep')}",
        )  # fmt: skip
    if out.suffix and kind == "bundle":
        raise UsageError(
            f"a {out.suffix} file is written by torch_tensorrt, which needs the module", about=about,
            next="choose --engine tensorrt:package.module:factory, with --bundle to save compiling",
        )  # fmt: skip
    if not out.suffix:
        from .bundle_place import check_place

        check_place(out)
    elif not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {out.absolute().parent}", next=f"mkdir -p {out.absolute().parent}")


def _write(engine: TensorRTEngine, out: Path, version: str, fingerprint: bytes) -> None:
    from . import official
    from .bundle import save
    from .torch_trt import Compiled

    model = engine.model
    plans = {name: live.serialize() for name, live in model.resident.engines.items()}
    if not out.suffix:
        save(model, out, engines=plans, version=version, fingerprint=fingerprint)
        return
    assert model.lower is not None
    held = {name: Compiled(plans[name], e.inputs, e.outputs) for name, e in model.engines.items()}
    official.save_program(model.lower(), held, out)
