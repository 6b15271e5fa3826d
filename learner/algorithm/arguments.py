"""Arguments of the rules of ours: keyword parameters, whose types carry bounds.

The defaults are those of the paper. A rule of a user's own checks its arguments itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from common.config.bounds import bound_of
from common.errors import UserError, nearest


def parameters(rule: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Keyword parameters that a rule of ours declares: the arguments that it takes."""
    found = inspect.signature(rule).parameters.values()
    return {each.name: each for each in found if each.kind is inspect.Parameter.KEYWORD_ONLY}


def check_arguments(key: str, args: Mapping[str, Any], rule: Callable[..., Any], kind: str) -> None:
    """Compare the arguments of a rule of ours with what it declares.

    Raises:
        UserError: one that it does not take, of another type, or out of its bound.
    """
    known = parameters(rule)
    hints = get_type_hints(rule, include_extras=True)
    for name, value in args.items():
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise UserError(
                f"{key}.{name} is no argument of {kind}{nearest(name, tuple(known))}: it {takes}"
            )
        if wrong := _argument_problem(value, hints[name]):
            raise UserError(
                f"{key}.{name}={value} must be {wrong} (default: {known[name].default})"
            )


def _argument_problem(value: Any, hint: Any) -> str | None:
    """What an argument must be, where it is not."""
    if get_origin(hint) is Literal:
        return None if value in get_args(hint) else f"one of {', '.join(map(str, get_args(hint)))}"
    bound = bound_of(hint)
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    numbers = {int: (int,), float: (int, float)}.get(plain, (plain,))
    right = isinstance(value, numbers) and (plain is bool or not isinstance(value, bool))
    if not right:
        return f"a {plain.__name__}"
    return f"{bound}" if bound is not None and value not in bound else None
