"""Merged low-rank adapters: the factors travel, relative to the version before any adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refleet.common.errors import UnknownVersion, UsageError
from world import State, World, holds, reason

ROWS, COLS, RANK = 512, 384, 8
NAMES = ("layer.0.q", "layer.1.q")


def base_model() -> State:
    generator = torch.Generator().manual_seed(0)
    shapes = dict.fromkeys((*NAMES, "layer.0.up", "layer.1.up"), (ROWS, COLS))
    made = {n: (torch.randn(s, generator=generator) * 0.02).bfloat16() for n, s in shapes.items()}
    return made | {"norm": torch.ones(COLS)}


def adapters(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    return {name: (factor(ROWS, RANK), factor(RANK, COLS), 2.0) for name in NAMES}


def merged(model: State, found: dict[str, Any]) -> State:
    """As a trainer merges."""
    made = dict(model)
    for name, (b, a, scale) in found.items():
        made[name] = (model[name].float() + scale * (b.float() @ a.float())).bfloat16()
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_adapters_travel_as_factors_and_leave_nothing_of_the_one_before(small_world: World, dtype: torch.dtype) -> None:
    publisher, worker = small_world.publisher(), small_world.worker()
    model = base_model()
    publisher.publish(model, version="base").wait(workers=1, timeout_s=20)
    plain = publisher.publish(merged(model, adapters(1)), version="plain")
    plain.wait(workers=1, timeout_s=20)
    for step in range(1, 8):  # more than the worker keeps: what all build on stays
        found = adapters(step, dtype)
        state = merged(model, found)
        published = publisher.publish(state, version=f"step-{step}", relative_to="base", adapters=found)
        published.wait(workers=1, timeout_s=20)
        assert holds(worker, state)
        assert published.release.payload is not None or step == 1
        width = 2 if dtype.itemsize == 2 else 4
        factor_bytes = len(NAMES) * RANK * (ROWS + COLS) * width
        assert published.release.payload_bytes < factor_bytes + 6000
        if published.release.payload and width == 2:
            assert published.release.payload_bytes < plain.release.payload_bytes / 3
    publisher.rollback("base").wait(workers=1, timeout_s=20)
    assert holds(worker, model)


def test_a_worker_without_that_version_gets_another_delta(small_world: World) -> None:
    publisher, model = small_world.publisher(), base_model()
    publisher.publish(model, version="base")
    publisher.publish(merged(model, adapters(1)), version="first")
    worker = small_world.worker()  # it never had the base
    worker.wait("first", timeout_s=20)
    found = adapters(2)
    state = merged(model, found)
    publisher.publish(state, version="second", relative_to="base", adapters=found).wait(workers=1, timeout_s=20)
    assert holds(worker, state)


def test_the_version_that_adapters_build_on_is_kept_with_them(small_world: World) -> None:
    publisher, model = small_world.publisher(keep=2), base_model()
    publisher.publish(model, version="base")
    for step in range(4):
        found = adapters(step)
        publisher.publish(merged(model, found), version=f"step-{step}", relative_to="base", adapters=found)
    reasons, _ = publisher.collect()
    assert reasons == {
        "step-3": "the target", "step-2": "one of the last 2", "base": "step-2 was sent relative to it",
    }  # fmt: skip
    publisher.publish(model, version="base")
    assert publisher.target().version == "base"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "b", "a", "why"),
    [
        ("nowhere", (ROWS, RANK), (RANK, COLS), "no such tensor"),
        ("norm", (COLS, 1), (1, 1), "is no matrix"),
        (NAMES[0], (ROWS, RANK), (RANK + 1, COLS), "does not make"),
        (NAMES[0], (ROWS + 1, RANK), (RANK, COLS), "does not make"),
        (NAMES[0], (ROWS, 300), (300, COLS), "too many"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    small_world: World, name: str, b: tuple[int, ...], a: tuple[int, ...], why: str
) -> None:
    publisher, model = small_world.publisher(), base_model()
    publisher.publish(model, version="base")
    found = {name: (torch.zeros(b), torch.zeros(a), 1.0)}
    error = reason(lambda: publisher.publish(model, version="next", relative_to="base", adapters=found))
    assert isinstance(error, UsageError)
    assert repr(name) in error.what and why in error.what
    assert [release.version for release in publisher.book.releases()] == ["base"]


def test_a_scale_that_is_no_number_is_refused(small_world: World) -> None:
    publisher, model = small_world.publisher(), base_model()
    found = {NAMES[0]: (torch.zeros(ROWS, RANK), torch.zeros(RANK, COLS), float("nan"))}
    assert "scale" in reason(lambda: publisher.publish(model, version="base", adapters=found)).what


def test_an_unknown_version_to_build_on_is_refused(small_world: World) -> None:
    publisher = small_world.publisher()
    assert isinstance(reason(lambda: publisher.publish(base_model(), relative_to="v9")), UnknownVersion)
