"""Real consecutive checkpoints, made by training a small Llama-style model. The other benchmarks measure on these.

    python benchmarks/checkpoints.py [--quick] [--out FOLDER] [--threads 1]

    rl-*         GRPO steps on a task that can be checked, at three learning rates, bf16
    sft-*        supervised fine-tuning on other text, bf16, and the same steps in fp32
    ema-fp32     the average (0.999) over the fine-tune at 1e-4
    lora         adapters on q and v, merged
    unrelated*   two models from other seeds, each trained a little

fp32 master weights, AdamW; a bf16 checkpoint is a cast of them. All go on from one pretraining run, because at
initialization weights and Adam's state are not what they are later: the first steps of a new optimizer are taken, but
not kept. Deterministic by seed on one kind of machine with one number of threads; kept until the recipe changes.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import llama
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import Lora, Run, Weights, ema, grpo, supervised

HOME = Path.home() / ".cache" / "refleet-bench"
RL_RATES, SFT_RATES = (1e-6, 3e-6, 1e-5), (1e-4, 1e-5)
#: regimes in the order in which they are shown
KINDS = ("rl-1e-6", "rl-3e-6", "rl-1e-5", "sft-1e-5", "sft-1e-4", "lora", "unrelated", "sft-1e-5-fp32", "sft-1e-4-fp32",
         "ema-fp32", "unrelated-fp32")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides what comes out, besides the source files and the machine."""

    size: llama.Size
    files: int  # of text
    rows: int  # of a batch
    length: int
    pretrain: int  # steps
    other: int  # steps of the unrelated model
    warm: int  # steps of a new optimizer that are not kept
    prompts: int
    group: int
    answer: int
    keep: int = 4  # checkpoints of each regime


BASE = Recipe(llama.BASE, files=80, rows=6, length=64, pretrain=160, other=40, warm=20, prompts=6, group=8, answer=6)
QUICK = Recipe(llama.QUICK, files=8, rows=4, length=16, pretrain=100, other=20, warm=8, prompts=4, group=8, answer=3)


def name_of(kind: str, rate: float, suffix: str = "") -> str:
    return f"{kind}-{rate:.0e}{suffix}".replace("e-0", "e-")


