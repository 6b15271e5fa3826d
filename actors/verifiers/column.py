"""A number of the row itself: the same for every completion of a question, whatever it says.

With a negative weight it is a value taken off the reward, made beforehand: A*-PO's V(question) as
`verifier.rules=[{name: math_answer}, {name: column, weight: -1, args: {name: v}}]`.
"""

from __future__ import annotations

from typing import Any

from common.errors import UserError


def check_args(name: str) -> None:
    """Raise `UserError` where the column has no name."""
    if not isinstance(name, str) or not name:
        raise UserError(f"column: name={name!r} is no column: give it args: {{name: COLUMN}}")


def score(text: str, reference: dict[str, Any], name: str) -> float:
    """The number in column `name` of the question's row.

    Raises: `ValueError` where the row has none.
    """
    value: Any = reference.get(name)
    if type(value) not in (int, float):
        raise ValueError(
            f"the row has no number in column {name!r} but {value!r}; it has "
            f"{', '.join(sorted(reference)) or 'no column'}"
        )
    return float(value)  # what is not finite is no reward: `as_verdict`
