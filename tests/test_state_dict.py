"""A trainer's state_dict as a checkpoint: tied, strided and odd tensors, and training that goes on meanwhile."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from refleet.common.errors import CheckpointChanged, LimitExceeded, UnreadableCheckpoint
from refleet.common.limits import LIMITS
from refleet.common.tensors import tensor_bytes
from refleet.publisher.checkpoint import Checkpoint, open_checkpoint

devices = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))],
)


def read(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: b"".join(map(bytes, checkpoint.blocks(name, block_bytes=1000))) for name in checkpoint.specs}


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.head = torch.nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_and_buffers_are_tensors_like_any_other() -> None:
    model = Tied()
    with open_checkpoint(model.state_dict()) as checkpoint:
        data = read(checkpoint)
        assert data["embed.weight"] == data["head.weight"] == model.embed.weight.detach().numpy().tobytes()
        assert checkpoint.specs["norm.num_batches_tracked"].shape == ()
        assert list(checkpoint.specs) == sorted(model.state_dict(), key=str.encode)
        checkpoint.confirm()


@devices
def test_every_way_to_lie_in_memory_gives_the_same_bytes(device: str) -> None:
    base = torch.arange(24, dtype=torch.int32, device=device).view(2, 3, 4)
    tensors = {
        "turned": base.permute(2, 0, 1), "step": base[:, ::2], "expanded": base[:1].expand(5, 3, 4),
        "scalar": base[0, 0, 1], "nothing": base[:0], "parameter": torch.nn.Parameter(base.float()),
        "conjugate": torch.ones(3, dtype=torch.complex64, device=device).mul(1j).conj(),
        "float8": base.float().to(torch.float8_e4m3fn), "long": torch.arange(5000, device=device),
    }  # fmt: skip
    with open_checkpoint(tensors) as checkpoint:
        for name, data in read(checkpoint).items():
            assert data == bytes(tensor_bytes(tensors[name].cpu().contiguous())), name
        checkpoint.confirm()


def by_in_place_operation(weight: torch.Tensor) -> None:
    weight[3, 3] += 1


def by_data(weight: torch.Tensor) -> None:
    weight.data.add_(1)


def by_swapping_the_storage(weight: torch.Tensor) -> None:
    weight.data = weight.data.clone()


def by_fused_optimizer(weight: torch.Tensor) -> None:
    parameter = torch.nn.Parameter(weight)
    parameter.grad = torch.ones_like(weight)
    torch.optim.AdamW([parameter], fused=True).step()


@pytest.mark.parametrize("step", [by_in_place_operation, by_data, by_swapping_the_storage, by_fused_optimizer])
@devices
def test_training_that_went_on_meanwhile_is_noticed(step: Callable[[torch.Tensor], None], device: str) -> None:
    tensors = {"a": torch.zeros(2, device=device), "w": torch.ones(300, 70, device=device)}
    with open_checkpoint(tensors) as checkpoint:
        read(checkpoint)
        checkpoint.confirm()
        step(tensors["w"])
        with pytest.raises(CheckpointChanged, match="'w' changed") as caught:
            checkpoint.confirm()
        assert caught.value.tensor == "w"


def test_a_step_that_changes_one_percent_of_the_elements_is_noticed() -> None:
    weight = torch.ones(1000, 1000, dtype=torch.bfloat16)
    changed = torch.from_numpy(np.random.default_rng(3).random((1000, 1000)) < 0.01)
    with open_checkpoint({"w": weight}) as checkpoint:
        weight.data[changed] = 2  # not counted by torch
        with pytest.raises(CheckpointChanged):
            checkpoint.confirm()


def test_a_negative_zero_is_a_change_and_a_nan_is_not() -> None:
    tensors = {"zero": torch.zeros(4), "nan": torch.full((4,), float("nan"))}
    with open_checkpoint(tensors) as checkpoint:
        checkpoint.confirm()
        tensors["zero"].data[1] = -0.0
        with pytest.raises(CheckpointChanged, match="'zero'"):
            checkpoint.confirm()


def test_inference_tensors_have_no_counter_and_are_watched_by_sample() -> None:
    with torch.inference_mode():
        weight = torch.ones(10)
    with open_checkpoint({"w": weight}) as checkpoint:
        checkpoint.confirm()
        with torch.inference_mode():
            weight.add_(1)
        with pytest.raises(CheckpointChanged):
            checkpoint.confirm()


def test_the_mapping_itself_may_change_afterwards() -> None:
    tensors = OrderedDict(a=torch.ones(1), b=torch.ones(1))
    with open_checkpoint(tensors) as checkpoint:
        del tensors["a"]
        assert len(read(checkpoint)) == 2
        checkpoint.confirm()


def test_what_is_no_tensor_is_refused_by_name() -> None:
    with pytest.raises(UnreadableCheckpoint, match="'_extra_state' is not a tensor but dict") as caught:
        open_checkpoint({"w": torch.ones(1), "_extra_state": {}})  # type: ignore[dict-item]
    assert caught.value.tensor == "_extra_state"
    with pytest.raises(UnreadableCheckpoint, match="'w' is sparse_coo"):
        open_checkpoint({"w": torch.ones(2).to_sparse()})
    with pytest.raises(UnreadableCheckpoint, match="key that is not text"):
        open_checkpoint({3: torch.ones(1)})  # type: ignore[dict-item]


@pytest.mark.parametrize("elements", [3, 3000])  # the small one is read whole to mark it
def test_a_tensor_whose_bytes_can_not_be_had_is_named(elements: int) -> None:
    with (
        pytest.raises(UnreadableCheckpoint, match=r"'lazy zero'.*ZeroTensor") as caught,
        open_checkpoint({"lazy zero": torch._efficientzerotensor((elements,))}) as checkpoint,
    ):
        read(checkpoint)
    assert caught.value.tensor == "lazy zero"


def test_an_empty_or_oversized_state_dict_is_refused() -> None:
    with pytest.raises(UnreadableCheckpoint, match="no tensors"):
        open_checkpoint({})
    with pytest.raises(LimitExceeded, match=str(LIMITS.tensors)):
        open_checkpoint(dict.fromkeys(map(str, range(LIMITS.tensors + 1)), torch.ones(1)))
