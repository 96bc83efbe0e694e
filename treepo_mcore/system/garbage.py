"""Python's collector of cycles: on all ranks at the same place, between two steps.

Left to itself it strikes each rank at another moment, and in a collective all wait for the one that it struck.
"""

from __future__ import annotations

import gc

WHOLE_EVERY = 50  # steps between two looks at everything; in between the young objects are looked at


class Garbage:
    """Takes the collector over for the length of a run."""

    def begin(self) -> None:
        """What exists now stays, and is not looked at again."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def step(self, number: int) -> None:
        """Between two steps."""
        gc.collect(2 if number % WHOLE_EVERY == 0 else 1)

    def end(self) -> None:
        """Python decides again."""
        gc.unfreeze()
        gc.enable()
