"""Numbers and what they count, read without evaluating anything.

`Number`: a decimal, fraction, mixed number or power of ten as an exact fraction. `quantity`: a
number and the words behind it. Expressions are as `actors.verifiers.spelling.spelled` gives them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_DECIMAL = r"\d+(?:\.\d+)?|\.\d+"
_INTEGER = r"\d+"
_VALUE = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:"
    rf"(?P<whole>{_INTEGER})?\s*\\frac\s*\{{\s*(?P<above>-?{_INTEGER})\s*\}}\s*\{{\s*(?P<below>-?{_INTEGER})\s*\}}"
    rf"|(?P<over>{_DECIMAL})\s*/\s*(?P<under>{_DECIMAL})"
    rf"|(?P<factor>{_DECIMAL})\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{{?\s*(?P<power>[-+]?\d+)\s*\}}?"
    rf"|(?P<ten>10)\s*\^\s*\{{?\s*(?P<tens>[-+]?\d+)\s*\}}?"
    rf"|(?P<decimal>{_DECIMAL})"
    rf")"
)
_MOST_DIGITS = 4000
_WORDS = re.compile(
    r"\s*(?P<percent>%|percent\b)?\s*(?P<unit>(?:\\mu)?[A-Za-z^{}\d/\s.²·*\\-]*?)\s*\Z", re.DOTALL
)
_UNIT_WORD = re.compile(r"[A-Za-z]{2,}|\\mu|\b[mgsLNJWVAKh](?![A-Za-z])")
_NUMBERS_TOLERANCE, _SMALL, _SMALL_TOLERANCE = 1e-6, 1e-4, 1e-3

_UNITS = {
    name: canonical
    for canonical, names in (
        *(("mm", "mm millimeter millimetre"), ("cm", "cm centimeter centimetre")),
        *(("m", "m meter metre"), ("km", "km kilometer kilometre"), ("in", "in inch inche")),
        *(("ft", "ft foot feet"), ("yd", "yd yard"), ("mi", "mi mile")),
        *(("g", "g gram gm"), ("kg", "kg kilogram kilo"), ("lb", "lb pound"), ("oz", "oz ounce")),
        *(("s", "s sec second"), ("min", "min minute"), ("h", "h hr hour"), ("yr", "yr year")),
        *(("l", "l liter litre"), ("ml", "ml milliliter millilitre")),
        *(("dollar", "dollar usd buck"), ("euro", "euro eur"), ("cent", "cent ¢")),
    )
    for name in names.split()
}
_SPEEDS = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h"}


_NAMES = "|".join(sorted((name for name in _UNITS if len(name) > 1), key=len, reverse=True))
_TRAILING = re.compile(
    rf"(?<=[\d)}}])\s*(?:sq(?:uare)?\s+|cubic\s+)?(?:(?:{_NAMES})s?|(?<=\s)[mgshlNJWVAK])"
    rf"(?:\^\{{?-?\d\}}?)?(?:\s*(?:/|per)\s*(?:(?:{_NAMES})s?|[mgshl])(?:\^\{{?\d\}}?)?)?\Z",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Number:
    """An exact value. `rounded` where it was written with a decimal point."""

    value: Fraction
    rounded: bool


@dataclass(frozen=True)
class Quantity:
    number: Number
    percent: bool
    unit: str
    """The words behind the number, as they stand."""


def quantity(expression: str) -> Quantity | None:
    """The number that `expression` is, with its unit; None where it is anything else."""
    found = _VALUE.match(expression)
    if found is None:
        return None
    words = _WORDS.fullmatch(expression, found.end())
    if words is None:
        return None
    unit = words["unit"].strip()
    if unit and not _UNIT_WORD.match(unit):
        return None
    if re.search(r"\d", re.sub(r"\^\{?-?\d\}?", "", unit)) or unit.startswith(("^", "\\")):
        return None
    number = _number(found)
    return Quantity(number, words["percent"] is not None, unit) if number else None


def _number(found: re.Match[str]) -> Number | None:
    part = found.groupdict()
    rounded = "." in found[0]
    try:
        if part["above"] is not None:
            whole = int(part["whole"] or 0)
            above = Fraction(int(part["above"]), int(part["below"]))
            value = whole + above
        elif part["over"] is not None:
            value = Fraction(part["over"]) / Fraction(part["under"])
        elif part["factor"] is not None:
            value = Fraction(part["factor"]) * _power_of_ten(part["power"])
        elif part["ten"] is not None:
            value = _power_of_ten(part["tens"])
        else:
            value = Fraction(part["decimal"])
    except (ZeroDivisionError, ValueError):
        return None
    return Number(-value if part["sign"] == "-" else value, rounded)


def _power_of_ten(exponent: str) -> Fraction:
    if len(exponent) > 6 or abs(int(exponent)) > _MOST_DIGITS:
        raise ValueError(f"10^{exponent} has too many digits")
    return Fraction(10) ** int(exponent)


def same_number(left: Fraction, right: Fraction, exact: bool) -> bool:
    """Whether two numbers agree: exactly, or to six decimals where one was written with a point.

    Of numbers near 0 six decimals say little: those below 1e-4 must agree to a part in a thousand,
    and nothing but 0 equals 0.
    """
    if left == right or exact:
        return left == right
    gap, size = abs(left - right), max(abs(left), abs(right))
    if min(abs(left), abs(right)) < _SMALL:
        return gap <= Fraction(_SMALL_TOLERANCE) * size and left * right > 0
    return gap <= Fraction(_NUMBERS_TOLERANCE)


def same_quantity(stored: Quantity, given: Quantity) -> bool:
    """Whether two quantities agree. A unit that one side leaves out does not count, nor one that
    is not known; `5 cm` is not `5 km`. A percentage beside a plain number is the number before the
    sign or the share it stands for: `50%` is 50, and it is 0.5."""
    if stored.unit and given.unit and _differ(stored.unit, given.unit):
        return False
    left, right = stored.number.value, given.number.value
    exact = not (stored.number.rounded or given.number.rounded)
    pairs = [(left, right)]
    if stored.percent and not given.percent:
        pairs.append((left / 100, right))
    if given.percent and not stored.percent:
        pairs.append((left, right / 100))
    return any(same_number(*pair, exact) for pair in pairs)


def without_unit(expression: str) -> str:
    """`expression` without a unit that is known and stands at its end."""
    found = _TRAILING.search(expression)
    return expression[: found.start()] if found else expression


def _differ(left: str, right: str) -> bool:
    """Whether two units are not the same one, nor one of them more words for the other."""
    mine, other = _unit_words(left), _unit_words(right)
    return not (mine <= other or other <= mine)


def _unit_words(unit: str) -> frozenset[str]:
    """The words of a unit without plurals, those that are known under one name."""
    plain = unit.lower().replace("{", "").replace("}", "").replace(".", " ")
    plain = re.sub(r"\bsq(?:uare)?\s+(\w+)", r"\1^2", plain)
    plain = re.sub(r"\bcub(?:ic|e)\s+(\w+)", r"\1^3", plain)
    plain = re.sub(r"\w+", lambda word: _SPEEDS.get(word[0], word[0]), plain)
    return frozenset(map(_singular, re.sub(r"\s*(?:/|\bper\b)\s*", " /", plain).split()))


def _singular(word: str) -> str:
    divided, name, power = re.fullmatch(r"(/?)([^^]*)(.*)", word).groups()  # type: ignore[union-attr]
    stem = name.removesuffix("s") if len(name) > 2 else name
    return f"{divided}{_UNITS.get(name) or _UNITS.get(stem) or stem}{power}"
