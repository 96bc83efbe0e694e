"""Saved trees: run.dir/trees/step_000000.jsonl, written beside the run by a thread of rank 0.

What grew behind remembered answers is beside them, in restarts_000000.jsonl.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from treepo_mcore.observe.observer import Observer, Wish
from treepo_mcore.records import Step
from treepo_mcore.tree.jsonl import write_trees
from treepo_mcore.tree.tree import Tree


class TreeWriter(Observer):
    """Writes every n-th step's trees while the next steps run; nobody waits for it before the run ends.

    A tree of 40,000 tokens takes about 50 ms, hundreds of them half a minute. A file appears when it is whole.
    """

    def __init__(self, directory: Path, every: int) -> None:
        """directory: run.dir; every: steps between two files, at least 1."""
        self.folder, self.every = directory / "trees", every
        self.thread = ThreadPoolExecutor(1, "trees")
        self.pending: list[Future[None]] = []

    def trained(self, step: Step) -> Wish:
        """Hand the trees over. Raises what went wrong with an earlier file."""
        self._look()
        if step.number % self.every == 0:
            self._submit(f"step_{step.number:06d}.jsonl", step.batch.trees)
            if step.batch.restarts:
                self._submit(f"restarts_{step.number:06d}.jsonl", step.batch.restarts)
        return Wish.NOTHING

    def close(self) -> None:
        """Wait for the last file. Raises what went wrong with it."""
        self.thread.shutdown()
        self._look()

    def _submit(self, name: str, trees: list[Tree]) -> None:
        self.pending.append(self.thread.submit(_write, self.folder / name, trees))

    def _look(self) -> None:
        for future in [future for future in self.pending if future.done()]:
            self.pending.remove(future)
            future.result()


def _write(file: Path, trees: list[Tree]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    write_trees(unfinished, trees)
    unfinished.replace(file)
