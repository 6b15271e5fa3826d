"""A verifier of your own: full reward for a right answer, less for one that talks.

    .venv/bin/grpo-lambda train --config deploy/configs/tiny.yaml \
        verifier.rules='[{name: deploy.examples.verifier:right_and_short, args: {limit: 12}}]'

It is called once a completion, in a child process without network that is killed after
`verifier.timeout_s`. Copy it anywhere on PYTHONPATH and name it `package.module:function`.
"""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"-?\d+")


def right_and_short(text: str, reference: dict[str, Any], limit: int = 12) -> float:
    """1 where a short text ends with the right number, 0.5 where a long one does, else 0.

    Args:
        text: the completion.
        reference: of the data set's row; `answer` is its answer.
    """
    numbers = _NUMBER.findall(text)
    if not numbers or int(numbers[-1]) != int(reference["answer"]):
        return 0.0
    return 1.0 if len(text) <= limit else 0.5
