"""Refit plans are proven without a GPU: torch_tensorrt lowers and interprets there, it only has to be imported.

`make test-plan` runs this folder in an environment of its own, with a CUDA build of torch and TensorRT-RTX.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
INSTALLED = importlib.util.find_spec("torch_tensorrt") is not None
if not INSTALLED and not os.environ.get("REFLEET_PLAN_TESTS"):
    collect_ignore_glob = ["test_*.py"]  # `make test` runs without torch_tensorrt
else:
    if not torch.cuda.is_available():  # what the import asks for; nothing else here looks for a device
        torch.cuda.get_device_capability = lambda *_args, **_kwargs: (9, 0)  # type: ignore[assignment]
        torch.cuda.current_device = lambda: 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_tensorrt  # noqa: F401
    logging.getLogger("torch_tensorrt").setLevel(logging.ERROR)
sys.path.insert(0, str(HERE))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """torch.export and torch_tensorrt warn of their own future; ours are errors still."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.timeout(300))
