"""Which questions are held out: a rule on the text alone.

The rule needs no list and no random state, so everything that must agree on it does: prompts for
training, prompts for evaluation, the warm start of the tiny models. A question is on the
same side in every run, whatever the seed and whatever the size of the data set.
"""

from __future__ import annotations

import hashlib

HELD_OUT_FRACTION = 0.4
"""The share of questions that neither a warm start nor reinforcement learning may see.

Large, since the smallest task (sums of two digits, 200 questions) must leave enough of both.
"""


def is_held_out(question: str, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Whether `question` belongs to evaluation.

    Args:
        question: the question itself, before any template; white space at its ends is ignored.
        fraction: expected share of held-out questions, in [0, 1]. Growing it only adds questions.

    Raises:
        ValueError: `fraction` lies outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}, it must lie in [0, 1]")
    digest = hashlib.sha256(question.strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
