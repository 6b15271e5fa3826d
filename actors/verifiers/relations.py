"""Whether two equations, or two inequalities, say the same.

Written as `f = 0` and `g = 0`, two relations are the same when f is g times a constant, which their
values at a few points show. Equations of which that is not so are solved; inequalities in one
unknown are compared as sets. Without an unknown a relation is a statement and equals its own
spelling alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.verifiers.numeric import Values, points, same_values, value_at

_AGREE = 1e-25


def is_relation(tree: Any) -> bool:
    from sympy.core.relational import Relational

    return isinstance(tree, Relational) or _chain(tree) is not None


def same_relation(stored: Any, given: Any) -> bool:
    """Whether two relations, or two chains of them (`1 < x < 2`), have the same solutions."""
    if stored.free_symbols != given.free_symbols or not stored.free_symbols:
        return False
    left, right = _chain(stored), _chain(given)
    if left is not None or right is not None:
        if left and right and len(left) == len(right) and all(map(_same_single, left, right)):
            return True
        return _same_set(stored, given)
    return _same_single(stored, given)


def _same_single(stored: Any, given: Any) -> bool:
    from sympy import Eq, Ne

    if isinstance(stored, Eq) != isinstance(given, Eq):
        return False
    if isinstance(stored, Eq):
        return _same_equation(stored, given)
    if isinstance(stored, Ne) or isinstance(given, Ne):
        return type(stored) is type(given) and (
            _constant_ratio(stored.lhs - stored.rhs, given.lhs - given.rhs) is not None
            or _same_set(stored, given)
        )
    mine, other = _upwards(stored), _upwards(given)
    if mine is None or other is None:
        return False
    if mine[1] != other[1]:
        return False
    ratio = _constant_ratio(mine[0], other[0])
    return (ratio is not None and ratio > 0) or _same_set(stored, given)


def _same_equation(stored: Any, given: Any) -> bool:
    try:
        left, right = stored.lhs - stored.rhs, given.lhs - given.rhs
    except TypeError:  # sides that cannot be subtracted: a symbol and a matrix, a symbol and a set
        return _same_sides(stored, given)
    if _constant_ratio(left, right) is not None:
        return True
    if stored.lhs.is_Symbol and stored.lhs == given.lhs:
        return _same_sides(stored, given)
    return any(
        _same_solutions(left, right, unknown) for unknown in sorted(stored.free_symbols, key=str)
    )


def _same_sides(stored: Any, given: Any) -> bool:
    from math_verify import verify

    return bool(stored.lhs == given.lhs) and (
        same_values(stored.rhs, given.rhs) is Values.EQUAL
        or bool(verify([stored.rhs], [given.rhs], timeout_seconds=None))
    )


def _same_solutions(left: Any, right: Any, unknown: Any) -> bool:
    """Whether both have the same solutions for `unknown`, and have any."""
    from sympy import solve

    try:
        mine, other = solve(left, unknown), solve(right, unknown)
    except Exception:  # sympy raises of every kind where it cannot solve
        return False
    if not mine or len(mine) != len(other):
        return False
    for solution in mine:
        equal = [one for one in other if same_values(solution, one) is Values.EQUAL]
        if not equal:
            return False
        other.remove(equal[0])
    return True


def _upwards(relation: Any) -> tuple[Any, bool] | None:
    """f and whether the relation is strict, of a relation written as f > 0 or f >= 0."""
    from sympy import Ge, Gt, Le, Lt

    if isinstance(relation, (Gt, Ge)):
        return relation.lhs - relation.rhs, isinstance(relation, Gt)
    if isinstance(relation, (Lt, Le)):
        return relation.rhs - relation.lhs, isinstance(relation, Lt)
    return None


def _constant_ratio(left: Any, right: Any) -> Any:
    """The number that left / right is at all points; None where it is not one number."""
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    ratios = []
    for point in points(symbols):
        above, below = value_at(left, point), value_at(right, point)
        if above is None or below is None or abs(below) < _AGREE:
            continue
        ratios.append(above / below)
    if len(ratios) < 3 or abs(ratios[0]) < _AGREE:
        return None
    first = ratios[0]
    if any(abs(ratio - first) > _AGREE * abs(first) for ratio in ratios[1:]):
        return None
    return first if first.is_real else None


def union_of(trees: Sequence[Any]) -> Any:
    """The set in which one of some relations holds; None where sympy cannot say."""
    from sympy import Union

    if not all(tree is not None and is_relation(tree) for tree in trees):
        return None
    if len({symbol for tree in trees for symbol in tree.free_symbols}) != 1:
        return None
    try:
        return Union(*map(_as_set, trees))
    except Exception:  # as_set raises of every kind for what it cannot solve
        return None


def _same_set(stored: Any, given: Any) -> bool:
    """Of relations in one unknown; False where sympy cannot say."""
    if len(stored.free_symbols) != 1:
        return False
    try:
        return bool(_as_set(stored) == _as_set(given))
    except Exception:  # as_set raises of every kind for what it cannot solve
        return False


def _as_set(tree: Any) -> Any:
    from sympy import Intersection

    chain = _chain(tree)
    return tree.as_set() if chain is None else Intersection(*(part.as_set() for part in chain))


def _chain(tree: Any) -> list[Any] | None:
    """The relations of `1 < x < 2`; None for anything else."""
    from latex2sympy2_extended.logic import And
    from sympy.core.relational import Relational

    if not isinstance(tree, And):
        return None
    parts = list(tree._unsorted_args)
    return parts if parts and all(isinstance(part, Relational) for part in parts) else None
