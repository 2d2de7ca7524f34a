"""A state machine over the simulated fleet: hypothesis looks for a sequence of events that breaks an invariant, and
shrinks it."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from sim.events import NAMES, happen
from sim.faults import RATES
from sim.kernel import Kernel, activate, end
from sim.observers import observed
from sim.planted import PLANTED, planted
from sim.run import begin, converge, no_garbage
from sim.seams import installed
from sim.truth import Violation
from sim.world import World


class Fleet(RuleBasedStateMachine):
    """The world of the seeds, with events and faults chosen here."""

    def __init__(self) -> None:
        super().__init__()
        self._open = ExitStack()
        self._open.enter_context(installed())
        self._open.enter_context(no_garbage())
        self.world: Any = None

    @initialize(seed=st.integers(0, 1000), kinds=st.sets(st.sampled_from(sorted(RATES)), max_size=4))
    def starts(self, seed: int, kinds: set[str]) -> None:
        run = Kernel(seed)
        activate(run)
        self.world = World(run, random.Random(f"world {seed}"), kinds)
        self._open.enter_context(observed(self.world))
        self._do(lambda: begin(self.world))

    @rule(name=st.sampled_from(sorted(NAMES)))
    def something_happens(self, name: str) -> None:
        self._do(lambda: happen(self.world, name))

    @rule(seconds=st.floats(0.1, 8.0))
    def time_passes(self, seconds: float) -> None:
        self._do(lambda: self.world.run.run(for_s=seconds))

    def _do(self, action: Callable[[], object]) -> None:
        """Fails without the traceback of what failed: it would keep the fleet beyond the end of the run."""
        failure = ""
        try:
            action()
        except Violation as error:
            failure = str(error)
        assert not failure, failure

    def teardown(self) -> None:
        try:
            if self.world is not None and self.world.run.failed is None:
                self._do(lambda: converge(self.world))
        finally:
            if self.world is not None:
                end(self.world.run)
                self.world = None
            self._open.close()


FEW = settings(
    max_examples=12, stateful_step_count=12, deadline=None, derandomize=True, database=None, print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestFleet = Fleet.TestCase
TestFleet.settings = FEW


def test_the_machine_finds_a_planted_bug() -> None:
    bug = next(bug for bug in PLANTED if bug.name == "STAGED is told as SERVING")
    with planted(bug), pytest.raises(AssertionError, match="I4"):
        run_state_machine_as_test(Fleet, settings=settings(FEW, phases=[Phase.generate]))
