r"""Is the last \boxed{...} of a response equal to the reference answer?

Most answers are decided by comparing strings (`quick_verdict`, microseconds); the others go to math-verify, which
compares them as mathematics (milliseconds, and now and then for ever: run it under a time limit, see `pool.py`).
"""

from __future__ import annotations

import logging
import re
from typing import Any

_BOX = "\\boxed{"
_BOXES = re.compile(r"\\(?:boxed|fbox)\s*\{")
_DOLLAR = re.compile(r"\\?\$")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # all but a space between digits: "1 1/2" is not "11/2"
# One whole number with thousands commas, as TeX may write them too; in a list, a point or a set commas separate.
_THOUSANDS = re.compile(r"\s*(?:\\?\$)?[+-]?\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+(?:\.\d+)?\s*(?:\\?\$)?\.?\s*")
_COMMA = re.compile(r"\{,\}|\\,|,")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def math_reward(response: str, answer: str, prompt: str, row: dict[str, Any]) -> float:
    """1.0 when the last complete box of `response` equals `answer`, else 0.0. `prompt` and `row` are not looked at.

    Has no time limit of its own.
    """
    verdict = quick_verdict(response, answer)
    if verdict is not None:
        return float(verdict)
    found = extract_boxed(response)
    return float(found is not None and _equal_as_math(found, answer))


def quick_verdict(response: str, answer: str) -> bool | None:
    """What comparing strings can tell: equal, not equal (no box, or two different integers), or None, undecided."""
    found = extract_boxed(response)
    if found is None:
        return False
    left, right = normalise(found), normalise(answer)
    if not left or not right:
        return False
    if left == right or _stripped(found) == _stripped(answer):
        return True
    if _INTEGER.fullmatch(left) and _INTEGER.fullmatch(right):
        return int(left) == int(right)
    return None


def extract_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...} that closes, \{ and \} passed over; None without one."""
    for match in reversed(list(_BOXES.finditer(text))):
        content = _inside(text, match.end())
        if content is not None:
            return content
    return None


def _inside(text: str, start: int) -> str | None:
    """What lies between an open brace before `start` and the one that closes it; None where none does."""
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position]
        position += 1
    return None


def boxed_answer(text: str) -> str | None:
    """What `extract_boxed` finds, normalised; None where that is nothing."""
    found = extract_boxed(text)
    return None if found is None else normalise(found) or None


def normalise(text: str) -> str:
    """Without dollar signs, spaces (but between digits), trailing dots, and the thousands commas of a whole number."""
    if _THOUSANDS.fullmatch(text):
        text = _COMMA.sub("", text)
    return _stripped(text)


def _stripped(text: str) -> str:
    return _SPACE.sub("", _DOLLAR.sub("", text)).rstrip(".")


def _equal_as_math(found: str, answer: str) -> bool:
    # Imported here: it brings sympy along (0.5 s), which the process that only compares strings does not need.
    from math_verify import parse, verify

    # No time limits inside math-verify: they use SIGALRM, so they fail outside the main thread and would switch off
    # the alarm of the pool's worker. It warns once about that.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    gold = parse(f"{_BOX}{answer}}}", parsing_timeout=None)
    target = parse(f"{_BOX}{found}}}", parsing_timeout=None)
    return bool(verify(gold, target, timeout_seconds=None))
