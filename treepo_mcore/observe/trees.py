"""Saved trees: run.dir/trees/step_000000/, a parquet file of each engine, written beside the run by threads.

What grew behind remembered answers is beside them, in restarts_000000/.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from treepo_mcore.observe.observer import Observer, Wish
from treepo_mcore.records import Step
from treepo_mcore.system.placement import Placement
from treepo_mcore.tree import parquet
from treepo_mcore.tree.tree import Tree


class TreeWriter(Observer):
    """Writes what an engine sampled in every n-th step while the next ones run; nobody waits for it before the end.

    The first rank of each engine makes one. A file appears when it is whole.
    """

    def __init__(self, directory: Path, every: int, placement: Placement) -> None:
        """directory: run.dir; every: steps between two folders, at least 1."""
        self.folder, self.every = directory / "trees", every
        self.engine, self.reports = placement.engine or 0, placement.reports
        self.thread = ThreadPoolExecutor(1, "trees")
        self.pending: list[Future[None]] = []

    def start(self, step: int) -> None:
        """Drop what the run will repeat: the same engines need not write it again."""
        for folder in self.folder.glob("*_??????") if self.reports else ():
            if int(folder.name.rpartition("_")[2]) >= step:
                shutil.rmtree(folder)

    def trained(self, step: Step) -> Wish:
        """Hand the trees over. Raises what went wrong with an earlier file."""
        self._look()
        if step.number % self.every == 0:
            own = step.batch.own
            self._submit(f"step_{step.number:06d}", [tree for tree in own if not tree.replayed])
            if step.batch.restarts:
                self._submit(f"restarts_{step.number:06d}", [tree for tree in own if tree.replayed])
        return Wish.NOTHING

    def close(self) -> None:
        """Wait for the last file. Raises what went wrong with it."""
        self.thread.shutdown()
        self._look()

    def _submit(self, name: str, trees: list[Tree]) -> None:
        self.pending.append(self.thread.submit(_write, self.folder / name / f"engine_{self.engine:05d}.parquet", trees))

    def _look(self) -> None:
        for future in [future for future in self.pending if future.done()]:
            self.pending.remove(future)
            future.result()


def _write(file: Path, trees: list[Tree]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    parquet.write(unfinished, trees)
    unfinished.replace(file)
