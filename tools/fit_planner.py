"""Fit the planner's constants on two published runs and print them, with the table of all runs.

    python tools/fit_planner.py

Each constant is solved for so that one published number comes out exactly:

    UPDATE_EFFICIENCY     training, Llama-3.1-8B on 8 H100
    LOG_PROB_EFFICIENCY   log-probs, the same run
    TENSOR_SECONDS        refit, the same run
    STEP_SECONDS          what its total has beside its phases
    ENGINE_LAYER_SECONDS  generation, the same run, and
    ENGINE_REQUEST_SECONDS the total of Qwen3-32B on 32 H100, together

The result is copied into treepo_mcore/plan/constants.py by hand; a test compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from treepo_mcore.plan import constants
from treepo_mcore.plan.references import EIGHT, PHASES, THIRTY_TWO, comparison, predict

NAMES = (
    "UPDATE_EFFICIENCY",
    "LOG_PROB_EFFICIENCY",
    "TENSOR_SECONDS",
    "STEP_SECONDS",
    "ENGINE_LAYER_SECONDS",
    "ENGINE_REQUEST_SECONDS",
)


def fit() -> dict[str, float]:
    """The constants, which are then in force in this process."""
    measured = EIGHT.measured
    _solve("UPDATE_EFFICIENCY", 0.05, 1.0, measured["update"], lambda: predict(EIGHT)["update"])
    _solve("LOG_PROB_EFFICIENCY", 0.05, 1.0, measured["log_probs"], lambda: predict(EIGHT)["log_probs"])
    _solve("TENSOR_SECONDS", 1e-4, 1.0, measured["refit"], lambda: predict(EIGHT)["refit"])
    constants.STEP_SECONDS = measured["total"] - sum(measured[phase] for phase in PHASES if phase != "total")

    def total() -> float:
        _solve("ENGINE_LAYER_SECONDS", 1e-7, 1e-2, measured["generation"], lambda: predict(EIGHT)["generation"])
        return predict(THIRTY_TWO)["total"]

    _solve("ENGINE_REQUEST_SECONDS", 1e-7, 1e-3, THIRTY_TWO.measured["total"], total)
    total()
    return {name: getattr(constants, name) for name in NAMES}


def _solve(name: str, low: float, high: float, target: float, value: Callable[[], float]) -> None:
    """Bisection in the constant's logarithm; `value` must be monotonous in it."""

    def at(constant: float) -> float:
        setattr(constants, name, constant)
        return value() - target

    rising = at(high) > at(low)
    for _ in range(24):  # to a millionth
        middle = math.sqrt(low * high)
        if (at(middle) > 0) == rising:
            high = middle
        else:
            low = middle
    at(math.sqrt(low * high))


def print_table() -> None:
    """Every run and phase: measured, measured again by a user, predicted, error."""
    print(f"{'run':39}{'phase':12}{'measured':>9}{'again':>7}{'predicted':>11}{'error':>7}")
    for row in comparison():
        measured = "" if row["measured"] is None else f"{row['measured']:.1f}"
        again = "" if row["again"] is None else f"{row['again']:.0f}"
        error = "" if row["error"] is None else f"{row['error']:+.0%}"
        name = row["run"] + (" (fit)" if row["fitted"] else "")
        print(f"{name:39}{row['phase']:12}{measured:>9}{again:>7}{row['predicted']:>11.1f}{error:>7}")


def main() -> None:
    """Print constants and table."""
    for name, value in fit().items():
        print(f"{name} = {value:.4g}")
    print()
    print_table()


if __name__ == "__main__":
    main()