class Maker:
    """Trains, and saves what the regimes keep. `tick` is called after every step with what is being done."""

    def __init__(self, recipe: Recipe, out: Path, tick: Callable[[str], None]):
        self.recipe, self.out, self.tick = recipe, out, tick
        self.general, self.special = llama.texts(recipe.size, recipe.files)
        self.random = torch.Generator().manual_seed(1)

    def save(self, regime: str, number: int, weights: Weights) -> None:
        folder = self.out / regime
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / f"step-{number}.safetensors")

    def batch(self, text: Tensor) -> Tensor:
        return llama.pieces(text, self.recipe.rows, self.recipe.length, self.random)

    def pretrain(self, seed: int, steps: int, what: str) -> Run:
        """Real text with some rows of the task, under a rate that rises and falls."""
        run = Run(llama.Llama(self.recipe.size, seed=seed), 0.0, seed=seed)
        for n in range(steps):
            for group in run.optimizer.param_groups:
                group["lr"] = 1e-3 * min((n + 1) / 20, 1.1 - n / steps)
            task = llama.counting(2, self.recipe.length, self.random, noise=0.2)
            loss = supervised(run, torch.cat((self.batch(self.general), task)))
            self.tick(f"{what}, loss {loss:.2f}")
        return run

    def rl(self, model: llama.Llama) -> None:
        recipe = self.recipe
        shape = {"prompts": recipe.prompts, "group": recipe.group, "length": recipe.answer}
        start = Run(copy.deepcopy(model), RL_RATES[0], seed=2)
        for _ in range(recipe.warm):
            self.tick(f"GRPO, first steps, reward {grpo(start, **shape):.2f}")
        for rate in RL_RATES:
            run, name = start.branch(rate), name_of("rl", rate)
            self.save(name, 0, run.weights(torch.bfloat16))
            for n in range(1, recipe.keep):
                self.tick(f"{name}, reward {grpo(run, **shape):.2f}")
                self.save(name, n, run.weights(torch.bfloat16))

    def sft(self, model: llama.Llama) -> None:
        start = Run(copy.deepcopy(model), SFT_RATES[0], seed=3)
        average = start.weights(torch.float32)
        for _ in range(self.recipe.warm):
            self.tick(f"fine-tune, first steps, loss {supervised(start, self.batch(self.special)):.2f}")
            ema(average, start.weights(torch.float32), 0.999)
        for rate in SFT_RATES:
            run = start.branch(rate)
            for n in range(self.recipe.keep):
                if n:
                    self.tick(f"{name_of('sft', rate)}, loss {supervised(run, self.batch(self.special)):.2f}")
                self.save(name_of("sft", rate), n, run.weights(torch.bfloat16))
                self.save(name_of("sft", rate, "-fp32"), n, run.weights(torch.float32))
                if rate == SFT_RATES[0]:
                    if n:
                        ema(average, run.weights(torch.float32), 0.999)
                    self.save("ema-fp32", n, average)

    def lora(self, model: llama.Llama) -> None:
        run = Lora(model, 1e-4, rank=8, seed=4)
        for n in range(1 - self.recipe.warm // 2, self.recipe.keep):
            self.tick(f"LoRA, loss {run.step(self.batch(self.special)):.2f}")
            if n >= 0:
                self.save("lora", n, run.weights(torch.bfloat16))

    def all(self) -> None:
        run = self.pretrain(0, self.recipe.pretrain, "pretraining")
        other = self.pretrain(9, self.recipe.other, "an unrelated model")
        for suffix, dtype in (("", torch.bfloat16), ("-fp32", torch.float32)):
            for n, one in enumerate((run, other)):
                self.save(f"unrelated{suffix}", n, one.weights(dtype))
        self.rl(run.model)
        self.sft(run.model)
        self.lora(run.model)

    @staticmethod
    def steps(recipe: Recipe) -> int:
        more = recipe.keep - 1
        return (recipe.pretrain + recipe.other + 2 * recipe.warm + (len(RL_RATES) + len(SFT_RATES)) * more
                + recipe.warm // 2 + more)  # fmt: skip


def changed(before: Path, after: Path) -> dict[str, float]:
    """Shares of one step: elements changed in all, inside the tensors that changed, and tensors changed."""
    old, new = load_file(before), load_file(after)
    bits = {2: torch.int16, 4: torch.int32}
    counts = {n: int((old[n].view(bits[t.itemsize]) != t.view(bits[t.itemsize])).sum()) for n, t in new.items()}
    touched = sum(new[n].numel() for n, count in counts.items() if count)
    total = sum(counts.values())
    return {
        "elements": total / sum(t.numel() for t in new.values()),
        "inside": total / max(touched, 1),
        "tensors": sum(count > 0 for count in counts.values()) / len(counts),
    }


def key(recipe: Recipe, threads: int) -> dict[str, object]:
    """What a kept set is good for."""
    here = Path(__file__).parent
    source = b"".join((here / name).read_bytes() for name in ("llama.py", "training.py"))
    return {
        "recipe": asdict(recipe), "threads": threads, "source": hashlib.sha256(source).hexdigest(),
        "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
    }  # fmt: skip


def ensure(out: Path = HOME, *, quick: bool = False, threads: int = 1) -> dict[str, list[Path]]:
    """Paths of consecutive checkpoints by regime; trains only if they are not there."""
    recipe = QUICK if quick else BASE
    folder, wanted = out / ("quick" if quick else "base"), key(recipe, threads)
    about = folder / "about.json"
    if not about.exists() or json.loads(about.read_text())["key"] != wanted:
        _make(recipe, folder, about, wanted, threads)
    return {name: sorted((folder / name).glob("*.safetensors")) for name in KINDS}


def _make(recipe: Recipe, folder: Path, about: Path, wanted: dict[str, object], threads: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading text", total=Maker.steps(recipe))
        Maker(recipe, folder, lambda what: progress.update(task, advance=1, description=what)).all()
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)
    shares = {}
    for name in KINDS:
        files = sorted((folder / name).glob("*.safetensors"))
        shares[name] = [changed(a, b) for a, b in pairwise(files)]
    about.write_text(json.dumps({"key": wanted, "seconds": time.perf_counter() - started, "changed": shares}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HOME, help=f"folder that keeps them (default {HOME})")
    parser.add_argument("--quick", action="store_true", help="a tiny model in seconds: only to see that it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the shares to this file")
    options = parser.parse_args()
    files = ensure(options.out, quick=options.quick, threads=options.threads)
    about = json.loads((options.out / ("quick" if options.quick else "base") / "about.json").read_text())
    table = Table("regime", "checkpoints", "MB", "elements changed", "inside changed tensors", "tensors changed")
    for regime in KINDS:
        steps = about["changed"][regime]
        shown = [", ".join(f"{step[what]:.2%}" for step in steps) for what in ("elements", "inside", "tensors")]
        table.add_row(regime, str(len(files[regime])), f"{files[regime][0].stat().st_size / 1e6:.1f}", *shown)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    console.print(f"made in {about['seconds']:.0f} s with {options.threads} thread(s), torch {torch.__version__}")
    if options.json:
        options.json.write_text(json.dumps(about, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
