"""Every stored answer against itself in five spellings, and against thirty others: `make
test-graders`.

`math_answer` on answers of every form (`stored_answers`), `choice` on all pairs of letters, and the
drawn suites on the questions they ask.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator

import pytest
from stored_answers import Stored, spellings, stored_answers

from actors.verifiers import choice, math_answer, reasoning_gym
from deploy.eval.suite import load_problems, load_suite

pytestmark = [pytest.mark.graders, pytest.mark.timeout(3600)]


def near_and_far(answers: list[Stored]) -> Iterator[tuple[Stored, Stored]]:
    """Each answer with the twenty beside it, which have its form, and with ten from anywhere."""
    draw = random.Random(0)
    for place, stored in enumerate(answers):
        near = answers[max(0, place - 10) : place + 11]
        for other in [*near, *draw.sample(answers, 10)]:
            if other is not stored:
                yield stored, other


def test_every_stored_answer_is_right_in_five_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    answers = stored_answers()
    wrong = [
        (stored.text, text)
        for stored in answers
        for text in spellings(stored)
        if math_answer.score(text, {"answer": stored.text}).kind != "pass"
    ]
    with capsys.disabled():
        print(f"\n{len(answers)} stored answers, {5 * len(answers)} spellings: {len(wrong)} wrong")
    assert wrong == []


def test_no_stored_answer_is_right_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    math_answer.warm_up()
    begun, slowest, pairs, equal = time.process_time(), 0.0, 0, []
    for stored, other in near_and_far(stored_answers()):
        started = time.process_time()
        given = rf"\boxed{{{other.text.replace('$', '')}}}"
        verdict = math_answer.score(given, {"answer": stored.text})
        slowest = max(slowest, time.process_time() - started)
        pairs += 1
        if verdict.kind != "fail" and not _says_the_same(stored, other):
            equal.append((stored.text, other.text))
    spent = time.process_time() - begun
    with capsys.disabled():
        print(f"\n{pairs} pairs of different answers: {len(equal)} equal; {spent:.0f} s of ")
        print(f"processor time, {1e3 * spent / pairs:.2f} ms a pair, the slowest {slowest:.2f} s")
    assert equal == [], equal[:40]


def _says_the_same(stored: Stored, other: Stored) -> bool:
    """Whether a unit stands against its number, or an equation for its right side."""
    if isinstance(other.value, tuple) and other.value[0] == "curve":
        return stored.value == other.value[2]
    counts = [
        answer.value[1]
        if isinstance(answer.value, tuple) and answer.value[0] == "quantity"
        else answer.value
        for answer in (stored, other)
    ]
    return counts[0] == counts[1] and (stored.value in counts or other.value in counts)


def test_every_letter_is_right_for_itself_alone() -> None:
    for stored, given in itertools.product(choice.LETTERS, repeat=2):
        texts = [
            rf"\boxed{{\text{{{given}}}}}",
            f"The answer is ({given}).",
            f"I weigh them.\n**{given}**",
            f"Answer: {given}",
            f"<think>A?</think><answer>{given}</answer>",
        ]
        for text in texts:
            right = choice.score(text, {"answer": stored}).kind == "pass"
            assert right == (stored == given), (stored, text)


@pytest.mark.parametrize("name", ["arithmetic", "algebra"])
def test_answers_of_drawn_suites(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    references = [json.loads(row.reference) for row in load_problems(load_suite(name))]
    wrong = 0
    for stored, other in itertools.product(references, references):
        verdict = reasoning_gym.score(f"So it is\n{other['answer']}", stored)
        wrong += (verdict.reward == 1.0) != (stored["answer"] == other["answer"])
    with capsys.disabled():
        print(f"\n{name}: {len(references) ** 2} pairs, {wrong} wrong")
    assert wrong == 0
