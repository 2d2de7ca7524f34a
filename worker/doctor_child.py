"""What `refleet-worker doctor` tries out in a process of its own: it may hang, crash, or print what it likes.

    python -m refleet.worker.doctor_child WHAT [SPEC]

The last line of standard output that starts with MARK is the result as JSON; `problem` in it says what failed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.errors import RefleetError
from .load_engine import load_engine

MARK = "refleet-doctor-result "
Result = dict[str, Any]


def torch_facts() -> Result:
    """torch, what it is built for, and the devices that it can use."""
    import torch

    devices: Any = torch.cuda
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else ""
    found: Result = {"version": torch.__version__, "build": build, "gpus": [], "no_gpu": ""}
    if not build:
        return found
    try:
        devices.init()
        count = devices.device_count()
    except Exception as error:
        return found | {"no_gpu": one_line(error)}
    return found | {"gpus": [_gpu(number) for number in range(count)]}


def _gpu(number: int) -> Result:
    import torch

    found: Result = {"name": f"device {number}", "capability": [0, 0]}
    try:
        found |= {
            "name": torch.cuda.get_device_name(number), "capability": list(torch.cuda.get_device_capability(number))
        }  # fmt: skip
        free, total = torch.cuda.mem_get_info(number)
        torch.ones(1, device=f"cuda:{number}").add_(1).item()  # also that this build has code for the device
    except Exception as error:
        return found | {"problem": one_line(error)}
    return found | {"free": free, "total": total}


def torch_tensorrt_facts() -> Result:
    """torch_tensorrt and the TensorRT that it uses, imported as refleet does."""
    import torch_tensorrt

    from .torch_trt import torch_tensorrt as parts

    trt = parts().trt
    return {"version": torch_tensorrt.__version__, "tensorrt": trt.__name__, "tensorrt_version": trt.__version__}


def import_facts(name: str) -> Result:
    """A package and its version."""
    module = __import__(name)
    return {"version": str(module.__version__)}


def self_test_facts() -> Result:
    import torch

    from .self_test import on_device

    trial = on_device(torch.device("cuda", torch.cuda.current_device()), say=_say)
    return {"problem": trial.problem, "next": trial.next, "applied": trial.applied, "seconds": trial.seconds}


def engine_facts(spec: str) -> Result:
    """The engine that `spec` names, made and closed again."""
    kind, _, rest = spec.partition(":")
    if kind == "file" and rest:
        return _file(Path(rest).expanduser().absolute())
    started = time.perf_counter()
    engine = load_engine(spec, on_step=_say)
    try:
        return {
            "build": engine.build, "path": str(getattr(engine, "plan_summary", "")),
            "seconds": time.perf_counter() - started,
        }  # fmt: skip
    finally:
        engine.close()


def _file(path: Path) -> Result:
    """Without making the engine, which would take away the temporary file of a worker that is running."""
    folder = path.parent
    if path.is_dir():
        return {"problem": f"{path} is a folder", "next": f"for example file:{path / 'model.safetensors'}"}
    if not folder.is_dir():
        return {"problem": f"there is no folder {folder}", "next": f"mkdir -p {folder}"}
    if not os.access(folder, os.W_OK | os.X_OK):
        return {"problem": f"{folder} can't be written", "next": f"ls -ld {folder}"}
    return {"build": "file safetensors", "path": "the file is replaced as a whole", "seconds": 0.0}


def one_line(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


_ACTIONS: dict[str, Callable[..., Result]] = {
    "torch": torch_facts, "torch_tensorrt": torch_tensorrt_facts, "import": import_facts,
    "self-test": self_test_facts, "engine": engine_facts,
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Do one thing and print its result."""
    warnings.simplefilter("ignore")
    try:
        result = _ACTIONS[arguments[0]](*arguments[1:])
    except RefleetError as error:
        result = {"problem": error.what, "next": error.next}
    except BaseException as error:  # also SystemExit of a module that is imported
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        result = {"problem": f"{type(error).__name__}: {one_line(error)}", "missing": missing}
    print("\n" + MARK + json.dumps(result), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
