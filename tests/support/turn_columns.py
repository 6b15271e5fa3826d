"""Columns of the trajectory schema for answers, which are episodes of one turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.record.schema import NEWER
from common.record.turns import turn


def answer_columns(given: int, tokens: int, finish: str = "stop") -> dict[str, Any]:
    """Of one completion of `tokens` tokens, the first `given` of which were given."""
    return {
        "turns": [turn(given, tokens, finish)],
        **NEWER,
        "environment_verdict": "",
        "environment_reason": "",
        "environment_reward": None,
        "environment_s": 0.0,
    }


def listed_answers(lengths: Sequence[int]) -> dict[str, list[Any]]:
    """Of completions that were sampled from their first token on."""
    rows = [answer_columns(0, length) for length in lengths]
    return {name: [row[name] for row in rows] for name in rows[0]}
