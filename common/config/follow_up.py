"""More completions of a group, asked for after the verdicts of the first: `common.record.parts`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from common.branch_points import BranchRules
from common.config.bounds import Count, PositiveShare, at_least
from common.config.contexts import FOLLOW_UPS, template_with
from common.config.names import Names
from common.errors import UserError


@dataclass
class BranchConfig:
    """Where completions are continued anew, to measure what their first tokens are worth."""

    at: Literal["probability", "every", "separator"] = "probability"
    """Rule that says which tokens have a branch before them, besides the first. `every` takes each
    n-th, `probability` each n-th of those less probable than `below` (SPO), `separator` those
    behind a token with a `separator` (VinePPO)."""
    every: Count = 5
    """Number n of the rules `every` and `probability`."""
    below: PositiveShare = 0.9
    """Probability under which a token counts for the rule `probability`."""
    separator: str = "."
    """Text that a token has for the rule `separator`."""
    samples: Count = 9
    """Continuations of each branch."""
    most: Count = 20
    """Most branches of a completion, that at its start included. Of more, as many are kept, evenly
    apart."""

    @property
    def rules(self) -> BranchRules:
        """What chooses the tokens."""
        return BranchRules(
            separator=self.separator if self.at == "separator" else None,
            every=self.every if self.at == "every" else None,
            below=self.below if self.at == "probability" else None,
            nth_below=self.every,
            most=self.most,
            kept="ends",
        )


@dataclass
class TreeConfig:
    """Where completions are continued anew, so that a group becomes a tree that is trained on."""

    every: Count = 30
    """Tokens of a node, but for those of the last level, which run to the end of the completion. A
    completion that ends before is a leaf."""
    children: list[Annotated[int, at_least(2)]] = field(default_factory=lambda: [6, 6])
    """Children of every node, a number a level. Those of the root, which is the prompt, are
    `batch.group_size`."""

    def most_of(self, group_size: int) -> int:
        """Most completions of a group with so many children of the root: leaves if all split."""
        return group_size * math.prod(self.children)

    def reached(self, longest: int) -> int:
        """How many levels a completion of `longest` tokens can branch at."""
        return min(len(self.children), (longest - 1) // self.every)


@dataclass
class FollowUpConfig:
    """More completions of a group, asked for after the verdicts of the first."""

    kind: Annotated[str, Names("none", "refine", "hint", "critique", "branches", "tree")] = "none"
    """What is asked for (`actors.generation.follow_ups`). `refine`: the first completions are
    drafts, and `batch.group_size` others are sampled behind the best of them (iGRPO). `hint`: where
    no completion of a group is right, others take their place that were sampled behind a hint
    (Guide). `critique`: the last completion of a group is sampled behind the best of the others and
    what rules said that it lacks (RGR-GRPO). `branches`: continuations from inside of the
    completions, which measure what their first tokens are worth and are not trained on (VinePPO,
    SPO). `tree`: continuations from inside of the completions, and of these again, which are
    trained on beside them (SPO's tree)."""
    drafts: Count = 4
    """Drafts of a group under `refine`."""
    hint: Literal["solution", "answer"] = "solution"
    """What `hint` shows: what `data.solution_column` has, or the right answer."""
    template: str | None = None
    """Text of the prompt of a follow-up, with `{prompt}` and what its kind shows. That is `{draft}`
    under `refine`, `{hint}` under `hint`, `{draft}` and `{feedback}` under `critique`. Null takes
    one of `common.config.contexts`."""
    feedback_tokens: Count = 256
    """Most tokens of what rules said that `critique` shows; the first ones are kept."""
    train_behind: Literal["own", "prompt"] | None = None
    """Prompt that follow-ups are trained behind: the one that they were sampled behind (`own`), or
    that of the group. Null is `own` under `refine`, else `prompt`."""
    branch: BranchConfig = field(default_factory=BranchConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)

    @property
    def stages(self) -> int:
        """How often a group is asked, each time after the verdicts of all before."""
        return len(self.tree.children) if self.kind == "tree" else 1

    @property
    def text(self) -> str:
        """The template of a follow-up's prompt; empty where it has the group's."""
        if self.kind not in FOLLOW_UPS:
            return ""
        key = "algorithm.rollout.follow_up"
        usual, by = FOLLOW_UPS[self.kind], f"{key}.kind={self.kind}"
        return template_with(_SHOWN[self.kind], usual, self.template, f"{key}.template", by)

    @property
    def slots(self) -> list[str]:
        """What the template has places for besides the prompt, in their order."""
        return sorted(_SHOWN.get(self.kind, ()), key=lambda slot: self.text.find(f"{{{slot}}}"))

    @property
    def behind_own(self) -> bool:
        """Whether follow-ups are trained behind the prompt that they were sampled behind."""
        usual = "prompt" if self.kind in ("hint", "critique") else "own"
        return (self.train_behind or usual) == "own"

    def most_of(self, group_size: int) -> int:
        """Most completions of a part of a group of `group_size`, under a rule of ours."""
        if self.kind == "branches":
            return group_size * self.branch.samples * self.branch.most
        if self.kind == "tree":
            return self.tree.most_of(group_size)
        return max(group_size, self.first_of(group_size))

    def most_learnt(self, group_size: int) -> int:
        """Most completions that the learner gets of a group, under a rule of ours."""
        return self.tree.most_of(group_size) if self.kind == "tree" else group_size

    def fits(self, learnt: int, group_size: int) -> bool:
        """Whether a group of so many completions is one that the learner may get now."""
        return group_size <= learnt <= self.most_learnt(group_size)

    def first_of(self, group_size: int) -> int:
        """Completions that are asked for first in a group of `group_size`."""
        return {"refine": self.drafts, "critique": group_size - 1}.get(self.kind, group_size)


_SHOWN: Mapping[str, Sequence[str]] = {
    "refine": ("draft",),
    "critique": ("draft", "feedback"),
    "hint": ("hint",),
}
"""What a follow-up's prompt shows besides the question, by its kind."""


def check_follow_up(config: Any) -> None:
    """Refuse follow-ups beside what cannot be under them.

    Args:
        config: the whole configuration (`common.config.sections.Config`).

    Raises: `UserError`.
    """
    follow_up = config.algorithm.rollout.follow_up
    _check_sampled(config.algorithm.advantage.kind, follow_up)
    if follow_up.kind == "none":
        return
    key = f"algorithm.rollout.follow_up.kind={follow_up.kind}"
    if follow_up.first_of(config.batch.group_size) < 1:
        raise UserError(
            f"{key} improves on the best of batch.group_size - 1 completions, and "
            f"batch.group_size={config.batch.group_size} leaves none: use at least 2"
        )
    check_single_answers(
        config,
        key,
        elsewhere=bool(follow_up.text) and not follow_up.behind_own,
        mixed=follow_up.kind == "critique" and follow_up.behind_own,
    )
    if follow_up.kind == "tree":
        _check_tree(follow_up.tree, config.generator.max_completion_tokens)


def check_single_answers(config: Any, key: str, *, elsewhere: bool, mixed: bool) -> None:
    """Refuse what needs all completions of a group to begin and to be scored alike.

    Args:
        config: the whole configuration (`common.config.sections.Config`).
        key: the key that has some sampled behind another prompt, and its value.
        elsewhere: whether they are trained behind the group's all the same.
        mixed: whether completions of a group are trained behind different prompts.

    Raises: `UserError`.
    """
    environment, rollout = config.environment, config.algorithm.rollout
    advantage, objective = config.algorithm.advantage, config.algorithm.objective
    baseline = config.algorithm.baseline
    wrong = {
        f"environment.name={environment.name}": environment.name is not None,
        "environment.command": environment.command is not None,
        f"algorithm.rollout.guidance.ratio={rollout.guidance.ratio:g}": rollout.guidance.ratio > 0,
        "algorithm.rollout.greedy=true": rollout.greedy,
        f"algorithm.advantage.context={advantage.context}": (
            advantage.scorer is not None and advantage.context != "prompt"
        ),
        "algorithm.advantage.kind=prefix_values, which compares completions of one prompt,": (
            mixed and advantage.kind == "prefix_values"
        ),
        # These go by log-probabilities of the sampler, which read another prompt.
        f"algorithm.advantage.scorer={advantage.scorer} against the sampler": (
            elsewhere and advantage.scorer is not None and advantage.against != "policy"
        ),
        "algorithm.objective.kl_in=reward": (
            elsewhere and objective.kl > 0 and objective.kl_in == "reward"
        ),
        "algorithm.baseline.kind=disco with negatives=softmax": (
            elsewhere and baseline.kind == "disco" and baseline.args.get("negatives") == "softmax"
        ),
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise UserError(
            f"{key} and {found[0]} do not go together: it is for single answers, each "
            "begun by the policy, and scored behind its own prompt. Set one of them off"
        )


def _check_sampled(rule: str, follow_up: FollowUpConfig) -> None:
    """Refuse a rule of the advantage axis that goes by what nobody samples."""
    needs = {"branch_values": ("branches", "branches"), "tree_values": ("a tree", "tree")}
    if rule not in needs:
        return
    what, kind = needs[rule]
    own = rule == "tree_values" and ":" in follow_up.kind  # a rule of one's own may grow trees
    if follow_up.kind != kind and not own:
        raise UserError(
            f"algorithm.advantage.kind={rule} goes by {what}, and "
            f"algorithm.rollout.follow_up.kind={follow_up.kind} samples none: set it to {kind}"
        )


def _check_tree(tree: TreeConfig, longest: int) -> None:
    """Refuse a tree in which nothing could branch."""
    key = "algorithm.rollout.follow_up.tree"
    if not tree.children:
        raise UserError(
            f"{key}.children=[] has no level below the children of the root, which are "
            "batch.group_size: name one or more, or use algorithm.rollout.follow_up.kind=none"
        )
    if not tree.reached(longest):
        raise UserError(
            f"{key}.every={tree.every} leaves no completion to branch, since all end by "
            f"generator.max_completion_tokens={longest}: lower it, to a third of a usual answer"
        )
