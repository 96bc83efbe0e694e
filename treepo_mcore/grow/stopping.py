r"""When a path ends besides length and depth (docs/algorithm.md 3).

The released code looks at the newest segment only, so it misses a box across a boundary, and it keeps what follows
the box up to the boundary. Here every rule looks at the response token by token, whatever the boundaries and chunks:
the token that fires is the last one kept. EOS is the engine's finish reason, so any number of EOS ids works.
The paper gives no ablation of these rules; its script ends at a box followed by EOS.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

from treepo_mcore.config import StoppingConfig
from treepo_mcore.tree.tree import BOXED, EOS, FINISHED, REPETITION

# A box opens, or has begun to at the end of a text: the spellings of `rewards.math.final_answer`.
OPENS = re.compile(r"\\(?:boxed|fbox)\s*\{")
BEGUN = re.compile(r"\\(?:b|bo|box|boxe|boxed\s*|f|fb|fbo|fbox\s*)?\Z")
REPETITION_STRIDE = 16  # tokens between looks for repetition: a path may end that much later, at any chunk size


class Watch(Protocol):
    """The rules' memory of one running path."""

    def feed(self, tokens: Sequence[int]) -> tuple[int, str] | None:
        """Take the next tokens; (tokens kept, reason) where the path ends among them. Not called again then."""


class Stopper(Protocol):
    """The slot for a policy."""

    def watch(self, response: Sequence[int]) -> Watch:
        """Start on a path whose response so far is `response`; it did not end there."""

    def eos_reason(self, response: Sequence[int]) -> str:
        """The reason of a path that the model ended itself; `response` includes the EOS token."""


class BoxDetector:
    r"""Finds the token that closes a ``\boxed{...}``, braces nested to any depth.

    Each token id is decoded once, alone. Byte-level and SentencePiece tokenizers keep ASCII text exact that way, and
    a box's frame is ASCII; so the state is a brace count or an unfinished ``\boxed{``, and no text is decoded again.
    One detector serves all prompts of a tokenizer.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        """decode: the text of tokens as it stands in the midst of a response, with its leading space."""
        self._decode = decode
        self._pieces: dict[int, str] = {}
        self._opens: dict[int, bool] = {}  # token may begin a box
        self._braces: dict[int, bool] = {}  # token changes the brace count, or how the next character is read

    def scan(self, tokens: Sequence[int], state: BoxState) -> int | None:
        """Advance `state` over `tokens`; the index of the token that closes a box, if one does."""
        opens, braces = self._opens, self._braces
        for index, token in enumerate(tokens):
            if token not in opens:
                self._learn(token)
            if state.nesting:
                if (braces[token] or state.escaped) and state.inside(self._pieces[token]):
                    return index
            elif (state.begun or opens[token]) and state.outside(state.begun + self._pieces[token]):
                return index
        return None

    def closes(self, tokens: Sequence[int]) -> bool:
        """Whether the text of `tokens` has a complete box."""
        return self.scan(tokens, BoxState()) is not None

    def _learn(self, token: int) -> None:
        piece = self._decode([token])
        self._pieces[token] = piece
        self._opens[token] = bool(OPENS.search(piece) or BEGUN.search(piece))
        self._braces[token] = any(character in piece for character in "{}\\")


class BoxState:
    """Where a path stands: inside a box (`nesting` > 0), or behind the start of ``\\boxed{`` (`begun`)."""

    __slots__ = ("begun", "escaped", "nesting")

    def __init__(self) -> None:
        self.nesting = 0
        self.begun = ""
        self.escaped = False  # behind a backslash inside a box: the next character is passed over

    def inside(self, text: str) -> bool:
        r"""Count braces, but not \{ and \} (like `rewards.math.final_answer`); True when the box closes in `text`."""
        for character in text:
            if self.escaped:
                self.escaped = False
            elif character == "\\":
                self.escaped = True
            elif character == "{":
                self.nesting += 1
            elif character == "}":
                self.nesting -= 1
                if not self.nesting:
                    return True
        return False

    def outside(self, text: str) -> bool:
        """Look for a box; True when one opens and closes in `text`."""
        opened = OPENS.search(text)
        if opened is None:
            begun = BEGUN.search(text)
            self.begun = begun.group() if begun else ""
            return False
        self.begun = ""
        self.nesting, self.escaped = 1, False
        return self.inside(text[opened.end() :])


class RuleStopper:
    """The configured rules."""

    def __init__(self, config: StoppingConfig, box: BoxDetector | None) -> None:
        """`box` may be None only where the configuration does not look for boxes."""
        if box is None and config.boxed != "none":
            raise ValueError(f"rollout.tree.stopping.boxed: {config.boxed} needs a BoxDetector")
        self._config = config
        self._box_ends = box if config.boxed == "boxed" else None
        self._box_marks = box if config.boxed == "boxed_and_eos" else None

    def watch(self, response: Sequence[int]) -> RuleWatch:
        """See `Stopper`."""
        return RuleWatch(self._config, self._box_ends, response)

    def eos_reason(self, response: Sequence[int]) -> str:
        """See `Stopper`."""
        return FINISHED if self._box_marks and self._box_marks.closes(response) else EOS


class RuleWatch:
    """Box and repetition on one path; a box wins where both fire on a token."""

    __slots__ = ("_box", "_config", "_due", "_recent", "_state", "_window")

    def __init__(self, config: StoppingConfig, box: BoxDetector | None, response: Sequence[int]) -> None:
        self._config = config
        self._box = box
        self._state = BoxState()
        if box is not None:
            box.scan(response, self._state)
        count = config.repetition_count
        self._window = max(count * config.repetition_period, config.repetition_min_tokens) if count else 0
        self._recent = array("i", response[-self._window :] if count else [])
        self._due = REPETITION_STRIDE - len(response) % REPETITION_STRIDE  # tokens until the next look

    def feed(self, tokens: Sequence[int]) -> tuple[int, str] | None:
        """See `Watch`."""
        if self._box is not None:
            closed = self._box.scan(tokens, self._state)
            if closed is not None:
                earlier = self._repeats(tokens[:closed])
                return (earlier, REPETITION) if earlier else (closed + 1, BOXED)
        if self._window:
            repeated = self._repeats(tokens)
            if repeated:
                return repeated, REPETITION
        return None

    def _repeats(self, tokens: Sequence[int]) -> int:
        # The number of `tokens` after which the path repeats itself, 0 if it does not.
        if not self._window:
            return 0
        recent, taken = self._recent, 0
        while len(tokens) - taken >= self._due:
            recent.extend(tokens[taken : taken + self._due])
            taken += self._due
            self._due = REPETITION_STRIDE
            del recent[: -self._window]
            if self._periodic():
                return taken
        recent.extend(tokens[taken:] if taken else tokens)
        self._due -= len(tokens) - taken
        return 0

    def _periodic(self) -> bool:
        recent, config = self._recent, self._config
        last = recent[-1]
        for period in range(1, config.repetition_period + 1):
            span = max(config.repetition_count * period, config.repetition_min_tokens)
            if span > len(recent):
                return False
            if recent[-1 - period] == last and recent[period - span :] == recent[-span:-period]:
                return True
        return False
