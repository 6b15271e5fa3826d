"""The tables of `compare.py`: which recipes each of them holds against each other.

With one optimiser step a batch, as in `recipes`, the policy is the old one at every step: no clip
binds, and ε-trace and ε-weight differ only in where the off-policy correction stands (S = 1).
`epochs` trains twice on every batch. `updates` has clips that act: several updates a batch, as the
papers have them, or ratios to the sampler, with generation one version behind. A step has 8 prompts
here, so DAPO's 16 updates are 8.

`staleness` compares plain and cut traces on the advantage, where the correction belongs to the
token it weighs (`learner/algorithm/traces.py`), and `long` does so on sums of four digits, whose
answers are half as long again, from a warm start on such sums.

Traces are those of the papers, not normalised; where a row says otherwise, its label does.

The task: an answer of the tiny preset is either worked out in steps or blurted, which its first
tokens decide, and only the number at its end is paid for. A rule that moves credit towards early
tokens has something to gain here. `guidance` asks for sums of five digits, where the warm start
has seen only three: without help almost no completion is right.

`teachers` has credit from a scorer. That of OPD is a larger model, made on the spot, which was
shown no hasty answer: what it teaches is beyond what rewards say. RLSD's is the warm model with the
answer before it, SDPO's an average of the policy with a right answer of the group. TEMPO and KTAE
have the group alone, VAPO a critic, which has ten of the 60 steps to itself instead of fifty.

`guess` is of episodes: a number from 1 to 8 in four turns, by the preset `tiny-guess`. Only the end
is paid for, but what decided it is a guess of some turn. Credit goes to turns by the decay of a
trace, or by an advantage of each turn. MT-GRPO's has rewards of turns: a guess that was ruled out
costs a quarter, and the last turn gives it back.

`letters` is of the tasks of the study of credit (`credit_tasks.py`), whose true credit is known: of
eight letters an early, a middle, or a late one decides. Traces have no clamp there. VinePPO has the
values that four continuations of every token measure, sampled beside as many answers as the others
have. Held-out accuracy is greedy there: a letter that is right or not, for four prompts.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from credit_tasks import LENGTH, PLACES, build

from deploy.models.tiny_model import build_teacher, build_tiny
from deploy.models.warm_start import solution


@dataclass(frozen=True)
class Row:
    """One line of a table: a recipe and what differs from it."""

    label: str
    recipe: str
    overrides: tuple[str, ...] = ()
    preset: str = "tiny"


def rows_of(table: str, runs: Path) -> list[Row]:
    """The rows of `table`. Raises `SystemExit` for an unknown one."""
    if table == "recipes":
        return [*_baselines(), *_traces(), *_beyond()]
    if table == "staleness":
        return _cut_traces()
    if table == "long":
        task = _longer_sums(runs / "warm-started-on-four-digits")
        return [replace(row, overrides=(*row.overrides, *task)) for row in _cut_traces()]
    if table == "epochs":
        return _two_epochs()
    if table == "updates":
        return _updates()
    if table == "teachers":
        return _teachers(runs / "teacher")
    if table == "guess":
        return _turns()
    if table == "letters":
        return _letters(runs / "letters")
    if table == "guidance":
        task = _worked_sums(runs / "five-digits.jsonl", 5)
        guided = "algorithm.rollout.guidance"
        return [
            Row("GRPO", "grpo", task),
            Row(
                "G2RPO-A, 1/4 guided",
                "g2rpo_a",
                (*task, f"{guided}.max_tokens=24"),
            ),
            Row(
                "G2RPO-A, 3/4 guided",
                "g2rpo_a",
                (*task, f"{guided}.max_tokens=24", f"{guided}.ratio=0.75"),
            ),
        ]
    raise SystemExit(f"no table {table!r}: use one of {', '.join(TABLES)}")


TABLES = (
    "teachers",
    "guess",
    "letters",
    "guidance",
    "staleness",
    "long",
    "epochs",
    "updates",
    "recipes",
)


def _cut_traces() -> list[Row]:
    """The cut's product bounded as a whole, or factor by factor."""
    by_factor = ("algorithm.credit.args={cut_by_factor: true}",)
    return [
        Row(f"{label}, S = {staleness}", recipe, (f"generator.max_staleness={staleness}", *more))
        for staleness in (0, 2, 8)
        for label, recipe, more in (
            ("plain traces", "grpo_lambda_recent_weight", ()),
            ("cut by the product", "grpo_lambda_cut", ()),
            ("cut by factors", "grpo_lambda_cut", by_factor),
        )
    ]


