r"""One spelling of an answer before it is compared: LaTeX without decoration.

Answers come as LaTeX, as a calculator or Python writes (`2**3`, `sqrt(2)`, `5e-05`), and with characters of Unicode
(`π/2`, `x²`). `one_spelling` turns all of these into the same LaTeX: later stages know one way to write a thing.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_CHARACTERS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "∙": r"\cdot ",
        "÷": r"\div ",
        "π": r"\pi ",
        "θ": r"\theta ",
        "∞": r"\infty ",
        "∅": r"\emptyset ",
        "≤": r"\le ",
        "⩽": r"\le ",
        "≥": r"\ge ",
        "⩾": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "±": r"\pm ",
        "∓": r"\mp ",
        "°": r"^{\circ}",
        "ℝ": r"\mathbb{R}",
        "½": r"\frac{1}{2}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "⅛": r"\frac{1}{8}",
        "⟨": "(",
        "⟩": ")",
    }
)
_SUPERSCRIPTS, _SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉"
_RAISED = str.maketrans(_SUPERSCRIPTS, "0123456789+-n")
_LOWERED = str.maketrans(_SUBSCRIPTS, "0123456789")

_SHORT = r"(?:\([^()]*\)|\d+(?:\.\d+)?|\\?[A-Za-z]+)"  # what a root without braces is of
_FLOAT = r"(?<![\w.\\{}])([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)[eE]([+-]?\d{1,3})(?![\w.])"
_GROUPED = r"[+-]?\d{1,3}(?:(?:\{,\}|,(?:\\!\s*)?|\s*\\,\s*)\d{3})+(?:\.\d+)?|[+-]?\d{1,3}(?: \d{3})+"

# A whole answer that is one number with thousands separators, money and units around it; in a list they separate.
_UNIT = r"\s*(?:\\?%|\\?\$|€|£|\\text|\\mathrm|[A-Za-z.])[^,]*|\s*"
_THOUSANDS = re.compile(rf"(\s*(?:\\?\$|€|£)?\s*)({_GROUPED})({_UNIT})")

_REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\displaystyle|\\textstyle|\\limits|\\[bB]igg?[lrm]?(?![a-zA-Z])|\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right)(?![a-zA-Z])", ""),
        (r"\\(?:quad|qquad|thinspace)(?![a-zA-Z])|(?<!\\)\\[,;:!> ]|~|\s+", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:leqslant|leq|leqq)(?![a-zA-Z])", r"\\le "),
        (r"\\(?:geqslant|geq|geqq)(?![a-zA-Z])", r"\\ge "),
        (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}|\\text\{\s*(?:the )?empty set\s*\}|(?:the )?empty set", r"\\emptyset "),
        (r"\\(?:textrm|textbf|textit|textsf|mathbf|mbox|hbox|mathrm|operatorname|rm)\s*\{", r"\\text{"),
        (r"\\text\{([a-z]|\d+)\}(?=[\^_}])", r"\1"),  # \mathrm{e}^x, 1_{\text{6}}
        (r"\{:\}|\\colon(?![a-zA-Z])|\s:\s", ":"),
        (r"\^\s*\\circ(?![a-zA-Z])|\^\{\s*\\circ\s*\}|\\degree(?![a-zA-Z])", r"^{\\circ}"),
        (r"\\%|\s*\\text\{\s*percent\s*\}|\s+percent\b", "%"),
        (r"\\log_\{?e\}?(?![a-zA-Z])", r"\\ln "),
        (r"\\ast(?![a-zA-Z])|(?<!\*)\*(?!\*)", r"\\cdot "),
        (r"\*\*", "^"),
        (rf"√\s*({_SHORT}|\{{[^{{}}]*\}})", r"\\sqrt{\1}"),
        (r"\\sqrt\{\((.*?)\)\}", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])sqrt\s*\{", r"\\sqrt{"),
        (r"(?<![\\a-zA-Z{])exp\s*\(([^()]*)\)", r"e^{\1}"),
        (r"\\text\{\s*(?:infinity|inf)\s*\}|(?<![\\a-zA-Z])(?:infinity|inf)(?![a-zA-Z])", r"\\infty "),
        (r"(?<![\\a-zA-Z])(pi|sin|cos|tan|ln|log)(?![a-zA-Z])", r"\\\1 "),
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"\^\s*([+-]?\d+)(?!\d)", r"^{\1}"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\(?:text)?\{?\(all real numbers\)\}?|\\text\{\s*all real numbers\s*\}|all real numbers", r"\\mathbb{R}"),
        (r"\\mathbb\s*\{?\s*R\s*\}?", r"(-\\infty,\\infty)"),
    ]
]


def one_spelling(text: str) -> str:
    r"""The answer in plain LaTeX: no sizes, no spacing commands, one name for each command, \text for every font."""
    text = re.sub(f"[{_SUPERSCRIPTS}]+", lambda match: f"^{{{match[0].translate(_RAISED)}}}", text)
    text = re.sub(f"[{_SUBSCRIPTS}]+", lambda match: f"_{{{match[0].translate(_LOWERED)}}}", text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS))
    text = without_thousands(without_delimiters(re.sub(r"(?<!\\)\\(?:\s|$)", " ", text)))
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = re.sub(_FLOAT, lambda match: f"{match[1]} \\times 10^{{{int(match[2])}}}", text)
    text = re.sub(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", _repeating, text)
    return without_end(re.sub(r"\s+", " ", text).strip())


def without_delimiters(text: str) -> str:
    r"""Without $...$, \(...\) and \[...\] around the whole."""
    text = text.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inside = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inside and opening not in inside:
            return inside.strip()
    return text


def without_thousands(text: str) -> str:
    """One number with thousands separators, alone or with money or a unit: without them. All else as it is."""
    match = _THOUSANDS.fullmatch(text)
    return match[1] + re.sub(r"[^\d.+-]", "", match[2]) + match[3] if match else text


def without_end(text: str) -> str:
    """Without the punctuation of the sentence around it: a dot, comma or semicolon; a mark behind a word."""
    text = text.rstrip(" .,;:")
    return text.rstrip("!?") if re.search(r"[a-zA-Z]{2}\}?[!?]+$", text) else text


def number(text: str) -> Fraction | None:
    r"""Of an answer that is a number and nothing else, exactly: 3, -0.50, 1/2, \frac{1}{2}, 1 1/2, 3 \times 10^{8}."""
    whole = re.sub(r"\s*([/+-])\s*", r"\1", text.strip())
    whole = re.sub(r"^\{(.*)\}$|^\((\S*)\)$", lambda match: match[1] or match[2] or "", whole)
    whole = re.sub(r"^([+-]?(?:\d+\s*)?)\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}$", r"\1 \2/\3", whole)
    whole = re.sub(r"^([+-]) ", r"\1", whole).strip()
    if match := re.fullmatch(r"([+-]?)(\d+) (\d+)/(\d+)", whole):  # a mixed number
        sign, units, over, under = match[1], int(match[2]), int(match[3]), int(match[4])
        return (units + Fraction(over, under)) * (-1 if sign == "-" else 1) if under else None
    if match := re.fullmatch(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+)) ?(?:\\times|\\cdot) ?10\^\{([+-]?\d{1,3})\}", whole):
        return Fraction(match[1]) * Fraction(10) ** int(match[2])
    if match := re.fullmatch(r"10\^\{([+-]?\d{1,3})\}", whole):
        return Fraction(10) ** int(match[1])
    if match := re.fullmatch(r"([+-]?\d+)/([+-]?\d+)", whole):
        return Fraction(int(match[1]), int(match[2])) if int(match[2]) else None
    return Fraction(whole) if re.fullmatch(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)", whole) else None


def _repeating(match: re.Match[str]) -> str:
    r"""0.1\overline{6} as a fraction."""
    whole, still, again = match[1] or "0", match[2], match[3]
    scale = 10 ** len(still)
    value = Fraction(int(whole + still), scale) + Fraction(int(again), scale * (10 ** len(again) - 1))
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
