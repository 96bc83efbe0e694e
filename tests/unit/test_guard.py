"""Guards that look at a step's numbers."""

from types import SimpleNamespace

import pytest

from treepo_mcore.observe.guard import BadNumbersError, EntropyGuard, SkippedGuard
from treepo_mcore.observe.observer import Wish


def step(number, skipped=(), **values):
    updates = [{"skipped": float(bad), "grad_norm": float("nan") if bad else 1.0} for bad in skipped]
    return SimpleNamespace(number=number, updates=updates, values=values)


def test_skipped_updates_in_a_row_over_steps():
    guard = SkippedGuard(2)
    assert guard.trained(step(0, [1, 1, 0, 1])) is Wish.NOTHING
    assert guard.trained(step(1)) is Wish.NOTHING  # no prompt was informative
    assert guard.trained(step(2, [1])) is Wish.NOTHING
    with pytest.raises(
        BadNumbersError, match=r"step 3: the gradient's norm is nan, 3 times in a row, .*max_skipped = 2"
    ):
        guard.trained(step(3, [1]))
    assert guard.trained(step(4, [1, 1])) is Wish.NOTHING  # behind a return to a checkpoint it counts anew


def test_no_skipped_update_is_allowed():
    with pytest.raises(BadNumbersError, match="1 times in a row"):
        SkippedGuard(0).trained(step(0, [0, 1]))


def test_a_policy_that_is_certain_of_everything():
    guard = EntropyGuard(0.05)
    assert guard.trained(step(0, **{"actor/entropy": 0.06})) is Wish.NOTHING
    assert guard.trained(step(1)) is Wish.NOTHING
    with pytest.raises(BadNumbersError, match=r"step 2: the policy's entropy is 0.0400 .* actor.min_entropy = 0.05"):
        guard.trained(step(2, **{"actor/entropy": 0.04}))
