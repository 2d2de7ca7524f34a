"""Every model family on a real GPU: both ways of refitting, whether they are right, and what they cost.

    python tests/gpu/refit_table.py [--json FILE] [--only NAME,NAME] [--timeout S]
    python tests/gpu/refit_table.py --markdown FILE [FILE...]       # the table of earlier runs

Each family runs in a process of its own, several of them at a time: compiling and `refit_module_weights` beside each
other, fast refits and copies alone. docs/tensorrt.md quotes a run.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plan"))


def _vision(name: str, size: int = 224) -> Callable[[], Any]:
    def make() -> Any:
        import torch
        import torchvision
        from families import recipe

        module = getattr(torchvision.models, name)()
        for parameter in module.parameters():
            if not parameter.any():  # heads that start at zero would make every comparison one of zeros
                torch.nn.init.normal_(parameter, std=0.02)
        return recipe(module, torch.randn(8, 3, size, size))

    return make


def _unet() -> Any:
    import torch
    from families import UNet, recipe

    return recipe(UNet(64), torch.randn(4, 3, 128, 128))


def _mlp() -> Any:
    import torch
    from families import recipe
    from torch import nn

    layers = [part for _ in range(16) for part in (nn.Linear(4096, 4096), nn.ReLU())]
    return recipe(nn.Sequential(*layers), torch.randn(16, 4096))


def _language(kind: str, dtype: str = "float32", **sizes: Any) -> Callable[[], Any]:
    def make() -> Any:
        import torch
        from families import language_model

        return language_model(kind, getattr(torch, dtype), tokens=64, **sizes)

    return make


_LLAMA = {
    "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "intermediate_size": 5632, "vocab_size": 32000,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "MLP 1.07 GB": _mlp,
    "ResNet-18": _vision("resnet18"),
    "ResNet-50": _vision("resnet50"),
    "MobileNetV3-small": _vision("mobilenet_v3_small"),
    "EfficientNet-B0": _vision("efficientnet_b0"),
    "ViT-B/16": _vision("vit_b_16"),
    "U-Net": _unet,
    "GPT-2": _language("GPT2"),
    "GPT-2 fp16": _language("GPT2", "float16"),
    "GPT-2 bf16": _language("GPT2", "bfloat16"),
    "BERT-base": _language("Bert"),
    "Llama-like 1.1 B bf16": _language("Llama", "bfloat16", **_LLAMA),
}


@contextmanager
def turn(kind: int) -> Iterator[None]:
    """LOCK_SH: building, several at a time; LOCK_EX: timed, with no other process doing anything."""
    with open(Path(tempfile.gettempdir()) / "refit-table.lock", "w") as lock:
        fcntl.flock(lock, kind)
        yield


def measure(name: str) -> dict[str, Any]:
    import torch
    from refleet.worker import official, trt_model
    from refleet.worker.tensorrt_engine import TensorRTEngine
    from refleet.worker.torch_trt import compiled
    from refleet.worker.trt_model import perturbed

    torch.manual_seed(0)
    seen: dict[str, Any] = {"family": name, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    made = FAMILIES[name]()
    steps: list[tuple[float, str]] = []

    def build(recipe: Any) -> Any:
        started = time.perf_counter()
        engines = compiled(recipe)
        seen["compile_s"] = time.perf_counter() - started
        return engines

    started = time.perf_counter()
    with turn(fcntl.LOCK_SH):
        engine = TensorRTEngine(made, build=build, on_step=lambda text: steps.append((time.perf_counter(), text)))
    ended = time.perf_counter()
    starts = {text.split(",")[0]: at for at, text in reversed(steps)}
    seen["start_s"] = ended - started
    if "proving the refit plan on the engine" in starts:
        seen["plan_s"] = starts["proving the refit plan on the engine"] - starts["lowering with random weights"]
        seen["first_refits_s"] = ended - starts["proving the refit plan on the engine"]
    model = engine.model
    seen["build"] = engine.build
    seen["fast"] = engine.plan_summary
    seen["measured"] = max(model.measured.values())
    own = {n: t.clone() for n, t in model.tensors().items()}
    seen["bytes"] = sum(
        t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.tensors().values()}.values()
    )
    seen["weights"] = sum(len(live.weights) for live in model.resident.engines.values())
    seen["engines"] = len(model.resident.engines)

    if model.plan is not None:
        plan, resident, live = model.plan, model.resident, model.tensors()

        def refit(addresses: Any) -> tuple[float, float, float]:
            torch.cuda.synchronize()
            started = time.perf_counter()
            resident.stage(plan, addresses, live.__getitem__)
            torch.cuda.synchronize()
            between = time.perf_counter()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with torch.cuda.stream(resident._stream):
                start.record()
            resident.commit()
            with torch.cuda.stream(resident._stream):
                end.record()
            end.synchronize()
            return (between - started) * 1e3, (time.perf_counter() - between) * 1e3, start.elapsed_time(end)

        with turn(fcntl.LOCK_EX):
            full = [refit(list(plan.items)) for _ in range(9)][2:]
        medians = [statistics.median(column) for column in zip(*full, strict=True)]
        seen["stage_ms"], seen["full_ms"], seen["full_engine_ms"] = medians
        floating = {n for n in plan.sources if own[n].is_floating_point() and n not in plan.unproven}
        target = max(floating, key=lambda n: (own[n].numel() * own[n].element_size() <= 12e6, own[n].numel()))
        addresses = plan.affected([target])
        with turn(fcntl.LOCK_EX):
            one = [refit(addresses) for _ in range(13)][4:]
        seen["one_tensor"] = f"{target} {own[target].numel() * own[target].element_size() / 1e6:.1f} MB"
        _, seen["one_ms"], seen["one_engine_ms"] = (statistics.median(column) for column in zip(*one, strict=False))

        # A -> B -> A, one at a time against all at once
        other = {n: perturbed(n + "B", t) for n, t in own.items()}
        for kept in plan.ties.values():
            other |= {n: other[kept] for n, k in plan.ties.items() if k == kept}
        before, started = model.probe(), time.perf_counter()
        held_a = engine.content_digest()
        seen["deep_s"] = time.perf_counter() - started
        if seen["bytes"] < 1e9:
            seen["serialize_deterministic"] = held_a == engine.content_digest()
        _put(live, other)
        refit(plan.affected(floating))
        at_b, expected_b, held_b = model.probe(), model.reference(), engine.content_digest()
        seen["error_b"] = max(d.error for d in trt_model.compare.differences(at_b, expected_b))
        _put(live, own)
        refit(plan.affected(floating))
        seen["a_b_a_outputs"] = trt_model.same_bits(before, model.probe())
        seen["a_b_a_engine"] = engine.content_digest() == held_a
        seen["b_differs"] = not trt_model.same_bits(before, at_b) and held_b != held_a
        if len(floating) <= 200 and seen["bytes"] < 1e9:
            _put(live, other)
            for n in sorted(floating, reverse=True):
                refit(plan.affected([n]))
            seen["one_by_one"] = trt_model.same_bits(at_b, model.probe()) and engine.content_digest() == held_b
        _put(live, other)
        refit(plan.affected(floating))
        at_b = model.probe()
    else:
        other = {n: perturbed(n + "B", t) for n, t in own.items()}
        _put(model.tensors(), other)

    print("RESULT " + json.dumps(seen), flush=True)  # what there is so far: the official way may outlast the time
    # the official way, to the same weights
    started = time.perf_counter()
    try:
        lowering = model.lower()
        with turn(fcntl.LOCK_SH):
            started = time.perf_counter()
            engines, graph = official.refitted(model.recipe, lowering, model.engines)
            seen["official_s"] = time.perf_counter() - started
        second = replace(model, resident=engine._maker.resident(graph, engines))
        answer = second.probe()
        found = trt_model.compare.differences(answer, model.reference())
        seen["official_error"] = max(d.error for d in found)
        if model.plan is not None:
            seen["official_same_outputs"] = trt_model.same_bits(answer, at_b)
            seen["official_same_engine"] = second.resident.content_digest() == held_b
        second.close()
    except Exception as error:
        seen["official_s"] = time.perf_counter() - started
        seen["official_error"] = f"{type(error).__name__}: {str(error)[:160]}"
    with turn(fcntl.LOCK_EX):
        seen |= _copies(seen["bytes"])
    return seen


def _put(live: dict[str, Any], values: dict[str, Any]) -> None:
    for name, tensor in live.items():
        tensor.copy_(values[name])


def _copies(size: int) -> dict[str, float]:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    one, two = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    host = torch.empty(min(size, 1 << 29), dtype=torch.uint8, pin_memory=True)

    def timed(copy: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            started = time.perf_counter()
            copy()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times[2:])

    part = one[: host.numel()]
    return {"d2d_ms": timed(lambda: two.copy_(one)), "h2d_ms": timed(lambda: part.copy_(host)) * size / host.numel()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--timeout", type=float, default=240)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--family", help=argparse.SUPPRESS)
    parser.add_argument("--markdown", nargs="+", type=Path)
    options = parser.parse_args()
    if options.family:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        print("RESULT " + json.dumps(measure(options.family)))
        return 0
    if options.markdown:
        print(markdown({found["family"]: found for path in options.markdown for found in json.loads(path.read_text())}))
        return 0
    chosen = [name for name in FAMILIES if not options.only or any(name.startswith(o) for o in options.only.split(","))]
    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in as_completed([pool.submit(_run, name, options.timeout) for name in chosen]):
            results.append(done.result())
            print(json.dumps(done.result()), flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    return 0


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """Rows in the order of FAMILIES; the last one is the geometric mean of the ratios."""
    heads = (
        "family", "MB", "engine weights", "compile s", "plan s", "first refits s", "`refit_module_weights` s", "right?",
        "staging ms", "full refit ms", "times faster", "with staging", "one tensor ms", "/ D2D", "/ H2D", "error",
        "exact",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    ratios, slower = [], []
    for name in FAMILIES:
        if (row := found.get(name)) is None:
            continue
        if "failed" in row or "full_ms" not in row or "official_s" not in row:
            lines.append(f"| {name} | {row.get('failed') or row['fast']} |" + " |" * (len(heads) - 2))
            continue
        ratios.append(row["official_s"] * 1e3 / row["full_ms"])
        slower.append(row["official_s"] * 1e3 / (row["stage_ms"] + row["full_ms"]))
        official = row["official_error"]
        wrong = isinstance(official, str) or official > 10 * row["error_b"]
        right = f"**no**: {official if isinstance(official, str) else f'off by {official:.0%}'}" if wrong else "yes"
        exact = all(row[key] for key in ("a_b_a_outputs", "a_b_a_engine", "b_differs")) and row.get("one_by_one", True)
        same = wrong or (row["official_same_outputs"] and row["official_same_engine"])
        cells = [
            name, f"{row['bytes'] / 1e6:.0f}", row["weights"], f"{row['compile_s']:.1f}", f"{row['plan_s']:.1f}",
            f"{row['first_refits_s']:.1f}", f"{row['official_s']:.1f}", right, f"{row['stage_ms']:.1f}",
            f"{row['full_ms']:.2f}", f"{ratios[-1]:.0f}", f"{slower[-1]:.0f}",
            f"{row['one_ms']:.2f} ({row['one_tensor'].rsplit(' ', 2)[1]} MB)", f"{row['full_ms'] / row['d2d_ms']:.1f}",
            f"{row['full_ms'] / row['h2d_ms']:.2f}", f"{row['error_b']:.1g}", "yes" if exact and same else "**NO**",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if ratios:
        means = [round(statistics.geometric_mean(column)) for column in (ratios, slower)]
        lines.append(f"\nGeometric mean over {len(ratios)} families: {means[0]} times faster, {means[1]} with staging.")
    return "\n".join(lines)


def _run(name: str, timeout: float) -> dict[str, Any]:
    """One family in a process of its own."""
    command = [sys.executable, __file__, "--family", name]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        output, said = ran.stdout, ran.stderr[-1500:]
    except subprocess.TimeoutExpired as error:
        output, said = (error.stdout or b"").decode(), f"not within {timeout:g} s"
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    found: dict[str, Any] = json.loads(lines[-1][7:]) if lines else {"family": name, "failed": said}
    return found


if __name__ == "__main__":
    sys.exit(main())
