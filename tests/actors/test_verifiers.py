"""Rules against stored right and wrong answers; what is and is not a verdict."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.verifiers import equality, format_rules, math_answer
from actors.verifiers import reasoning_gym as gym
from actors.verifiers.base import Verdict, as_verdict
from actors.verifiers.extract import extract_answer, last_boxed
from actors.verifiers.registry import resolve, verifier_names
from common.config.sections import VerifierConfig, VerifierSpec
from common.errors import UserError

MATRIX = r"\begin{pmatrix}1\\2\end{pmatrix}"
RIGHT_MATH = [
    ("1/2", "0.5"),
    (r"\frac{1}{2}", "The answer is 1/2."),
    (r"\frac{1}{2}", r"so \boxed{\dfrac{2}{4}}"),
    ("(0, 1]", "The answer is (0, 1]"),
    ("(0,1]", r"\boxed{(0, 1]}"),
    ("[0,1)", "[0, 1)"),
    (r"[0,1) \cup (2,3]", r"\boxed{(2,3] \cup [0,1)}"),
    (r"\{1,2\}", "Answer: 2, 1"),
    (r"\{1,2,3\}", r"$\{3, 2, 1\}$"),
    ("north", "We go north.\nThe answer is North."),
    (r"\text{north}", r"\boxed{\text{North}}"),
    ("A", "The answer is (A)."),
    ("B", r"\boxed{B}"),
    (r"5 \text{ cm}", "It is 5 cm"),
    ("5", r"\boxed{5\text{ cm}}"),
    ("He adds 3 and 4.\n#### 7", r"\boxed{7}"),
    ("x=3", "x = 3"),
    ("3", "$x = 3$"),
    ("1,234", "1234"),
    ("-4", "5 - 9 = -4"),
    (r"50\%", "50%"),
    (MATRIX, f"${MATRIX}$"),
    (r"\infty", r"\boxed{\infty}"),
    (r"2\sqrt{3}", r"\(\sqrt{12}\)"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    ("17", "We get **17**"),
    ("7", "I think $8$.\nNo: $7$"),
]
WRONG_MATH = [
    ("1/2", "0.25"),
    ("(0,1]", "(0, 1)"),
    ("(0,1]", "1"),
    (r"\{1,2\}", r"$\{1,3\}$"),
    ("north", "thorn"),
    ("north", "The north is wrong.\nsouth"),
    ("A", r"\boxed{B}"),
    ("7", "I do not know"),
    ("7", "17"),
    ("7", ""),
    ("7", r"\boxed{}"),
    ("7", r"\frac{{{"),
    ("2", r"\boxed{1} or \boxed{2}"),
    ("2", "1 2 3 4"),
]


@pytest.mark.parametrize(("stored", "text"), RIGHT_MATH)
def test_math_answer_accepts(stored: str, text: str) -> None:
    assert math_answer.score(text, {"answer": stored}).kind == "pass"


@pytest.mark.parametrize(("stored", "text"), WRONG_MATH)
def test_math_answer_refuses(stored: str, text: str) -> None:
    verdict = math_answer.score(text, {"answer": stored})
    assert (verdict.kind, verdict.reward) == ("fail", 0.0)


def test_a_completion_that_cannot_be_evaluated_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "SECONDS", 1)
    assert math_answer.score("$9^{9^{9^{9^{9}}}}$", {"answer": "10"}).kind == "fail"


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_completion_makes_math_answer_raise(text: str) -> None:
    assert math_answer.score(text, {"answer": r"\frac{1}{3}"}).kind in ("pass", "fail")


@pytest.mark.parametrize("stored", ["", None, "no number ####", "$$"])
def test_an_unreadable_stored_answer_is_an_error_and_not_a_wrong_answer(stored: Any) -> None:
    with pytest.raises(ValueError, match="stored answer"):
        math_answer.score("1", {"answer": stored})


def gym_reference(question_task: str = "chain_sum", **params: Any) -> dict[str, Any]:
    entry = gym.import_reasoning_gym().create_dataset(question_task, seed=1, size=4, **params)[0]
    encoded = json.loads(json.dumps(gym.encode_entry(entry)))
    return {"answer": entry["answer"], "task": question_task, "params": params, "entry": encoded}


ONE_DIGIT: dict[str, Any] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_reasoning_gym_takes_the_last_number_and_gives_no_credit_for_containing_it() -> None:
    reference = gym_reference(**ONE_DIGIT)
    assert reference["answer"] == "3"  # 4 - 1
    assert gym.score("4 - 1 = 3", reference).reward == 1.0
    assert gym.score("I get 3.0, I think.", reference).reward == 1.0
    assert gym.score("13", reference).reward == 0.0
    assert gym.score("13", reference, partial_credit=True).reward == 0.5
    assert gym.score("-3", reference).reward == 0.0
    assert gym.score("3 or 4", reference).reward == 0.0
    assert gym.score("no idea", reference).reward == 0.0
    assert gym.score("5 <answer>3</answer> 6", reference, extract="answer_tag").reward == 1.0
    assert gym.score(r"5 \boxed{3} 6", reference, extract="boxed").reward == 1.0
    assert gym.score("3", reference, extract="full").reward == 1.0
    assert gym.score("it is 3", reference, extract="full").reward == 0.0


def test_reasoning_gym_takes_the_last_line_where_the_answer_is_no_number() -> None:
    reference = gym_reference("letter_counting") | {"task": "spell_backward"}
    reference |= gym_reference("spell_backward")
    right = reference["answer"]
    assert gym.score(f"I reverse it 1 by 1.\n{right}\n", reference).reward == 1.0
    assert gym.score(f"{right}\n1", reference).reward == 0.0


@pytest.mark.parametrize("task", ["rearc", "arc_agi", "countdown", "prime_factorization"])
def test_scorers_mark_the_stored_answer_right_after_a_json_round_trip(task: str) -> None:
    reference = gym_reference(task)
    assert gym.score(reference["answer"], reference, extract="full").reward == 1.0
    assert gym.score("zzz", reference, extract="full").reward == 0.0


def test_a_prompt_from_elsewhere_is_an_error_for_reasoning_gym() -> None:
    with pytest.raises(ValueError, match=r"data\.source=reasoning_gym"):
        gym.score("3", {"answer": "3", "task": None})


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(json_like)
def test_entries_survive_json(value: Any) -> None:
    assert gym.decode_entry(json.loads(json.dumps(gym.encode_entry(value)))) == value


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        ("a 1,234.5 b", "last_number", "1234.5"),
        ("9-4", "last_number", "4"),
        ("9 - -4", "last_number", "-4"),
        ("\N{MINUS SIGN}4", "last_number", "-4"),
        ("x2", "last_number", None),
        ("1, 2", "last_number", "2"),
        (r"\boxed{\frac{1}{2}} then", "boxed", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{2", "boxed", "1"),
        ("none", "boxed", None),
        ("<answer> 1 </answer><answer>\n2</answer>", "answer_tag", "2"),
        ("a\n b \n\n", "last_line", "b"),
        (" ", "last_line", None),
        (" ", "full", None),
    ],
)
def test_extraction(text: str, how: str, answer: str | None) -> None:
    assert extract_answer(text, how) == answer


@given(st.text(alphabet="{}a \\", max_size=30))
def test_a_box_is_balanced(inside: str) -> None:
    found = last_boxed(r"\boxed{" + inside + "}")
    plain = re.sub(r"\\.", "", found or "")  # escaped braces are braces to read
    assert plain.count("{") == plain.count("}")


def test_format_rules_give_the_share_that_holds() -> None:
    text = "<think>a\nb</think><answer>4</answer>"
    score = format_rules.score
    assert score(text, {}, tags=["think", "answer"]).reward == 1.0
    assert score(text, {}, tags=["answer", "think"]).reward == 0.0
    assert score(text + "<think>", {}, tags=["think"]).reward == 0.0
    assert score(text, {}, patterns=["a.b", "c"]).reward == 0.5
    assert score(text, {}, forbidden=[r"\d"], max_characters=1000).reward == 0.5
    verdict = score(text, {}, patterns=["zzz"], max_characters=1)
    assert (verdict.kind, verdict.reason) == ("fail", "no 'zzz'; 36 characters")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(1, "pass"), (0.25, "pass"), (0, "fail"), (-1.0, "fail"), (True, "pass"), (False, "fail")]
    + [(bad, "error") for bad in (math.nan, math.inf, 3.5e38, -1e39, "1", None, [1.0], 1j)],
)
def test_only_finite_numbers_are_rewards(value: object, kind: str) -> None:
    verdict = as_verdict(value, "mine")
    assert verdict.kind == kind
    if kind == "error":
        assert verdict.reward is None
        assert "mine" in verdict.reason


@pytest.mark.parametrize(
    "fields", [("error", 0.0), ("timeout", 0.0), ("pass", None), ("fail", math.nan), ("ok", 1.0)]
)
def test_a_verdict_without_a_judgement_never_carries_a_reward(fields: tuple[str, Any]) -> None:
    with pytest.raises(ValueError, match="verdict"):
        Verdict(*fields)


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        ("math_anser", {}, "did you mean 'math_answer'"),
        ("no_such_module:score", {}, "cannot be imported"),
        ("hostile_verifiers:missing", {}, "cannot be imported"),
        ("hostile_verifiers:NOT_CALLABLE", {}, "name a function"),
        ("hostile_verifiers:needs_scale", {}, "scale"),
        ("hostile_verifiers:obedient", {"scale": 1}, "scale"),
        ("hostile_verifiers:", {}, "unknown"),
        ("reasoning_gym", {"extract": "lastnumber"}, "last_number"),
        ("reasoning_gym", {"extrac": "boxed"}, "extract"),
        ("format_rules", {}, "no rule"),
        ("format_rules", {"patterns": ["("]}, "regular expression"),
        ("format_rules", {"patterns": "abc"}, "list"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(
    target: str, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve("rule", target, args)


def test_a_rule_is_given_its_args() -> None:
    rule = resolve("rule", "hostile_verifiers:needs_scale", {"scale": 0.5})
    assert rule.judge("text", {}).reward == 0.5


def test_column_names_are_distinct() -> None:
    names = ["a.b:score", "math_answer", "c:score", "x:score_2", "math_answer"]
    config = VerifierConfig(rules=[VerifierSpec(name=name) for name in names])
    expected = ["score", "math_answer", "score_2", "score_2_2", "math_answer_2"]
    assert verifier_names(config) == expected
