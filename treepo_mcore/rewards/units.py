r"""Units behind (or, of money, before) a value: which one, however it is spelled."""

from __future__ import annotations

import re

# One name a unit, and its other spellings; plurals by themselves.
_UNITS = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram",
    "kg": "kilogram",
    "lb": "lbs pound",
    "oz": "ounce",
    "ml": "milliliter millilitre mL",
    "L": "liter litre l",
    "s": "sec second",
    "min": "minute",
    "h": "hr hour",
    "day": "",
    "week": "",
    "month": "",
    "year": "yr",
    "degree": "deg",
    "rad": "radian",
    "dollar": "usd",
    "cent": "",
    "euro": "eur",
    "N": "newton",
    "J": "joule",
    "W": "watt",
    "V": "volt",
    "Hz": "hertz",
    "mph": "",
}
_NAMES = {spelling: name for name, others in _UNITS.items() for spelling in (name, *others.split())}
_WORD = re.compile(r"[A-Za-z]+")
_BEHIND = re.compile(
    r"(.*?(?:[\d)}!]|\\pi))\s*(?:\\text\{\s*([^{}\d]*?)\s*\.?\s*\}|(?<![a-zA-Z{_^])((?<=\s)[A-Za-z]|[A-Za-z]{2,}(?![({]))"
    r"([A-Za-z/. ]*))((?:\s*\^\s*\{?\d\}?)?)((?:\s*/\s*(?:\\text\{)?\s*[a-z]+\}?(?:\^\{?\d\}?)?)?)"
)
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_NO_UNITS = {"and", "or", "to", "if", "for", "mod", "is", "where", "sin", "cos", "tan", "log", "ln", "choose"}


def split_unit(text: str) -> tuple[str, str | None]:
    r"""Value and unit: 5 \text{ cm}^2, 60 miles per hour, \$36, 90^{\circ}. No unit: None; an unknown one: ""."""
    if match := re.fullmatch(r"(?:\\?\$|([€£]))\s*(.+?)", text):
        return match[2], {"€": "euro", "£": "pound sterling"}.get(match[1] or "", "dollar")
    if match := re.fullmatch(r"(.+?)\s*(?:\\?\$|([€£]))", text):
        return match[1], {"€": "euro", "£": "pound sterling"}.get(match[2] or "", "dollar")
    if match := re.fullmatch(r"(.+?)\s*\^\{\\circ\}\s*(?:\\text\{)?\s*([CF]?)\}?", text):
        return match[1], f"degree {match[2]}".strip()
    match = _BEHIND.fullmatch(text)
    if match is None:
        return text, None
    words = match[2] if match[2] is not None else match[3] + match[4]
    if ":" in match[1] or not words.strip() or _NO_UNITS & set(_WORD.findall(words)):
        return text, None
    unit = _unit(words, re.sub(r"\D", "", match[5]), match[6])
    letters = match[2] is None and len(words.strip()) < 3  # a product of variables, if no unit
    return (text, None) if letters and not unit else (match[1], unit)


def _unit(words: str, power: str, per: str) -> str:
    """Its one name; "" where a word is not known."""
    found = []
    below = re.sub(r"\\text|[{}\s]", "", per)
    for word in re.findall(r"[A-Za-z]+|/", f"{words} {below}"):
        lower = word.lower()
        if word == "/" or lower in ("per", "an"):
            found.append("/")
        elif lower in _POWERS:
            power = _POWERS[lower]
        else:
            name = _NAMES.get(word) or _NAMES.get(lower) or _NAMES.get(lower.removesuffix("s"))
            if name is None:
                return ""
            found.append(name)
    known = " ".join(found) + (f"^{power}" if power else "")
    return {"mi / h": "mph"}.get(known, known)
