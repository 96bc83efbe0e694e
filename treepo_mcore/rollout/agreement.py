"""The ranks of one engine in step: the first one orders, all compare what they saw."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.distributed as dist

from treepo_mcore.engine.protocol import Chunk

VERDICTS = 32  # on first answers, at most, in one message


class Next(IntEnum):
    """What follows a prompt's first answers."""

    END = 0  # nothing: its tree is complete
    REST = 1  # the rest of its tree
    CONTRAST = 2  # answers behind a remembered one


Verdict = tuple[int, Next]  # a prompt's number, and what follows


class Word(NamedTuple):
    """What the first rank of an engine knows, and its other ranks have to."""

    number: int | None = None  # of the prompt to start
    closed: bool = False
    held_back: bool = False
    enough: bool = False
    verdicts: Sequence[Verdict] = ()  # not more than `VERDICTS`


class Agreement:
    """One call for everything that the ranks of an engine exchange, so that no two different calls can meet.

    A rank that went another way shows another digest. The ranks compare theirs behind every engine step, because in the
    next one they would hand batches of different sizes to the collectives of the model: a hang with NCCL, with gloo
    the end of the process without a word.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """group: the engine's ranks, None for one. It should have a short timeout."""
        self._group = group
        self._digest = 0
        self._step = 0

    @property
    def alone(self) -> bool:
        """Whether the engine has one rank."""
        return self._group is None

    def saw(self, chunks: Sequence[Chunk]) -> None:
        """Remember the tokens of an engine step."""
        self._step += 1
        if self._group is None:
            return
        text = " ".join([f"{chunk.request} {chunk.finish}" for chunk in chunks])
        tokens = array("q", [token for chunk in chunks for token in chunk.tokens])
        self._digest = zlib.crc32(tokens.tobytes(), zlib.crc32(text.encode(), self._digest))

    def order(self, word: Word) -> Word:
        """What the engine's first rank passed in, on all of its ranks. Raises RuntimeError where they differ."""
        if self._group is None:
            return word
        number, *flags, verdicts = word
        told = [len(Next) * prompt + then for prompt, then in verdicts] + [-1] * (VERDICTS - len(verdicts))
        mine = torch.tensor([self._digest, -1 if number is None else number, *map(int, flags), *told])
        rows = [torch.empty_like(mine) for _ in range(self._group.size())]
        try:
            dist.all_gather(rows, mine, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"engine step {self._step} of this phase: a rank of this engine is gone or went another way: {error}"
            ) from error
        digests = [int(row[0]) for row in rows]
        if len(set(digests)) > 1:
            raise RuntimeError(
                f"engine step {self._step} of this phase: the ranks of this engine sampled different tokens: {digests}"
            )
        first = rows[0].tolist()
        agreed = [(value // len(Next), Next(value % len(Next))) for value in first[5:] if value >= 0]
        closed, held_back, enough = map(bool, first[2:5])
        return Word(None if first[1] < 0 else first[1], closed, held_back, enough, agreed)
