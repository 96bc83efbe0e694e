"""Traces of chosen steps by torch's profiler, with the step's parts as ranges (of NVTX, too, for Nsight Systems)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from treepo_mcore.observe.observer import Observer, Wish
from treepo_mcore.records import Step


class Profiler(Observer):
    """One trace a step, ``step_000003_rank_0.json.gz``: for Perfetto, TensorBoard or chrome://tracing.

    A trace begins with the first part of its step: with an evaluation or a checkpoint that comes before it.
    """

    def __init__(self, folder: Path, steps: Sequence[int], rank: int) -> None:
        self.folder, self.steps, self.rank = folder, set(steps), rank
        self.trace: profile | None = None
        self.range: record_function | None = None

    def part(self, step: int, name: str) -> None:
        """A range; before the first one of a step that is traced the trace begins."""
        if self.trace is None and step in self.steps:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.trace = profile(activities=[ProfilerActivity.CPU, *cuda])
            self.trace.start()
        if self.trace is not None:
            self._leave()
            self.range = record_function(name)
            self.range.__enter__()
            if torch.cuda.is_available():
                torch.cuda.nvtx.range_push(name)

    def trained(self, step: Step) -> Wish:
        """The trace is written."""
        if self.trace is not None:
            self._leave()
            self.trace.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.trace.export_chrome_trace(str(self.folder / f"step_{step.number:06d}_rank_{self.rank}.json.gz"))
            self.trace = None
        return Wish.NOTHING

    def _leave(self) -> None:
        """The range that is open."""
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None
            if torch.cuda.is_available():
                torch.cuda.nvtx.range_pop()
