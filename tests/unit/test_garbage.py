"""Cycles are collected between steps, and at no other time."""

import gc
import weakref

from treepo_mcore.system.garbage import WHOLE_EVERY, Garbage


class Cycle:
    def __init__(self):
        self.me = self


def test_cycles_go_between_steps_and_not_within_them():
    garbage = Garbage()
    garbage.begin()
    try:
        young = weakref.ref(Cycle())
        several = [Cycle() for _ in range(5000)]  # far more than what makes Python collect by itself
        assert young() is not None
        garbage.step(1)
        assert young() is None
        old = weakref.ref(several[0])
        gc.collect(1)  # what lives is old now
        del several
        garbage.step(1)
        assert old() is not None
        garbage.step(WHOLE_EVERY)
        assert old() is None
    finally:
        garbage.end()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
