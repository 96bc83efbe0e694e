"""The order in which prompts are drawn, which a resumed run continues."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple, overload

import numpy as np

from treepo_mcore.config import ConfigError, DataConfig
from treepo_mcore.data.prepared import Prompt, Prompts
from treepo_mcore.data.tokenizer import Tokenizer


def check_token_ids(prompts: Prompts, vocab: int) -> None:
    """Raise `ConfigError` for a prompt with a token that the model, of `vocab` words, has no embedding of."""
    if prompts.highest_token < vocab:
        return
    prompt = next(prompt for prompt in prompts if max(prompt.tokens) >= vocab)
    raise ConfigError(
        f"prompt {prompt.id}: token id {max(prompt.tokens)} of the tokenizer, the model's vocabulary has {vocab} words"
    )


class TrainingSets(Sequence[Prompt]):
    """Several sets of prompts as one; ids and indices say from which set a prompt is."""

    def __init__(self, sets: Mapping[str, Prompts], weights: Mapping[str, float | None]) -> None:
        """weights: of each set among the prompts that are drawn; None: the number of its prompts."""
        self._sets = dict(sets)
        self._starts = [0, *accumulate(len(one) for one in sets.values())]
        self.parts = [
            Part(range(start, start + len(one)), weights[name] or len(one))
            for start, (name, one) in zip(self._starts, sets.items(), strict=False)
        ]
        self.identity = {name: [one.digest, weights[name]] for name, one in sets.items()}

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        which = bisect_right(self._starts, index) - 1
        name = list(self._sets)[which]
        prompt = self._sets[name][index - self._starts[which]]
        return replace(prompt, id=f"{name}/{prompt.id}", index=index, set=name)


class Part(NamedTuple):
    """Prompts that are drawn in an order and epochs of their own."""

    indices: range
    weight: float


@dataclass
class _Place:
    """Where the stream stands in a part."""

    epoch: int = 0
    position: int = 0
    credit: float = 0.0  # how much it is behind its weight


class PromptStream:
    """Prompts without end: every epoch is a permutation of all, drawn from (seed, epoch), or the file's order.

    Of several parts each has its own epochs, and after any number of prompts each has had its share, but for one
    prompt. Without those that rest: a prompt whose answers all agreed is passed over in the next epoch, then, each time
    that they agree again, in twice as many, up to `longest_rest` (docs/algorithm.md 2.12).
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        shuffle: bool,
        rendering: Mapping[str, str] | None = None,
        longest_rest: int = 0,
        digest: Any = "",
        parts: Sequence[Part] = (),
    ) -> None:
        """rendering: how rows became text, see `rendering_of`; a resumed run has to have the same.

        longest_rest: in epochs. digest: of all rows, as JSON values; a resumed run has to have the same ones.
        """
        if not prompts:
            raise ValueError("prompts: expected at least one")
        self._prompts = prompts
        self._seed, self._shuffle = seed, shuffle
        self._identity = {"run.seed": seed, "data.shuffle": shuffle, "rows": digest, **(rendering or {})}
        self._parts = list(parts) or [Part(range(len(prompts)), 1.0)]
        self._places = [_Place() for _ in self._parts]
        self._orders = [self._draw(number) for number in range(len(self._parts))]
        self._returned: list[int] = []
        self._longest_rest = longest_rest
        self._rests: dict[int, list[int]] = {}  # prompt -> times in a row that its answers agreed, first epoch back

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts, returned ones first; an epoch's end does not stop it."""
        taken = [self._prompts[i] for i in self._returned[:n]]
        del self._returned[:n]
        while len(taken) < n:
            taken.append(self._prompts[self._take(self._which())])
        return taken

    def _which(self) -> int:
        """The part whose turn it is: the one that is furthest behind its weight."""
        total = math.fsum(part.weight for part in self._parts)
        for part, place in zip(self._parts, self._places, strict=True):
            place.credit += part.weight / total
        chosen = max(range(len(self._parts)), key=lambda number: self._places[number].credit)
        self._places[chosen].credit -= 1
        return chosen

    def _take(self, part: int) -> int:
        """Index of the next prompt of a part that does not rest."""
        place = self._places[part]
        while True:
            if place.position == len(self._orders[part]):
                place.epoch, place.position = place.epoch + 1, 0
                self._orders[part] = self._draw(part)
            index = int(self._orders[part][place.position])
            place.position += 1
            if self._rests.get(index, (0, 0))[1] <= place.epoch:
                return index

    def _epoch_of(self, index: int) -> int:
        return next(place.epoch for part, place in zip(self._parts, self._places, strict=True) if index in part.indices)

    def saw(self, agreed: Mapping[int, bool]) -> None:
        """Whether all answers to a prompt had the same score, by `Prompt.index`."""
        if not self._longest_rest:
            return
        for index, same in agreed.items():
            if not same:
                self._rests.pop(index, None)
                continue
            times = self._rests.get(index, [0])[0] + 1
            self._rests[index] = [times, self._epoch_of(index) + 1 + min(2 ** (times - 1), self._longest_rest)]

    @property
    def resting(self) -> int:
        """Prompts that would be passed over now."""
        return sum(back > self._epoch_of(index) for index, (_, back) in self._rests.items())

    def peek(self, n: int) -> list[Prompt]:
        """What `next` would give; the stream stays where it is."""
        before = [replace(place) for place in self._places], self._orders[:], self._returned[:]
        taken = self.next(n)
        self._places, self._orders, self._returned = before
        return taken

    @property
    def returned(self) -> int:
        """How many of the next prompts were put back."""
        return len(self._returned)

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """Let these come again, before all others."""
        self._returned = [prompt.index for prompt in prompts] + self._returned

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        return {
            "places": [asdict(place) for place in self._places],
            "returned": self._returned[:],
            "rests": [[index, *rest] for index, rest in self._rests.items()],
            "identity": self._identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises `ConfigError` when rows, seed, order or rendering are not the same.

        Rows count as they stand in their file: a chat template that writes today's date changes nothing.
        """
        if not state.keys() >= self.state_dict().keys():
            expected = ", ".join(self.state_dict())
            raise ConfigError(f"cannot resume the prompts: expected {expected}, the checkpoint has {', '.join(state)}")
        saved = state["identity"]
        for key, ours in self._identity.items():
            if saved.get(key) != ours:
                raise ConfigError(
                    f"cannot resume the prompts: {WORDS.get(key, key)}: found {ours}, the checkpoint has "
                    f"{saved.get(key)}; put it back, or start a new run.dir"
                )
        self._places = [_Place(**place) for place in state["places"]]
        self._returned = list(state["returned"])
        self._rests = {index: [times, back] for index, times, back in state["rests"]}
        self._orders = [self._draw(number) for number in range(len(self._parts))]

    def _draw(self, part: int) -> np.ndarray:
        indices = self._parts[part].indices
        if not self._shuffle:
            return np.asarray(indices)
        key = [self._seed, self._places[part].epoch, *([part] if part else [])]
        return np.random.default_rng(key).permutation(len(indices)) + indices.start


WORDS = {"rows": "rows and weights of data.train, by hash", "template": "chat template of the tokenizer, by hash"}


def rendering_of(config: DataConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """What turns a row into text, besides the row."""
    settings = {
        f"data.{name}": json.dumps(getattr(config, name))
        for name in ("chat_template", "chat_template_kwargs", "system_prompt")
    }
    return settings | {"template": hashlib.sha256(json.dumps(tokenizer.template).encode()).hexdigest()[:16]}
