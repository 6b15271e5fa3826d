"""Contexts of a scorer: what it reads before a completion, beside the prompt.

A template is a text with `{prompt}`, and one more slot: that of the context. It stands where the
question stood, in the same frame of turns. Token ids of a context may have a hole, into which the
learner puts the tokens of another completion as they were sampled. A context with a hole that
nothing fills is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from common.errors import UserError

ContextName = Literal["prompt", "answer", "solution", "sibling", "feedback"]

HOLE = -1
"""In token ids of a context: the place of what is not known yet."""

_ANSWER = "{prompt}\n\nThe right answer is:\n%s\n\nSolve the problem in your own words."
_SIBLING = "{prompt}\n\nA right answer to this was:\n%s\n\nSolve the problem in your own words."
_FEEDBACK = "{prompt}\n\nAn earlier attempt was told:\n%s\n\nSolve the problem again."

TEMPLATES: Mapping[str, str] = {
    "prompt": "{prompt}",
    "answer": _ANSWER % "{answer}",
    "solution": _ANSWER.replace("right answer", "reference solution") % "{solution}",
    "sibling": _SIBLING % "{sibling}",
    "feedback": _FEEDBACK % "{feedback}",
}
"""The wording is ours."""

FILLED_LATER = ("sibling", "feedback", "draft")
"""Contexts that are known only after sampling."""

_DRAFT = "{prompt}\n\nAn earlier attempt:\n{draft}\n\n%sGive a better answer."

FOLLOW_UPS: Mapping[str, str] = {
    "refine": _DRAFT % "",
    "critique": _DRAFT % "What it lacks:\n{feedback}\n\n",
    "hint": "{prompt}\n\nA hint:\n{hint}\n\nSolve the problem in your own words.",
}
"""Prompts of completions that are asked for later in a group, by what asks. The wording is ours."""

RUBRIC = "{prompt}\n\nA good answer is such that:\n{rubric}"
"""Prompt that shows criteria beforehand. The wording is ours."""


def context_template(name: str, given: str | None) -> str:
    """The template of a context; `given` is the user's own.

    Raises:
        UserError: it leaves out the question or what the context is of.
    """
    text = TEMPLATES[name] if given is None else given
    _check_slots(
        text, name, "algorithm.advantage.context_template", f"algorithm.advantage.context={name}"
    )
    return text


def template_with(slots: Sequence[str], usual: str, given: str | None, key: str, by: str) -> str:
    """A template with some slots; `given` is the user's own.

    Args:
        key: that of the template.
        by: the key that needs the slots, and its value.

    Raises:
        UserError: it leaves out the question or one of the slots.
    """
    text = usual if given is None else given
    for slot in slots:
        _check_slots(text, slot, key, by)
    return text


def _check_slots(text: str, name: str, key: str, wanted_by: str) -> None:
    for slot in ("{prompt}", f"{{{name}}}"):
        if text.count(slot) != 1:
            raise UserError(f"{key} has {slot} {text.count(slot)} times: {wanted_by} needs it once")
