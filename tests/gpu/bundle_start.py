"""How long a worker's engine takes to start: compiled, from a bundle with and without its factory, and stripped.

    python tests/gpu/bundle_start.py [--family "ResNet-50"] [--json FILE]

Each start is a process of its own, measured from its start to the first proven version; all must answer the same bits.
`refleet-worker build`, `export` and `doctor` run as commands on the way.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
FAMILY = os.environ.get("REFLEET_FAMILY", "ResNet-50")


def make() -> Any:
    """The factory that `--engine tensorrt:bundle_start:make` names."""
    import torch
    from refit_table import FAMILIES

    torch.manual_seed(0)
    return FAMILIES[FAMILY]()


def start(kind: str, bundle: Path, began: float) -> dict[str, Any]:
    """One start, in this process: load, put a version in, answer."""
    import torch
    from engine_cases import version
    from refleet.common.tensors import spec_of, tensor_bytes
    from refleet.worker.load_engine import load_engine
    from refleet.worker.tensorrt_engine import TensorRTEngine
    from refleet.worker.trt_model import perturbed
    from torch.utils import _pytree as pytree

    steps: list[tuple[float, str]] = []
    spec = f"bundle:{bundle}" if kind.startswith("alone") else "tensorrt:bundle_start:make"
    place = bundle if kind in ("with", "compiled") else None
    engine = load_engine(spec, bundle=place, on_step=lambda text: steps.append((time.time() - began, text)))
    assert isinstance(engine, TensorRTEngine)
    loaded = time.time() - began
    make()  # the first call imports modules that draw random numbers
    state = make().module.state_dict()
    values = {name: perturbed(name, tensor) for name, tensor in state.items()}
    specs = [spec_of(name, tensor) for name, tensor in values.items()]
    data = {name: bytes(tensor_bytes(tensor.contiguous())) for name, tensor in values.items()}
    ready = version(data, specs, name="v1", seq=1)
    began_put = time.time()
    engine.prepare(ready, ready.names)
    engine.apply(ready, ready.names)
    engine.probe()
    answer = pytree.tree_leaves(engine.model.probe())
    bits = hashlib.sha256(
        b"".join(t.cpu().contiguous().view(torch.uint8).numpy().tobytes() for t in answer)
    ).hexdigest()
    return {
        "kind": kind, "loaded_s": loaded, "first_version_s": time.time() - began_put, "applied": engine.applied,
        "answer": bits, "build": engine.build, "content": engine.content_digest().hex(),
        "steps": [f"{at:.1f} {text}" for at, text in steps],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default=FAMILY)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--start", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if options.start:
        kind, bundle, began = options.start
        print("RESULT " + json.dumps(start(kind, Path(bundle), float(began))))
        return 0
    here = str(Path(__file__).resolve().parent)
    environment = os.environ | {"REFLEET_FAMILY": options.family}
    environment["PYTHONPATH"] = f"{here}:{environment.get('PYTHONPATH', '')}"
    worker = [sys.executable, "-c", "from refleet.worker.cli import main; main()"]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("compiled", "with", "alone", "alone stripped"):
            bundle = Path(folder) / ("stripped" if "stripped" in kind else "bundle")
            if "stripped" in kind:
                command = [*worker, "build", "--engine", "tensorrt:bundle_start:make", "--out", str(bundle)]
                ran = subprocess.run(
                    [*command, "--strip-weights", "--json"], capture_output=True, text=True, env=environment
                )
                print("build", ran.returncode, ran.stdout.strip()[-1500:], ran.stderr[-800:], flush=True)
            command = [sys.executable, __file__, "--start", kind, str(bundle), repr(time.time())]
            ran = subprocess.run(command, capture_output=True, text=True, env=environment)
            lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
            found = json.loads(lines[-1][7:]) if lines else {"kind": kind, "failed": ran.stderr[-1500:]}
            if bundle.is_dir():
                found["bundle_MB"] = sum(file.stat().st_size for file in bundle.iterdir()) / 1e6
            results.append(found)
            print(json.dumps(found), flush=True)
        ran = subprocess.run([*worker, "doctor"], capture_output=True, text=True, env=environment)
        print("doctor", ran.returncode, ran.stdout, ran.stderr[-500:], flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    good = [found for found in results if "answer" in found]
    return 0 if len(good) == 4 and len({(found["answer"], found["content"]) for found in good[:3]}) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
