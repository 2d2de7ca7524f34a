"""Out of GPU memory while building. Alone: other processes on the GPU would run out of memory too.

pytest tests/gpu/test_tensorrt_memory.py
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from refleet.common.errors import NotRefittable
from refleet.worker.recipe import Recipe
from refleet.worker.tensorrt_engine import TensorRTEngine
from torch import nn

if not torch.cuda.is_available() or importlib.util.find_spec("torch_tensorrt") is None:
    pytest.skip("needs a GPU and torch_tensorrt", allow_module_level=True)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


def test_running_out_of_memory_while_building_is_said_and_leaves_nothing_behind() -> None:
    big, small = (
        Recipe(
            nn.Sequential(*[nn.Linear(width, width) for _ in range(8)]).eval(), (torch.randn(1, width),),
            options={"min_block_size": 1},
        )
        for width in (8192, 64)
    )  # fmt: skip
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - (1 << 30), dtype=torch.uint8, device="cuda")
    with pytest.raises(NotRefittable, match="memory"):
        TensorRTEngine(big, apply="fast")
    del hog
    torch.cuda.empty_cache()
    engine = TensorRTEngine(small, apply="fast")
    assert engine(torch.randn(1, 64)).shape == (1, 64)
