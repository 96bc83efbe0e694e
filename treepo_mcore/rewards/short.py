r"""Rewards of short answers that text alone decides: the same text, a letter, a number; and the form of the whole.

The answer is looked for in this order: what the option `pattern` finds, the last \boxed{...}, the last
<answer>...</answer>, what stands behind the last "####" or "answer is", the last line.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from treepo_mcore.rewards.math import final_answer
from treepo_mcore.rewards.notation import number, one_spelling

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_TOLD = re.compile(r"(?:####|\banswer\s*(?:is\b|:)\s*:?)[ \t]*(\S[^\n]*)", re.IGNORECASE)
_LETTER = re.compile(r"[\s\"'*(\[{$]*([A-Z])(?:[\s\"'*)\]}$.:,;]|$)")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?:/\d+)?")
_DECORATION = re.compile(r"[\s$€£*]+|\\[$%]|%$|\.$")


def exact(
    response: str, answer: str, prompt: str, row: dict[str, Any], *, pattern: str = "", ignore_case: bool = False
) -> float:
    """1.0 where the answer found is the reference answer; runs of white space count as one space."""
    found, expected = (" ".join(text.split()) for text in (found_answer(response, pattern), answer))
    return float(found.casefold() == expected.casefold() if ignore_case else found == expected)


def choice(
    response: str, answer: str, prompt: str, row: dict[str, Any], *, pattern: str = "", letters: str = "ABCDEFGHIJ"
) -> float:
    """1.0 where the answer found begins with the right letter, as in B, (B), **B.** or "B: because".

    answer: a letter, or the number of the choice, from 0 (as MMLU has it). Raises ValueError for another one.
    """
    expected = answer.strip().strip("().").upper()
    if expected.isdecimal() and int(expected) < len(letters):
        expected = letters[int(expected)]
    if len(expected) != 1 or expected not in letters:
        raise ValueError(f"expected one of the letters {letters} or a number from 0, found {answer!r}")
    return float(letter_of(found_answer(response, pattern)) == expected)


def numeric(
    response: str,
    answer: str,
    prompt: str,
    row: dict[str, Any],
    *,
    pattern: str = "",
    relative: float = 1e-6,
    absolute: float = 0.0,
) -> float:
    """1.0 where the answer found is a number within max(relative x |answer|, absolute) of the reference answer.

    Of an answer with words around it the last number counts: "about 3.5 km". Raises ValueError where the reference
    answer is no number.
    """
    expected = read_number(answer)
    if expected is None:
        raise ValueError(f"expected a number as the answer, found {answer!r}")
    found = read_number(found_answer(response, pattern))
    if found is None:
        return 0.0
    return float(abs(found - expected) <= max(Fraction(relative) * abs(expected), Fraction(absolute)))


def format_reward(
    response: str,
    answer: str,
    prompt: str,
    row: dict[str, Any],
    *,
    pattern: str = r"\s*<think>.*</think>\s*<answer>.*</answer>\s*",
) -> float:
    """1.0 where the whole response matches the regular expression, in which a dot is any character."""
    return float(re.fullmatch(pattern, response, re.DOTALL) is not None)


def found_answer(response: str, pattern: str) -> str:
    """Where the response says its answer; with a `pattern` its last match's first group, or the whole match."""
    if pattern:
        matches = list(re.finditer(pattern, response, re.DOTALL))
        return (matches[-1][1 if matches[-1].re.groups else 0] or "").strip() if matches else ""
    boxed = final_answer(response)
    if boxed is not None:
        return boxed.strip()
    for known in (_TAGGED, _TOLD):
        if found := known.findall(response):
            return str(found[-1]).strip()
    lines = response.strip().splitlines()
    return lines[-1].strip() if lines else ""


def letter_of(text: str) -> str | None:
    """The letter that a text begins with, alone or before a bracket or punctuation."""
    match = _LETTER.match(text)
    return match[1] if match else None


def read_number(text: str) -> Fraction | None:
    """The number that a text is, else the last one in it; None without one."""
    whole = number(one_spelling(_DECORATION.sub("", text)))
    if whole is not None:
        return whole
    found = [match for match in _NUMBER.findall(text) if re.search(r"\d", match)]
    last = found[-1].replace(",", "") if found else ""
    try:
        return Fraction(last) if last else None
    except (ValueError, ZeroDivisionError):
        return None
