"""Stored answers and completions as people and models write them: what is right, what is not.

Each row stands for a kind of report from the field.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from actors.verifiers import choice, equality, format_rules, math_answer, reasoning_gym
from actors.verifiers.extract import extract_answer
from actors.verifiers.final_answer import final_answer
from actors.verifiers.registry import resolve
from actors.verifiers.thoughts import answer_part

RIGHT = [
    # the stored answer itself, typeset otherwise
    ("10:30 a.m.", r"\boxed{10:30 a.m.}"),
    ("10:30 a.m.", r"\boxed{10:30 AM}"),
    (r"\text{10:30 p.m.}", r"\boxed{\text{10:30 p.m.}}"),
    ("2 apples and 3 pears", r"\boxed{2 \text{ apples and } 3 \text{ pears}}"),
    ("5 km/h", r"\boxed{5\text{ km/h}}"),
    ("5 km/h", r"\boxed{5 \text{ kilometers per hour}}"),
    ("0", r"\boxed{0.0}"),
    ("004", r"\boxed{4}"),
    ("1, 2, \\ldots, n", r"\boxed{1,2,\dots,n}"),
    (r"9^{9^{9^{9}}}", r"\boxed{9^{9^{9^9}}}"),
    # relations and sets
    ("[-2,7]", r"\boxed{-2 \le x \le 7}"),
    ("[-2,7]", r"\boxed{x \in [-2, 7]}"),
    (r"(-\infty,3)", r"\boxed{x<3}"),
    ("x<3", r"\boxed{(-\infty, 3)}"),
    ("2x+3y=7", r"\boxed{3y + 2x = 7}"),
    ("y=2x+1", r"\boxed{2x - y + 1 = 0}"),
    ("xy=1", r"\boxed{y = \frac{1}{x}}"),
    ("y=2x+1", r"\boxed{2x+1}"),
    ("f(x)=x^2", r"\boxed{x^2}"),
    ("3,-3", r"\boxed{\pm 3}"),
    ("x=3, y=4", r"\boxed{(3,4)}"),
    ("29", r"\boxed{x^2+7y^2=29}"),  # where the value of the left side was asked
    # the last box, leading zeros, a unit in another box
    ("004", r"\boxed{004}"),
    ("4", r"First \boxed{35 cm} ++++++ \boxed{4}"),
    ("4", r"It is \boxed{3}, or rather, as we saw, \boxed{4}."),
    ("x=3, y=4", r"\boxed{x=3} \boxed{y=4}"),
    ("5", "\\boxed{5}\n\\boxed{5}"),
    # equations, planes with the other sign, matrices, words around a number
    (r"\text{13}", r"\boxed{13}"),
    ("x-y+2z-3=0", r"\boxed{-x+y-2z+3=0}"),
    ("2x+4y=6", r"\boxed{x+2y=3}"),
    (r"y = \frac{3}{2}x - 4", r"\boxed{3x-2y=8}"),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        r"\boxed{\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}}",
    ),
    ("x<2 or x>3", r"\boxed{(-\infty,2)\cup(3,\infty)}"),
    (r"(-\infty,2)\cup(3,\infty)", r"\boxed{x<2 \text{ or } x>3}"),
    ("x<2 or x>3", r"\boxed{x>3 \text{ or } x<2}"),
    (r"x \neq 2", r"\boxed{x\ne2}"),
    (r"x \neq 2", r"\boxed{2 \ne x}"),
    # macros of other typists
    (r"\ln 2", r"\boxed{\log_e 2}"),
    (r"\dbinom{5}{2}", r"\boxed{10}"),
    (r"2 \pmod{5}", r"\boxed{2 \bmod 5}"),
    ("2 (mod 5)", r"\boxed{2 \pmod 5}"),
    # what is taken back is no answer, and what replaces it is
    ("8", "The answer is 7. Wait, that is wrong. It is 8."),
    ("8", "The answer is 7, no wait, 8"),
    ("9", "The answer is 7. Actually, I made a mistake above, it is 9."),
    ("42", "Answer: 42\n\nI hope that's what you wait for"),
    # other languages
    ("42", "Ответ: 42"),
    ("42", "ответ 42"),
    ("42", "Die Antwort ist 42."),
    ("42", "정답은 42입니다."),
    ("42", "答えは42です"),
    ("42", "因此答案是：42"),
    # forms of a document around the last line
    ("42", "It is\n\n1. 42"),
    ("42", "## 42"),
    ("42", "42\n---"),
    ("42", "```\n42\n```"),
    ("42", "<b>42</b>"),
    ("42", "| Answer | 42 |"),
    ("42", "Answer\n======\n42"),
    ("42", '{"answer": 42}'),
    ("42", '{"answer": "42"}'),
    ("42", r"\text{Answer: } 42"),
    # signs of Unicode and of other languages
    ("90", r"\boxed{90°}"),
    (r"\sqrt{2}", "√2"),
    (r"\frac12", "½"),
    ("42", "答案是42。"),
    ("-5", "\N{MINUS SIGN}5"),
    (r"\frac{\pi}{2}", r"\boxed{π/2}"),
    ("x^2", r"\boxed{x²}"),
    (r"(1,2)\cup(3,\infty)", r"\boxed{(1, 2) ∪ (3, ∞)}"),
    (r"\frac{1}{3}", r"\boxed{0.\overline{3}}"),
    # tags and marks around an answer
    ("42", "<think>x</think><answer>42</answer>"),
    ("42", "<answer>**42**</answer>"),
    ("42", "<answer>The answer is 42.</answer>"),
    ("7", "**Answer: 7**"),
    ("7", "Answer: **7**"),
    ("7", "The final answer is:\n\\[ 7 \\]"),
    ("7", "**Final Answer**\n\n7"),
    ("5", r"\boxed 5"),
    # GSM8K, money
    ("18", "She pays $12 and then $18 in total"),
    ("18", "#### 18\nI hope this helps."),
    ("1234", "#### $1,234.00"),
    ("18", "**$18**"),
    ("18", r"\boxed{18 \text{ dollars per day}}"),
    # numbers
    ("0.5", r"\boxed{.5}"),
    ("1500", r"\boxed{1.5e3}"),
    ("1e-5", r"\boxed{1e-5}"),
    ("1000000", r"\boxed{1 000 000}"),
    ("10!", r"\boxed{3628800}"),
    ("\\log_2 8", r"\boxed{3}"),
    ("1010_2", r"\boxed{1010_{2}}"),
    ("1010_2", r"\boxed{1010}"),
    ("3:1", r"\boxed{6:2}"),
    # a right answer of an unusual form, without simplifying it
    (
        r"\frac{1}{2} + \frac{1}{6}",
        r"\boxed{\frac{\sqrt{(\sqrt{3}+\sqrt{2})^2 - 2\sqrt{6} - 1}}{3}}",
    ),
]
WRONG = [
    ("42", "<think>The answer is 42"),
    ("42", "<think>a</think> so <think>The answer is 42"),
    ("42", "Is it 42? I do not know"),
    ("42", "I got 42 first, but that is wrong"),
    ("7", "The answer is not 7"),
    ("7", "7 is not the answer."),
    ("1, 2, \\ldots, n", r"\boxed{1, 3, 5, \ldots, 2n-1}"),
    ("1, 1, 2", r"\boxed{1, 2}"),
    ("1, 2", r"\boxed{1, 1, 2}"),
    ("1", r"\boxed{1, 1}"),
    ("555-1234", r"\boxed{-679}"),
    ("2024-01-02", r"\boxed{2021}"),
    ("12:30", r"\boxed{2/5}"),
    ("10:30 a.m.", r"\boxed{10:30 p.m.}"),
    ("0", r"\boxed{0.0000000001}"),
    ("0.0", r"\boxed{1e-9}"),
    ("0", r"\boxed{1e-400}"),
    ("5 cm", r"\boxed{5 km}"),
    ("5 apples", r"\boxed{5 oranges}"),
    ("1010_2", r"\boxed{1010_3}"),
    ("10", r"\boxed{1 2 3 4}"),
    ("2 apples and 3 pears", r"\boxed{3 \text{ apples and } 2 \text{ pears}}"),
    ("listen", r"\boxed{silent}"),
    ("all real numbers", r"\boxed{all}"),
    (r"2 \pi a b", r"\boxed{2 \pi}"),  # letters that math-verify takes for units
    ("3V", r"\boxed{3v}"),
    (r"I=2 \sin t", r"\boxed{I=3 \sin t}"),  # equations that it finds no solutions of
    (r"200 \cos 1 = 3464", r"\boxed{300 \cos 2 = 4242}"),
    (r"\cos 0=1, \sin 0=0", r"\boxed{\cos \pi=-1, \sin \pi=0}"),
    (r"\begin{pmatrix}1\\2\\4\end{pmatrix}", r"\boxed{\begin{pmatrix}2\\1\\4\end{pmatrix}}"),
    ("x<3", r"\boxed{x \le 3}"),
    ("[-2,7]", r"\boxed{-2 < x \le 7}"),
    (r"\pm 3", r"\boxed{3}"),
    ("y=3", r"\boxed{x=3}"),
    ("7", "The answer is 7. Wait, that is wrong. It is 8."),
    ("7", "The answer is 7, which is wrong."),
    ("7", "The answer is 7, no wait, 8"),
    ("42", "42?"),
    ("x<2 or x>3", r"\boxed{x<2 \text{ or } x>4}"),
    ("x<2 or x>3", r"\boxed{(-\infty,2]\cup(3,\infty)}"),
    (r"x \neq 2", r"\boxed{x \ne 3}"),
    (r"x \neq 2", r"\boxed{x = 2}"),
    (r"\ln 2", r"\boxed{\log_{10} 2}"),
    (r"2 \pmod{5}", r"\boxed{2 \bmod 7}"),
    ("5, 5", "\\boxed{5}\n\\boxed{5}"),
]
AT_ONCE = [
    r"9^{9^{9^{9}}}",
    r"(10^{10})!",
    "1e999999999",
    r"\binom{10^9}{5\cdot10^8}",
    r"\frac{\log 2}{\log 2-\log 3}",
]


@pytest.mark.parametrize(("stored", "text"), RIGHT)
def test_right(stored: str, text: str) -> None:
    verdict = math_answer.score(text, {"answer": stored})
    assert verdict.kind == "pass", verdict


@pytest.mark.parametrize(("stored", "text"), WRONG)
def test_wrong(stored: str, text: str) -> None:
    verdict = math_answer.score(text, {"answer": stored})
    assert verdict.kind == "fail", verdict


@pytest.mark.parametrize("answer", AT_ONCE)
def test_what_is_too_large_or_needs_simplifying_is_wrong_at_once(answer: str) -> None:
    math_answer.warm_up()
    begun = time.process_time()
    verdict = math_answer.score(rf"\boxed{{{answer}}}", {"answer": r"\frac{4\cdot999^4}{27}"})
    assert verdict.kind == "fail", verdict
    assert time.process_time() - begun < 1.0


def test_what_a_completion_makes_last_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "SECONDS", 0.05)
    sums = "+".join(rf"\sqrt{{x+{n}}}" for n in range(60))
    verdict = math_answer.score(rf"\boxed{{{sums}}}", {"answer": r"\sqrt{x}+1"})
    assert (verdict.kind, verdict.reward) == ("fail", 0.0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 4", None),
        ("We get 42", None),
        ("so $x = 4", None),
        (r"\boxed{42} and then", "42"),
        ("<answer>42</answer> I", "42"),
        ("The answer is 42.\nSo we", "42"),
        ("The answer is 42. Now", "42"),
    ],
)
def test_of_a_text_that_was_cut_only_what_is_closed_counts(text: str, answer: str | None) -> None:
    assert (final_answer(text, complete=False) or "").rstrip(".") == (answer or "")
    expected = "pass" if answer else "fail"
    assert math_answer.score(text, {"answer": "42"}, finish_reason="length").kind == expected


@pytest.mark.parametrize(
    ("text", "prompt", "answer"),
    [
        ("a</think>b", "", "b"),
        ("<think>a</think>b", "", "b"),
        ("a</think>b", "<|assistant|><think>\n", "b"),
        ("<think>a", "", ""),
        ("a", "<|assistant|><think>\n", ""),
        ("a", "<think>x</think>", "a"),
        ("a", "tell me of <think> tags", "a"),
        ("[THINK]a[/THINK]b", "", "b"),
        ("[THINK]a", "", ""),
        ("<Think>a</THINK>b", "", "b"),
        ("◁think▷a", "", ""),
        ("<think>a [/THINK] b", "", ""),
        ("b", "", "b"),
    ],
)
def test_an_answer_stands_behind_its_thoughts(text: str, prompt: str, answer: str) -> None:
    assert answer_part(text, prompt) == answer


GYM: dict[str, Any] = {
    "task": "chain_sum",
    "answer": "3",
    "entry": {"question": "1 + 2", "answer": "3", "metadata": {}},
}


@pytest.mark.parametrize(
    ("rule", "reference", "answer"),
    [
        (math_answer, {"answer": "3"}, r"\boxed{3}"),
        (choice, {"answer": "B"}, "The answer is B"),
        (reasoning_gym, GYM, "3"),
    ],
)
def test_no_grader_takes_an_unfinished_thought(
    rule: Any, reference: dict[str, Any], answer: str
) -> None:
    assert rule.score(answer, reference).kind == "pass"
    assert rule.score(f"<think>I say</think>{answer}", reference).kind == "pass"
    assert rule.score(f"<think>{answer}", reference).kind == "fail"
    assert rule.score(answer, reference, prompt="<|im_start|>assistant\n<think>\n").kind == "fail"
    assert rule.score(f"x</think>{answer}", reference, prompt="<think>").kind == "pass"


def test_format_rules_see_the_tag_that_the_template_has_written() -> None:
    text = "2+2\n</think>\n<answer>4</answer>"
    tags = ["think", "answer"]
    assert format_rules.score(text, {}, tags=tags).reward == 0.0
    assert format_rules.score(text, {}, tags=tags, prompt="<|assistant|><think>\n").reward == 1.0
    limited = format_rules.score("ab", {}, max_characters=2, prompt="<think>")
    assert limited.reward == 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [("so .5", ".5"), ("1.5e3", "1.5e3"), ("1e-5", "1e-5"), ("1,234.5", "1234.5"), ("7e", "7")],
)
def test_the_last_number(text: str, number: str) -> None:
    assert extract_answer(text, "last_number") == number
    stored = str(float(number))
    given = math_answer.score(text, {"answer": stored}, extract="last_number")
    assert given.kind == "pass", given


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("答案是B", "B"),
        ("答案：Ｂ", "B"),
        ("<answer>B</answer>", "B"),
        ("<answer>The answer is (B).</answer>", "B"),
        ("Answer: `C`", "C"),
        ("I think so.\nB) because it is", "B"),
        ("A) 1\nB) 2", None),
        ("I choose B.", "B"),
        ("I would not choose B.", None),
        ("Option B is correct.", "B"),
        ("Option A is wrong. So B is the best answer.", "B"),
        ("It is not clear whether A is correct", None),
        ("Option B is not correct.", None),
        ("故选B", "B"),
        (r"The answer is \(B\).", "B"),
        ('{"answer": "B"}', "B"),
        ("Answer: <B>", "B"),
        ("The answer is “B”.", "B"),
        (r"\boxed{b}", "B"),
        ("<answer>(b)</answer>", "B"),
        ("The answer is a matter of taste", None),
        ("The answer is A's", None),
        ("The answer is A or B", None),
        ("Answer: A/B", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert choice.vote(text, {}) == letter


@pytest.mark.parametrize("stored", ["B", "(B)", "B.", "b", "(b)", r"\text{B}", "B) Paris", " B "])
def test_letters_as_data_sets_store_them(stored: str) -> None:
    choice.check_reference({"answer": stored})
    assert choice.score("Answer: B", {"answer": stored}).kind == "pass"
    assert choice.score("Answer: C", {"answer": stored}).kind == "fail"


@pytest.mark.parametrize("stored", ["", "K", "AB", "A or B", "1", None, "Paris", "b is right"])
def test_what_is_no_letter_is_refused(stored: str | None) -> None:
    with pytest.raises(ValueError, match="none of the letters"):
        choice.check_reference({"answer": stored})


def test_a_letter_at_a_cut_may_be_the_first_of_a_word() -> None:
    reference = {"answer": "B"}
    assert choice.score("The answer is B", reference, finish_reason="length").kind == "fail"
    assert choice.score("The answer is B.", reference, finish_reason="length").kind == "pass"
    assert choice.score("The answer is B", reference, finish_reason="stop").kind == "pass"


def test_votes_of_one_answer_in_many_spellings_are_one() -> None:
    halves = [r"\boxed{½}", r"\boxed{0.50}", r"\boxed{\dfrac12}", "The answer is .5", "1/2"]
    assert {math_answer.vote(text, {}) for text in halves} == {"1/2"}
    times = [r"\boxed{10:30 a.m.}", r"\boxed{\text{10:30 AM}}"]
    assert len({math_answer.vote(text, {}) for text in times}) == 1


def test_a_rule_is_told_what_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told = resolve("rule", "hostile_verifiers:told", {})
    assert told.judge("", {}, "length", "a prompt").reward == len("length a prompt")
    args = resolve("rule", "hostile_verifiers:told", {"prompt": "my own"})
    assert args.judge("", {}, "stop", "a prompt").reward == len("stop my own")
    plain = resolve("rule", "hostile_verifiers:obedient", {})
    assert plain.judge("7", {"answer": "7"}, "stop", "a prompt").reward == 1.0
