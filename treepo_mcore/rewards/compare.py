r"""Are two answers the same? In the order of a teacher: as text, as a choice, as a list or an interval, as a number.

`same` takes both in one spelling (`notation.one_spelling`). What is left at the end, expressions, goes to math-verify;
but numbers are compared here, relatively, because it rounds to six decimals.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from treepo_mcore.rewards.notation import number, one_spelling, without_end
from treepo_mcore.rewards.units import split_unit

CLOSE = 1e-9  # relative, where one of two numbers is rounded to a decimal
EQUAL = 1e-30  # relative, of two that are not
_DIGITS = 50  # with which numbers are evaluated

_CHOICE = re.compile(r"(?:\\text)?\{?\(?([A-J])\)?\}?")  # alone
# Before a value: (B) 7, \text{(B)} 7, B. 7, B: 7
_CHOICE_AND = re.compile(r"(?:\\text\{\s*)?(?:\(([A-J])\)|([A-J])[.):])\s*\}?\s*(?=\S)(.+)")
_NAME = r"(?:[a-zA-Z]|\\(?!pi|infty|frac|sqrt|text|emptyset)[a-z]+|[A-Z]{2,3})(?:_\{?\w+\}?)?'?"
_ASSIGNED = re.compile(rf"\s*({_NAME}(?:\([a-zA-Z]\))?)\s*(?:=|\\in(?![a-z]))\s*(.+)")
_BASED = re.compile(r"\(?([0-9A-Z]+|[0-9]*\\text\{[A-Z]+\})\)?_\{?(?:\\text\{)?\(?(\d+)\)?\}*")
_RELATION = re.compile(r"(<|>|\\(?:le|ge|ne)(?![a-z]))\s*")
_BUILDER = re.compile(rf"\\\{{\s*{_NAME}\s*(?::|\\mid|\|)\s*(.*)\\\}}")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
_FUNCTIONS = re.compile(r"sin|cos|tan|cot|sec|csc|log|ln|exp|gcd|lcm|max|min|mod|det|arcsin|arccos|arctan")
_OPEN, _CLOSE = ("(", "[", "{", r"\{", r"\begin"), (")", "]", "}", r"\}", r"\end")
_TOKEN = re.compile(r"\\text\{\s*(?:and|or)\s*\}|\s(?:and|or)\s|\\[{}]|\\[a-zA-Z]+|[()\[\]{}]|[,;]|.", re.DOTALL)
_MAXIMUM = 64  # elements of a list whose order is free


def same(left: str, right: str, nested: bool = False) -> bool:
    """Whether an answer equals the reference, `right`, both in one spelling; nested: inside a collection.

    The two are not alike: a reference may be rounded, an answer to an exact reference may not. Has no time limit.
    """
    left, right = without_end(left.strip()), without_end(right.strip())
    if not left or not right:
        return False
    if _squeezed(left) == _squeezed(right):
        return True
    for stage in _STAGES:
        verdict = stage(left, right, nested)
        if verdict is not None:
            return verdict
    return as_expressions(left, right)


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _choices(left: str, right: str, nested: bool) -> bool | None:
    """A letter alone is a choice; before a value it names it."""
    if nested:
        return None
    (letter, value), (other, its) = _letter_and_value(left), _letter_and_value(right)
    if letter and other and letter != other:
        return False
    if (letter is None and other is None) or (value is None and its is None):
        return None
    if value is None or its is None:
        return letter is not None and letter == other
    return same(value, its)


def _letter_and_value(text: str) -> tuple[str | None, str | None]:
    if alone := _CHOICE.fullmatch(text):
        return alone[1], None
    if both := _CHOICE_AND.fullmatch(text):
        return both[1] or both[2], both[3]
    return None, text


def _assigned(left: str, right: str, nested: bool) -> bool | None:
    """x = 5 is 5, and is not y = 5."""
    one, two = (_ASSIGNED.fullmatch(text) if len(_split(text)[0]) == 1 else None for text in (left, right))
    if one and two:
        named = _squeezed(one[1]) == _squeezed(two[1])
        return same(one[2], two[2], nested) if named else None  # equations in other shapes are expressions
    match = one or two
    if match is None or "=" in match[2] or "=" in (right if one else left):
        return None
    return same(match[2], right if one else left, nested)


def _plus_minus(left: str, right: str, nested: bool) -> bool | None:
    if not any(re.search(r"\\(?:pm|mp)(?![a-z])", text) for text in (left, right)):
        return None
    return same(_both_signs(left), _both_signs(right), nested)


def _both_signs(text: str) -> str:
    r"""a \pm b as a list of two."""
    if not re.search(r"\\(?:pm|mp)(?![a-z])", text):
        return text
    upper = re.sub(r"\\mp(?![a-z])\s*", "-", re.sub(r"\\pm(?![a-z])\s*", "+", text))
    lower = re.sub(r"\\mp(?![a-z])\s*", "+", re.sub(r"\\pm(?![a-z])\s*", "-", text))
    return f"{upper.strip().removeprefix('+')}, {lower.strip().removeprefix('+')}"


def _relations(left: str, right: str, nested: bool) -> bool | None:
    """Inequalities of one variable are intervals."""
    one, two = as_interval(left), as_interval(right)
    if one is None and two is None:
        return None
    if one and two and one[0] != two[0]:
        return False
    return same(one[1] if one else left, two[1] if two else right, nested)


def as_interval(text: str) -> tuple[str, str] | None:
    r"""Variable and interval of an inequality: x > 2, 1 < x \le 3, x < 1 or x > 2, {x : x > 2}; None for all else."""
    if built := _BUILDER.fullmatch(text):
        return as_interval(built[1].strip())
    pieces = re.split(r"\s*(?:\sor\s|\\text\{\s*or\s*\}|\\cup)\s*", text)
    found = [_one_interval(piece.strip()) for piece in pieces]
    if None in found or len({name for name, _ in filter(None, found)}) != 1:
        return None
    names, intervals = zip(*filter(None, found), strict=True)
    return names[0], r"\cup ".join(intervals)


def _one_interval(text: str) -> tuple[str, str] | None:
    terms = _RELATION.split(text)
    sides, relations = [side.strip() for side in terms[::2]], terms[1::2]
    names = [bool(re.fullmatch(_NAME, side)) for side in sides]
    if len(sides) == 2 and names[0] != names[1]:
        if names[1]:
            sides, relations = sides[::-1], [_FLIPPED[relations[0]]]
        name, bound, relation = sides[0], sides[1], relations[0]
        return name, {
            "<": rf"(-\infty,{bound})",
            r"\le": rf"(-\infty,{bound}]",
            ">": rf"({bound},\infty)",
            r"\ge": rf"[{bound},\infty)",
            r"\ne": rf"(-\infty,{bound})\cup ({bound},\infty)",
        }[relation]
    if len(sides) == 3 and names == [False, True, False]:
        if relations[0] in (">", r"\ge"):
            sides, relations = sides[::-1], [_FLIPPED[relation] for relation in relations[::-1]]
        if all(relation in ("<", r"\le") for relation in relations):
            opening, closing = ("(" if relations[0] == "<" else "["), (")" if relations[1] == "<" else "]")
            return sides[1], f"{opening}{sides[0]},{sides[2]}{closing}"
    return None


def _structures(left: str, right: str, nested: bool) -> bool | None:
    """Sets and lists in any order, points and intervals in theirs with their brackets."""
    (one, these), (two, those) = structure(left), structure(right)
    if one == two == "":
        return None
    if "()" in (one[-2:], two[-2:]) and "" in (one, two):  # a bracket around one thing
        return None
    free = ("", "set", "list")
    if one in free and two in free:
        if nested and "" in (one, two):
            return False  # {1} is no number inside another set
        return _as_sets(these, those)
    if "set" in (one, two) or "" in (one, two):
        return False
    if one != two and "list" not in (one, two) and len(these) == 2:  # open and closed ends
        return False
    return len(these) == len(those) and all(map(_inside, these, those))


def _as_sets(these: list[str], those: list[str]) -> bool:
    if max(len(these), len(those)) > _MAXIMUM:
        return False
    return all(any(_inside(a, b) for b in those) for a in these) and all(
        any(_inside(a, b) for a in these) for b in those
    )


def _inside(left: str, right: str) -> bool:
    return same(left, right, nested=True)


def structure(text: str) -> tuple[str, list[str]]:
    r"""What kind of collection an answer is, and its elements: "set", "list" (bare), "(]" and the like, or "" for one.

    A union is one thing. The empty set is a set of nothing.
    """
    if text == r"\emptyset":
        return "set", []
    parts, pairs = _split(text)
    if len(parts) > 1:
        return "list", parts
    if pairs is not None:
        inside = text[2:-2] if pairs == r"\{\}" else text[1:-1]
        elements = _split(inside)[0]
        if pairs == r"\{\}":
            return "set", elements
        if len(elements) > 1:
            return pairs, elements
    return "", [text]


def _split(text: str) -> tuple[list[str], str | None]:
    """Between the commas outside of all brackets; and the outermost brackets, where one pair is around the whole."""
    parts, depth, opened, around = [""], 0, "", True
    tokens: list[str] = _TOKEN.findall(text)
    for index, token in enumerate(tokens):
        if token in _OPEN:
            opened = opened or token
            depth += 1
        elif token in _CLOSE:
            depth -= 1
            around = around and (depth > 0 or index == len(tokens) - 1)
        elif depth == 0:
            around = False
            if token in (",", ";") or token.strip() in ("and", "or") or token.startswith(r"\text{"):
                parts.append("")
                continue
        parts[-1] += token
    parts = [part.strip() for part in parts if part.strip()]
    return parts, opened + tokens[-1] if tokens and around and opened in ("(", "[", r"\{") else None


def _percent(left: str, right: str, nested: bool) -> bool | None:
    """36 % is 36 and is 0.36, as data sets have both."""
    marked = [text.endswith("%") for text in (left, right)]
    one, two = (text.rstrip("% ") for text in (left, right))
    if not any(marked):
        return None
    if all(marked):
        return same(one, two, nested)
    part, other = (one, two) if marked[0] else (two, one)
    return same(part, other, nested) or same(_hundredth(part), other, nested)


def _hundredth(text: str) -> str:
    value = number(text)
    return rf"\frac{{{text}}}{{100}}" if value is None else f"{value / 100}"


def _units(left: str, right: str, nested: bool) -> bool | None:
    """A unit may be left out, but not be another one."""
    (one, unit), (two, other) = split_unit(left), split_unit(right)
    if unit is None and other is None:
        return None
    if unit and other and unit != other:
        return False
    return same(one, two, nested)


def _bases(left: str, right: str, nested: bool) -> bool | None:
    """101_2 is 5_{10} and 101_{2}, and not 101."""
    found = [_BASED.fullmatch(_squeezed(text)) for text in (left, right)]
    if not any(found):
        return None
    if None in found and "10" in [match[2] for match in found if match]:  # which nobody needs to write
        return same(found[0][1] if found[0] else left, found[1][1] if found[1] else right)
    one, two = (match and _in_base(match[1].replace(r"\text{", "").rstrip("}"), int(match[2])) for match in found)
    return one is not None and one == two


def _in_base(digits: str, base: int) -> int | None:
    try:
        return int(digits, base)
    except ValueError:  # a digit that the base does not have
        return None


def _numbers(left: str, right: str, nested: bool) -> bool | None:
    one, two = number(left), number(right)
    if one is None or two is None:
        return None
    return one == two or _of_a_column(right, one)


def _of_a_column(text: str, other: Fraction) -> bool:
    """Whether a long decimal is what a column of float32 or float64 makes of the other number."""
    value = number(text)
    if value is None or sum(character.isdigit() for character in text) < 9 or "." not in text:
        return False
    try:
        single = struct.unpack("f", struct.pack("f", float(other)))[0]
    except OverflowError:
        return False
    return float(value) in (single, float(other)) and float(other) != 0


def _ratios(left: str, right: str, nested: bool) -> bool | None:
    """3:4 and 10:30 are compared piece by piece; 3:4 is 3/4, too."""
    left, right = (re.sub(r"\\text\{\s*to\s*\}|(?<=\d) to (?=\d)", ":", text) for text in (left, right))
    if (":" not in left and ":" not in right) or is_text(left) or is_text(right):
        return None
    one, two = left.split(":"), right.split(":")
    if len(one) == len(two):
        return all(map(_inside, one, two))
    ratio, value = (one, right) if len(one) > 1 else (two, left)
    return len(ratio) == 2 and ":" not in value and same(rf"\frac{{{ratio[0]}}}{{{ratio[1]}}}", value)


def _texts(left: str, right: str, nested: bool) -> bool | None:
    if not is_text(left) and not is_text(right):
        return None
    return _words(left) == _words(right)


def is_text(text: str) -> bool:
    """Whether there are words in it that are no mathematics."""
    plain = re.sub(r"\\text\{([^{}]*)\}", lambda match: f" {match[1]} ", text)
    plain = re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+|_\{?\w+\}?", " ", plain)
    return any(not _FUNCTIONS.fullmatch(word) for word in re.findall(r"[a-zA-Z]{3,}", plain)) or bool(
        re.search(r"\\text\{[^{}]*[a-zA-Z]\.?[a-zA-Z]", text) or plain.strip().lower() in ("no", "am", "pm")
    )


def _words(text: str) -> str:
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).lower()
    return re.sub(r"[\s.,;!?'\"{}\\-]", "", re.sub(r"\\ ?", " ", text))


_STAGES: tuple[Callable[[str, str, bool], bool | None], ...] = (
    _choices,
    _assigned,
    _plus_minus,
    _relations,
    _structures,
    _percent,
    _numbers,
    _bases,
    _units,
    _ratios,
    _texts,
)


def as_expressions(left: str, right: str) -> bool:
    """By math-verify; numbers by their values."""
    one, two = expression(left), expression(right)
    if one is None or two is None:
        return False
    from math_verify import verify
    from sympy import Expr

    if isinstance(one, Expr) and isinstance(two, Expr):
        one, two = _with_imaginary_unit(one), _with_imaginary_unit(two)
        if one.is_number and two.is_number:
            return _close(one, two, CLOSE if re.search(r"\.\d", right) else EQUAL)
    return bool(verify([one], [two], timeout_seconds=None))


def expression(text: str) -> Any:
    """The answer as sympy has it; None for what math-verify cannot read."""
    # Imported here: it brings sympy along (0.5 s), which the process that only compares strings does not need.
    from math_verify import parse

    # No time limits inside math-verify: they use SIGALRM, so they fail outside the main thread and would switch off
    # the alarm of the pool's worker. It warns once about that.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    found = parse(rf"\boxed{{{text}}}", parsing_timeout=None)
    return found[0] if found and not isinstance(found[0], str) else None


def _with_imaginary_unit(value: Any) -> Any:
    from sympy import I

    return value.subs({symbol: I for symbol in value.free_symbols if symbol.name == "i"}).doit()


def _close(one: Any, two: Any, bound: float) -> bool:
    from sympy import nsimplify

    one, two = nsimplify(one, rational=True), nsimplify(two, rational=True)  # decimals as they are written
    difference = one - two
    if difference.is_Rational and bound == EQUAL:
        return bool(difference == 0)
    if one.has("oo") or not difference.is_finite:
        return bool(one == two)
    size = max(abs(one.evalf(_DIGITS)), abs(two.evalf(_DIGITS)))
    return bool(abs(difference.evalf(_DIGITS)) <= bound * size)


def readable(answer: str) -> bool:
    """Whether an answer can be met in another spelling than its own: a number, text, a collection or an expression."""
    text = one_spelling(answer)
    if number(text) is not None or is_text(text) or structure(text)[0] or split_unit(text)[1]:
        return True
    return as_interval(text) is not None or expression(text) is not None
