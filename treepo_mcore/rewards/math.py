r"""Is the last \boxed{...} of a response equal to the reference answer?

Most answers are decided by comparing strings (`quick_verdict`, microseconds). The others are brought into one spelling
(`notation.py`) and compared as mathematics (`compare.py`), which takes milliseconds, and now and then for ever: run it
under a time limit, see `pool.py`.
"""

from __future__ import annotations

import re
from typing import Any

from treepo_mcore.rewards.compare import readable, same
from treepo_mcore.rewards.notation import one_spelling, without_thousands

_BOXES = re.compile(r"\\(?:boxed|fbox)\s*\{")
_JOINT = re.compile(r"(?:[\s$,;.]|\\[()\[\],;! ]|\\q?quad|\band\b|\bor\b|\\text\{\s*(?:and|or)\s*\}|[a-zA-Z]\s*=)*")
_DOLLAR = re.compile(r"\\?\$")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # all but a space between digits: "1 1/2" is not "11/2"
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # a backslash takes the brace behind it
LONGER, LONG, DEEP = 10, 1_000, 20  # times the answer's characters, more characters, more braces in each other


def math_reward(response: str, answer: str, prompt: str, row: dict[str, Any]) -> float:
    """1.0 when the last complete boxes of `response` equal `answer`, else 0.0. `prompt` and `row` are not looked at.

    Has no time limit of its own.
    """
    verdict = quick_verdict(response, answer)
    if verdict is not None:
        return float(verdict)
    found = final_answer(response)
    return float(found is not None and same(one_spelling(found), one_spelling(final_answer(answer) or answer)))


def quick_verdict(response: str, answer: str) -> bool | None:
    """What comparing strings can tell: equal, not equal, or None, undecided.

    Not equal are: no box, two different integers, and what is so much longer or deeper than the answer that no parser
    should have to read it.
    """
    found = final_answer(response)
    if found is None:
        return False
    left, right = normalise(found), normalise(answer)
    if not left or not right or left == "nan":  # which is no number, not even itself
        return False
    if left == right or _stripped(found) == _stripped(answer):
        return True
    if _INTEGER.fullmatch(left) and _INTEGER.fullmatch(right):
        return int(left) == int(right)
    too_much = len(left) > LONGER * len(right) + LONG or _depth(left) > _depth(right) + DEEP
    return False if too_much else None


def _depth(text: str) -> int:
    """Braces within braces, at most."""
    depth = deepest = 0
    for match in _BRACES.finditer(text):
        depth += (match[0] == "{") - (match[0] == "}")
        deepest = max(deepest, depth)
    return deepest


def final_answer(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...} that closes, \{ and \} passed over; None without one.

    Of boxes with nothing but "and", commas and the like between them, all that differ, as a list.
    """
    boxes: list[tuple[int, int, str]] = []  # from the last one on: where it begins, where it ends, what is in it
    closings = _closings(text)
    for match in reversed(list(_BOXES.finditer(text))):
        if match.end() not in closings:
            continue
        content = text[match.end() : closings[match.end()]]
        end = closings[match.end()] + 1
        if boxes and (end > boxes[-1][0] or not _JOINT.fullmatch(text, end, boxes[-1][0])):
            break
        boxes.append((match.start(), end, content))
    contents = list(dict.fromkeys(content for _, _, content in reversed(boxes)))
    return ", ".join(contents) if contents else None


def _closings(text: str) -> dict[int, int]:
    """Where a brace that opens is closed: the position behind the one, the position of the other. One pass."""
    found, opened = {}, []
    for match in _BRACES.finditer(text):
        if match[0] == "{":
            opened.append(match.end())
        elif match[0] == "}" and opened:
            found[opened.pop()] = match.start()
    return found


def boxed_answer(text: str) -> str | None:
    """What `final_answer` finds, normalised; None where that is nothing."""
    found = final_answer(text)
    return None if found is None else normalise(found) or None


def normalise(text: str) -> str:
    """Without dollar signs, spaces (but between digits), trailing dots, and the thousands commas of a whole number."""
    return _stripped(without_thousands(text))


def _stripped(text: str) -> str:
    return _SPACE.sub("", _DOLLAR.sub("", text)).rstrip(".")


def answer_is_readable(response: str, answer: str, prompt: str, row: dict[str, Any]) -> float:
    """1.0 when another spelling than its own can equal `answer`, else 0.0. Nothing else is looked at."""
    return float(readable(final_answer(answer) or answer))
