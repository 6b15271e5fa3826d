"""A language model as the judge, behind any endpoint that speaks OpenAI's chat completions.

The model is given a rubric, the question, the reference answer and the answer, and ends with
`SCORE: n`; the reward is n / `scale`. With `criteria` it says yes or no to each, and the reward is
the weight of the yes; those with a no are the feedback (`actors.verifiers.rubric` can do more).
What cannot be had or read is an `error`, and never a reward of 0. Requests are repeated after
errors that pass (OpenAI's client does it: connection, 408, 409, 429, 5xx), and answers are kept, so
that the same text is judged once.

It needs `verifier.network=true`. A judge believes what it reads: the answer is handed over as a
JSON string, so that it is seen where it ends, but it may still persuade.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from actors.verifiers.base import Verdict
from actors.verifiers.thoughts import answer_part
from common.errors import UserError, VerifierError

RUBRIC = "Judge whether the answer is right: it has to agree with the reference in substance."
_CACHED = 10_000
_SCORE = re.compile(r"SCORE:\s*\**\s*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
_SAID = re.compile(r"^\W*(\d+)\W+(yes|no)\b", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Judge:
    """The arguments of the rule, checked. Raises `UserError` for those that cannot work."""

    base_url: str
    model: str
    rubric: str = RUBRIC
    """What to judge by."""
    criteria: Mapping[str, float] | None = None
    """Weights of statements, each true of the answer or not."""
    scale: float = 10.0
    """The best score."""
    api_key_file: str | None = None
    """File with the key, if the endpoint wants one."""
    timeout_s: float = 8.0
    """For all attempts together; below `verifier.timeout_s`."""
    retries: int = 2
    """Attempts after the first."""
    max_tokens: int = 512
    """Most tokens of the judge's own answer."""

    def __post_init__(self) -> None:
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise UserError(
                f"llm_judge: base_url={self.base_url!r} is no address: http://HOST:PORT/v1"
            )
        if not self.model:
            raise UserError("llm_judge: model is empty: give the name that the endpoint serves")
        for name, least in (("scale", 0), ("timeout_s", 0), ("retries", -1), ("max_tokens", 0)):
            value = getattr(self, name)
            if not value > least:
                raise UserError(f"llm_judge: {name}={value} is too small: above {least} is right")
        if self.criteria is not None and not sum(self.criteria.values()) > 0:
            raise UserError(
                "llm_judge: criteria have no weight: give each a number, e.g. {polite: 1}"
            )
        if self.api_key_file is not None and not Path(self.api_key_file).is_file():
            raise UserError(
                f"llm_judge: api_key_file={self.api_key_file} cannot be read; a file outside of "
                "the working directory has to stand in verifier.readable"
            )

    @property
    def endpoint(self) -> _Endpoint:
        """Where it is asked, and how."""
        return _Endpoint(
            self.base_url,
            self.model,
            self.api_key_file,
            self.timeout_s,
            self.retries,
            self.max_tokens,
        )


check_args = Judge
"""What the registry asks about arguments."""


def score(text: str, reference: dict[str, Any], *, prompt: str = "", **args: Any) -> Verdict:
    """What the model thinks of the answer in `text`, between 0 and 1.

    Args:
        args: those of `Judge`.

    Raises:
        VerifierError: there is no judgement.
    """
    judge, answer = Judge(**args), answer_part(text, prompt)
    if judge.criteria is not None:
        held, said = true_of(judge, answer, reference, list(judge.criteria))
        weights = judge.criteria.values()
        share = sum(w for w, each in zip(weights, held, strict=True) if each) / sum(weights)
        failed = [
            f"- {each}" for each, is_so in zip(judge.criteria, held, strict=True) if not is_so
        ]
        return Verdict.scored(share, said[-200:], feedback="\n".join(failed))
    task = f"Give a score from 0 to {judge.scale:g}. End with a line SCORE: and the number."
    said = _ask(judge.endpoint, _question(answer, reference, judge.rubric, task))
    scores = _SCORE.findall(said)
    if not scores or not 0 <= float(scores[-1]) <= judge.scale:
        raise VerifierError(f"the judge gave no score from 0 to {judge.scale:g}: {said[-200:]!r}")
    return Verdict.scored(float(scores[-1]) / judge.scale, said[-200:])


def judge_of(rule: str, judge: Mapping[str, Any]) -> Judge:
    """The judge that the arguments of another rule name. Raises `UserError` for none."""
    try:
        return Judge(**judge)
    except TypeError as error:
        raise UserError(f"{rule}: judge takes what llm_judge takes: {error}") from error


def true_of(
    judge: Judge, answer: str, reference: Mapping[str, Any], statements: Sequence[str]
) -> tuple[list[bool], str]:
    """Whether each statement is true of an answer, and all that the judge said.

    Raises:
        VerifierError: there is no judgement, or none of some statement.
    """
    lines = [f"{number}. {text}" for number, text in enumerate(statements, 1)]
    head, tail = "Which of these are true?", "End with a line `N: yes|no` for each."
    task = "\n".join([head, *lines, tail])
    said = _ask(judge.endpoint, _question(answer, reference, judge.rubric, task))
    found = {int(number): word.lower() == "yes" for number, word in _SAID.findall(said)}
    numbers = range(1, len(statements) + 1)
    if missing := [number for number in numbers if number not in found]:
        raise VerifierError(f"the judge said nothing of {missing}: {said[-200:]!r}")
    return [found[number] for number in numbers], said


def number_of(judge: Judge, answer: str, reference: Mapping[str, Any], task: str) -> int:
    """The whole number with which the judge ends, asked for as `SCORE:`.

    Raises:
        VerifierError: there is none.
    """
    said = _ask(judge.endpoint, _question(answer, reference, judge.rubric, task))
    scores = _SCORE.findall(said)
    if not scores or float(scores[-1]) % 1:
        raise VerifierError(f"the judge gave no whole number: {said[-200:]!r}")
    return int(float(scores[-1]))


def _question(answer: str, reference: Mapping[str, Any], rubric: str, task: str) -> str:
    parts = {"question": "prompt", "reference answer": "answer"}
    given = [
        f"The {name}, as JSON: {json.dumps(reference[column], ensure_ascii=False)}"
        for name, column in parts.items()
        if reference.get(column) not in (None, "")
    ]
    given.append(f"The answer to judge, as JSON: {json.dumps(answer, ensure_ascii=False)}")
    return "\n\n".join([rubric, *given, task])


@dataclass(frozen=True)
class _Endpoint:
    base_url: str
    model: str
    api_key_file: str | None
    timeout_s: float
    retries: int
    max_tokens: int

    def client(self) -> Any:
        """Give a client whose attempts together keep to the limit of time."""
        from openai import OpenAI

        key = "none" if self.api_key_file is None else Path(self.api_key_file).read_text().strip()
        each_s = self.timeout_s / (self.retries + 1)
        return OpenAI(base_url=self.base_url, api_key=key, timeout=each_s, max_retries=self.retries)


_client = lru_cache(_Endpoint.client)


@lru_cache(_CACHED)
def _ask(endpoint: _Endpoint, asked: str) -> str:
    """What the model says. Errors are not kept, so they are asked again."""
    from openai import OpenAIError

    try:
        answer = _client(endpoint).chat.completions.create(
            model=endpoint.model,
            messages=[{"role": "user", "content": asked}],
            temperature=0.0,
            max_tokens=endpoint.max_tokens,
        )
        return str(answer.choices[0].message.content or "")
    except (OpenAIError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise VerifierError(
            f"no judgement of {endpoint.base_url}: {type(error).__name__}: {error}"[:300]
        ) from error