def _turns() -> list[Row]:
    """Credit over turns. Traces are normalised: each episode's loss weighs as much as without."""

    def row(label: str, *overrides: str) -> Row:
        return Row(label, "grpo", ("steps=24", "eval.prompts=200", *overrides), "tiny-guess")

    def trace(decay: str) -> tuple[str, ...]:
        traced = ("kind=lambda_trace", "lambda_=0.99", "normalize=mean", f"turn_decay={decay}")
        return tuple(f"algorithm.credit.{key}" for key in traced)

    def advantage(kind: str) -> str:
        return f"algorithm.advantage.kind={kind}"

    return [
        row("trajectory"),
        row("trajectory, trace", *trace("null")),
        row("trajectory, trace, turn decay 0.8", *trace("0.8")),
        row("trajectory, trace, turn decay 0", *trace("0")),
        row("return", advantage("turn_return")),
        row("anchor (GiGPO)", advantage("turn_anchor")),
        row(
            "outcome+turn (MT-GRPO)",
            advantage("turn_outcome"),
            "environment.args={waste: 0.25}",
        ),
    ]


def _teachers(folder: Path) -> list[Row]:
    """Credit from a scorer, and from the group alone. See the module."""
    if not (folder / "tokenizer.json").is_file():
        build_teacher(folder)
    teacher = (f"teacher.path={folder}",)
    return [
        Row("GRPO", "grpo"),
        Row("OPD, larger teacher", "opd", teacher),
        Row("GRPO and OPD, larger teacher", "grpo_opd", teacher),
        Row("RLSD", "rlsd"),
        Row("RLSD, scorer follows the policy", "rlsd", ("algorithm.advantage.scorer=ema",)),
        Row("SDPO", "sdpo", ("algorithm.advantage.context_template='{sibling} {prompt}'",)),
        Row("TEMPO", "tempo"),
        Row("KTAE", "ktae"),
        Row("VAPO", "vapo", ("algorithm.advantage.critic.pretrain_steps=10",)),
    ]


def _letters(folder: Path) -> list[Row]:
    """Rules on tasks whose credit is known, each with the place of the letter that decides."""
    if not (folder / "tokenizer.json").is_file():
        build(folder)
    branch = "algorithm.rollout.follow_up.branch"
    every_token = (f"{branch}.at=every", f"{branch}.every=1", f"{branch}.samples=4")
    trace = ("algorithm.baseline.min_advantage=null", "algorithm.credit.lambda_=0.99")
    rules = (
        ("GRPO", "grpo", ()),
        ("trace, λ = 0.99", "grpo_lambda_recent", trace),
        ("terminal trace, λ = 0.99", "grpo_lambda_terminal", trace),
        ("TEMPO", "tempo", ()),
        ("VinePPO", "vineppo", every_token),
    )
    return [
        Row(
            f"{name} letter: {label}",
            recipe,
            (
                f"model.path={folder}",
                f"verifier.rules=[{{name: credit_tasks:decided_by, args: {{place: {place}}}}}]",
                f"generator.max_completion_tokens={LENGTH}",
                "generator.max_staleness=0",
                # Logits of what has been learnt here are far from 0, and round accordingly.
                "weights.canary_tolerance=0.01",
                "steps=30",
                "eval.prompts=4",
                *more,
            ),
        )
        for name, place in PLACES.items()
        for label, recipe, more in rules
    ]


def _updates() -> list[Row]:
    """Clips that act, at a staleness of 1."""
    one, four = (f"algorithm.objective.updates_per_batch={count}" for count in (1, 4))
    sampler = "algorithm.objective.anchor=behaviour"
    mean = "algorithm.credit.normalize=mean"
    window = _far_from_the_limit()
    return [
        Row("GRPO, 1 update", "grpo", (one,)),
        Row("GRPO, 4 updates", "grpo", (four,)),
        Row("GRPO, ratio to the sampler", "grpo", (sampler,)),
        Row("DAPO, 8 updates", "dapo", (window,)),
        Row("GSPO, 4 updates", "gspo"),
        Row("GSPO, ratio to the sampler", "gspo", (one, sampler)),
        Row("GMPO, 8 updates", "gmpo"),
        Row("CISPO, 1 update", "cispo", (one,)),
        Row("CISPO, ratio to the sampler", "cispo", (one, sampler)),
        Row("SAPO, ratio to the sampler", "sapo"),
        Row("DPPO, ratio to the sampler", "dppo"),
        Row("VESPO, ratio to the sampler", "vespo"),
        Row("GRPO-λ recent ε-trace, 4 updates", "grpo_lambda_recent", (four,)),
        Row("GRPO-λ recent ε-weight, 4 updates", "grpo_lambda_recent_weight", (four,)),
        Row("GRPO-λ recent ε-trace, ratio to the sampler", "grpo_lambda_recent", (sampler,)),
        Row("GRPO-λ recent ε-trace, normalised", "grpo_lambda_recent", (mean,)),
        Row("S-trace-like, 4 updates", "s_trace_like", (four,)),
    ]


