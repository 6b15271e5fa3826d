"""Rules on the form of a completion: the share of them that hold, in [0, 1]."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from actors.sandbox.blame import blame_completion
from actors.verifiers.base import Verdict
from actors.verifiers.thoughts import whole_answer
from common.errors import UserError


def check_args(
    patterns: Sequence[str] = (),
    forbidden: Sequence[str] = (),
    tags: Sequence[str] = (),
    max_characters: int | None = None,
) -> None:
    """Raise `UserError` when there is no rule, or when a regular expression does not compile."""
    for key, value in (("patterns", patterns), ("forbidden", forbidden), ("tags", tags)):
        if isinstance(value, str):
            raise UserError(f"format_rules: {key} must be a list, as in {key}: [{value!r}]")
    for pattern in (*patterns, *forbidden):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"format_rules: {pattern!r} is not a regular expression: {error}"
            ) from error
    if not (patterns or forbidden or tags or max_characters is not None):
        raise UserError(
            "format_rules has no rule: give it args, at least one of "
            "patterns, forbidden, tags, max_characters"
        )


def score(
    text: str,
    reference: dict[str, Any],
    patterns: Sequence[str] = (),
    forbidden: Sequence[str] = (),
    tags: Sequence[str] = (),
    max_characters: int | None = None,
    prompt: str = "",
) -> Verdict:
    """The share of rules that hold; the reason names those that do not.

    Where the template has written the opening tag of the thoughts at the end of the prompt, the
    rules look at the completion behind it.

    `patterns`: regular expressions that must be found (`.` matches line ends). `forbidden`:
    those that must not. `tags`: each exactly once as `<tag>...</tag>`, one after the other in
    this order, counted as one rule. `max_characters`: longest completion.
    """
    blame_completion()
    length = len(text)
    text = whole_answer(text, prompt)
    broken = [f"no {p!r}" for p in patterns if not re.search(p, text, re.DOTALL)]
    broken += [f"found {p!r}" for p in forbidden if re.search(p, text, re.DOTALL)]
    if tags and not _tags_in_order(text, tags):
        broken.append(f"tags {', '.join(tags)}")
    if max_characters is not None and length > max_characters:
        broken.append(f"{length} characters")
    total = len(patterns) + len(forbidden) + bool(tags) + (max_characters is not None)
    return Verdict.scored(1.0 - len(broken) / total, "; ".join(broken))


def _tags_in_order(text: str, tags: Sequence[str]) -> bool:
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    if any(text.count(mark) != 1 for mark in marks):
        return False
    places = [text.index(mark) for mark in marks]
    return places == sorted(places)
