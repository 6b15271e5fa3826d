"""Whether two expressions of sympy have the same values: fast, and without simplifying them.

Without symbols an expression is a number, and 40 digits of it tell equal from different. With
symbols both are evaluated at a few points: one difference proves them different, and expressions
that agree to 30 digits at points nobody chose are equal (Schwartz 1980; Zippel 1979). Everything
that is no expression (relations, sets, matrices) is left to others.
"""

from __future__ import annotations

import math
from enum import Enum, auto
from fractions import Fraction
from typing import Any

from actors.verifiers.quantity import same_number

_DIGITS = 40
_AGREE, _NOISE = 1e-30, 1e-38
_MOST_BITS = 20_000.0
"""Size of the largest whole number that is worked out: 6,000 decimal digits."""
_POINTS = ((37, 101), (-53, 89), (97, 41), (211, 73), (-29, 103))
"""Numerators and denominators from which the values of symbols are made."""


class Values(Enum):
    EQUAL = auto()
    DIFFERENT = auto()
    UNKNOWN = auto()


def same_values(stored: Any, given: Any) -> Values:
    """Whether two unevaluated expressions agree; `UNKNOWN` where values do not say."""
    from sympy import Expr, MatrixBase
    from sympy.core.expr import UnevaluatedExpr

    for expression in (stored, given):
        if not isinstance(expression, Expr) or isinstance(expression, MatrixBase):
            return Values.UNKNOWN
        if expression.has(UnevaluatedExpr):  # a percentage, which is two things at once
            return Values.UNKNOWN
        if not expression.is_commutative or _is_function_of_nobody(expression):
            return Values.UNKNOWN
    if max(bits(stored), bits(given)) > _MOST_BITS:
        return Values.DIFFERENT  # equal ones would have to be spelled alike
    symbols = sorted(stored.free_symbols | given.free_symbols, key=str)
    if not symbols:
        return _at(stored, given, {})
    return _at_points(stored, given, symbols)


def _is_function_of_nobody(expression: Any) -> bool:
    from sympy.core.function import AppliedUndef

    return bool(expression.atoms(AppliedUndef))


def _at_points(stored: Any, given: Any, symbols: list[Any]) -> Values:
    agreed = 0
    for point in points(symbols):
        verdict = _at(stored, given, point)
        if verdict is Values.DIFFERENT:
            return verdict
        agreed += verdict is Values.EQUAL
    return Values.EQUAL if agreed >= 3 else Values.UNKNOWN


def points(symbols: list[Any]) -> list[dict[Any, Any]]:
    """Values for all symbols, a few times; positive, negative, and none of them a whole number."""
    from sympy import Rational

    return [
        {
            symbol: Rational(above + 7 * place, below + 2 * place + number)
            for place, symbol in enumerate(symbols)
        }
        for number, (above, below) in enumerate(_POINTS)
    ]


def _at(stored: Any, given: Any, point: dict[Any, Any]) -> Values:
    """At one point; decimals in the expressions make their values agree to six places only."""
    from sympy import Float

    left, right = value_at(stored, point), value_at(given, point)
    if left is None or right is None:
        return Values.UNKNOWN
    if stored.has(Float) or given.has(Float):
        if left.is_real and right.is_real:
            exact = Fraction(str(left)), Fraction(str(right))
            return Values.EQUAL if same_number(*exact, exact=False) else Values.DIFFERENT
        return Values.EQUAL if abs(left - right) < 1e-6 else Values.DIFFERENT
    gap, size = abs(left - right), max(abs(left), abs(right))
    if 0 < size < _NOISE:
        return Values.UNKNOWN  # what is left of a difference that is 0
    return Values.EQUAL if gap <= _AGREE * size else Values.DIFFERENT


def value_at(expression: Any, point: dict[Any, Any]) -> Any:
    """The value of an expression at a point: a finite number of `_DIGITS` digits, or None."""
    from sympy import Number

    try:
        at_point = expression.subs(point) if point else expression
        value = at_point.doit().evalf(_DIGITS, maxn=400)
    except Exception:  # sympy raises of every kind where a function has no value
        return None
    real, imaginary = value.as_real_imag()
    if not (isinstance(real, Number) and isinstance(imaginary, Number)):
        return None
    if not (real.is_finite and imaginary.is_finite):
        return None
    return value


def bits(expression: Any) -> float:
    """About how many bits the largest whole number inside an expression has when worked out.

    Infinite for towers of powers; what is no power, factorial or binomial is as large as its parts.
    """
    from sympy import Integer, Mul, Pow, Rational, binomial, factorial, gamma

    if isinstance(expression, Integer):
        return float(int(expression).bit_length())
    if isinstance(expression, Rational):
        return float(max(expression.p.bit_length(), expression.q.bit_length()))
    inner = [bits(part) for part in expression.args]
    largest = max(inner, default=0.0)
    if largest > _MOST_BITS:
        return math.inf
    if isinstance(expression, Pow):
        return max(largest, max(inner[0], 1.0) * _magnitude(expression.exp, inner[1]))
    if isinstance(expression, (factorial, binomial, gamma)):
        size = _magnitude(expression.args[0], inner[0])
        return max(largest, size * math.log2(size + 2) if math.isfinite(size) else size)
    return sum(inner) if isinstance(expression, Mul) else largest


def _magnitude(expression: Any, size: float) -> float:
    """The absolute value of an expression of `size` bits, about; 1 where it has symbols."""
    if size > 64:
        return math.inf
    if expression.free_symbols:
        return 1.0
    try:
        return abs(complex(expression.doit().evalf(15)))
    except (TypeError, ValueError, OverflowError):
        return 1.0
