"""On every rank: the converter with a command line."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


def run(commands: list[list[str]]) -> None:
    """One after the other, in groups of their own."""
    from megatron.core import parallel_state

    for command in commands:
        parallel_state.destroy_model_parallel()
        sys.argv = [str(TOOL), *command]
        runpy.run_path(str(TOOL), run_name="__main__")