def _far_from_the_limit() -> str:
    """Nearly all right answers take 13 to 17 of 24 tokens, which DAPO should not punish."""
    return f"algorithm.rollout.overlong_penalty_share={2 / 24}"


def _baselines() -> list[Row]:
    once = (  # one update, as all rows of the table; mask and penalty as they were measured
        _far_from_the_limit(),
        "algorithm.objective.updates_per_batch=1",
        "algorithm.rollout.mask_truncated=true",
        "algorithm.rollout.overlong_penalty_factor=1",
    )
    return [
        Row("GRPO", "grpo"),
        Row("Dr. GRPO", "dr_grpo"),
        Row("DAPO", "dapo", once),
    ]


def _lambda_recipes() -> dict[str, str]:
    """GRPO-lambda: the trace's two shapes, inside the ratio or as a weight; recipes by label."""
    return {
        f"GRPO-λ {shape} {application}": f"grpo_lambda_{shape}{name}"
        for shape in ("recent", "both")
        for application, name in (("ε-trace", ""), ("ε-weight", "_weight"))
    }


def _traces() -> list[Row]:
    """GRPO-lambda, clamp on or off."""
    unclamped = ("algorithm.baseline.min_advantage=null",)
    return [
        Row(f"{label}{suffix}", recipe, overrides)
        for label, recipe in _lambda_recipes().items()
        for suffix, overrides in (("", ()), (", no clamp", unclamped))
    ]


def _two_epochs() -> list[Row]:
    """Where inside and outside the ratio are two things: see the module."""
    twice = ("algorithm.objective.epochs=2",)
    recipes = {"GRPO": "grpo"} | _lambda_recipes()
    return [Row(f"{label}, two epochs", recipe, twice) for label, recipe in recipes.items()]


def _beyond() -> list[Row]:
    return [
        Row("λ-GRPO (2510.06870)", "lambda_grpo"),
        Row("λ-GRPO, prefix sets (2509.21154)", "lambda_grpo_prefix"),
        Row("selective traces", "grpo_lambda_entropy_mask"),
        Row("terminal trace (ablation)", "grpo_lambda_terminal"),
        # What else the recipe of GRPO-lambda brings, and whether one rate suits both.
        Row("GRPO, advantages clamped", "grpo", ("algorithm.baseline.min_advantage=-0.1",)),
        Row("GRPO, twice the learning rate", "grpo", ("learner.learning_rate=3.0e-4",)),
    ]


def _longer_sums(folder: Path) -> tuple[str, ...]:
    """The keys of sums of four digits, for a model that is warm-started on them into `folder`.

    Twice as long as usual. As long as on three digits it had 33 % of right answers, and learned
    nothing in 60 steps.
    """
    if not (folder / "tokenizer.json").is_file():
        build_tiny(folder, terms=4, times=2)
    return (
        f"model.path={folder}",
        "data.reasoning_gym.params.min_terms=4",
        "data.reasoning_gym.params.max_terms=4",
        "generator.max_completion_tokens=40",
    )


def _worked_sums(path: Path, count: int) -> tuple[str, ...]:
    """Sums of `count` digits with worked solutions, as a file; the keys that train on it."""
    draw = random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for _ in range(2500):
            terms = [str(draw.randint(0, 9)) for _ in range(count)]
            expression = terms[0] + "".join(f" {draw.choice('+-')} {t}" for t in terms[1:])
            worked = solution(expression)
            row = {
                "prompt": f"State the final answer to the following arithmetic problem: "
                f"{expression} =",
                "answer": worked.rpartition("=")[2],
                "solution": f" {worked}",
            }
            file.write(json.dumps(row) + "\n")
    return (
        "data.source=file",
        f"data.path={path}",
        "data.solution_column=solution",
        "verifier.rules=[{name: math_answer, args: {extract: last_number}}]",
        "generator.max_completion_tokens=40",
    )
