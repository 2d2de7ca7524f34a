"""How an engine's answer is compared with PyTorch's: every output, by a measure that rounding hardly moves."""

from __future__ import annotations

import pytest
import torch
from refleet.common.errors import ProbeMismatch
from refleet.worker.compare import check, differences, tolerance_of
from torch import Tensor

NAN, INF = float("nan"), float("inf")


def error(got: Tensor, want: Tensor) -> float:
    (found,) = differences(got, want)
    return found.error


def test_equal_answers_are_no_distance_apart() -> None:
    value = torch.tensor([1.0, NAN, -INF, INF, 0.0])
    assert error(value.clone(), value) == 0.0
    assert error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert error(torch.zeros(0), torch.zeros(0)) == 0.0


def test_the_measure_does_not_depend_on_the_size_of_the_numbers() -> None:
    want = torch.randn(100)
    assert error(want * 1.01, want) == pytest.approx(0.01, rel=1e-4)
    assert error(want * 1e20 * 1.01, want * 1e20) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("got", "want"),
    [([1.0, NAN], [1.0, 1.0]), ([1.0, 1.0], [1.0, NAN]), ([INF, 1.0], [-INF, 1.0]), ([NAN, 1.0], [INF, 1.0]),
     ([1.0, 0.0], [0.0, 0.0])],
)  # fmt: skip
def test_nan_infinity_and_answers_where_there_are_none_are_infinitely_far(got: list[float], want: list[float]) -> None:
    assert error(torch.tensor(got), torch.tensor(want)) == INF


def test_of_integers_and_booleans_the_share_that_differs_counts() -> None:
    assert error(torch.tensor([1, 2, 3, 5]), torch.tensor([1, 2, 3, 4])) == 0.25
    assert error(torch.tensor([True, False]), torch.tensor([True, True])) == 0.5


@pytest.mark.parametrize(
    ("got", "want"),
    [(torch.zeros(2), torch.zeros(3)), (torch.zeros(2), torch.zeros(2).half()),
     ((torch.zeros(2), torch.zeros(2)), (torch.zeros(2),)), ({"a": torch.zeros(1)}, {"b": torch.zeros(1)})],
)  # fmt: skip
def test_answers_that_are_built_differently_are_refused(got: object, want: object) -> None:
    with pytest.raises(ProbeMismatch):
        differences(got, want)


def test_the_worst_of_several_outputs_is_named_wherever_it_is_nested() -> None:
    want = {"y": torch.ones(4), "rest": (torch.ones(4), [torch.ones(4)])}
    got = {"y": torch.ones(4), "rest": (torch.ones(4) * 1.05, [torch.ones(4) * 2])}
    with pytest.raises(ProbeMismatch, match=r"rest.*1.*0.* is 1 away"):
        check(differences(got, want), {}, tolerance=None)


def test_a_tolerance_follows_what_was_measured_within_bounds_of_the_type() -> None:
    assert tolerance_of(torch.float32, 0.0) == 2e-3
    assert tolerance_of(torch.float32, 2e-3) == 8e-3
    assert tolerance_of(torch.float32, 1.0) == 2e-2
    assert tolerance_of(torch.bfloat16, 0.0) > tolerance_of(torch.float16, 0.0) > tolerance_of(torch.float32, 0.0)


def test_the_recipes_own_tolerance_wins() -> None:
    found = differences(torch.ones(4) * 1.001, torch.ones(4))
    check(found, {}, tolerance=None)
    with pytest.raises(ProbeMismatch, match=r"0\.0001"):
        check(found, {}, tolerance=1e-4)


def test_an_error_that_is_no_number_is_no_pass() -> None:
    found = differences(torch.tensor([NAN, 1.0]), torch.tensor([NAN, 2.0]))
    with pytest.raises(ProbeMismatch):
        check(found, {}, tolerance=None)
