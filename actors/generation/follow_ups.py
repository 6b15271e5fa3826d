"""What a group asks for after the verdicts of its first completions: `algorithm.rollout.follow_up`.

    refine    G others behind the best of the drafts, whatever it was worth (iGRPO)
    hint      G others behind a hint, where no completion was right (Guide)
    critique  the last of G, behind the best of the others and what it lacks (RGR-GRPO)
    branches  K continuations from some tokens of every completion (VinePPO, SPO)
    tree      continuations from every n-th token, and of these again, to be trained on (SPO)

A rule is a pure function of the first completions, one of these or `package.module:name`. It runs
in a generator, since tokens never pass through the coordinator. `follow_ups` makes requests of what
it asks for. The staleness bound holds as it is: what is sampled later has no older weights than
those under which the group was dispatched.

Sources: arXiv 2602.09000 (iGRPO), 2506.13923 (Guide), 2511.12344 (RGR-GRPO), 2410.01679
(VinePPO), 2505.23564 (SPO). Evidence: [P] paper, [3P] third parties, [I] interpretation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from actors.data.contexts import filled_in
from common.branch_points import branch_points
from common.config.contexts import HOLE
from common.config.follow_up import BranchConfig, FollowUpConfig
from common.config.names import import_named
from common.record.parts import JOINS, PROBE, REPLACES
from common.trajectory import GroupRequest


@dataclass(frozen=True)
class Said:
    """A completion that has been judged."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    reward: float | None
    accuracy: float | None
    feedback: str = ""
    """What its rules say that it lacks."""
    given: int = 0
    """First tokens that were given to the policy."""
    continues: int = -1
    """Index of the completion that these are of; -1: of none."""


@dataclass(frozen=True)
class Texts:
    """How texts become tokens, and tokens texts."""

    fill: Callable[[Mapping[str, str]], list[int]]
    """(text by slot) -> `GroupRequest.follow_up_ids` with these texts in their holes."""
    decode: Callable[[list[int]], str]


def follow_up_texts(request: GroupRequest, tokenizer: Any) -> Texts:
    """Texts and tokens of a request's follow-ups, by a Hugging Face tokenizer."""

    def fill(said: Mapping[str, str]) -> list[int]:
        ids, config = list(request.follow_up_ids), request.follow_up
        assert config is not None, "a request without a follow-up"
        for slot in config.slots:  # each has the first hole that is left
            most = config.feedback_tokens if slot == "feedback" else request.max_tokens
            ids = filled_in(ids, said[slot], tokenizer, most)
        return ids

    def decode(token_ids: list[int]) -> str:
        plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(token_ids, **plain))

    return Texts(fill, decode)


Rule = Callable[[GroupRequest, FollowUpConfig, Sequence[Said], Texts], list[GroupRequest]]


def said(batches: Sequence[pa.RecordBatch]) -> list[Said]:
    """The completions of judged batches, by index."""
    names = (
        *("completion_index", "text", "token_ids", "behaviour_logprobs"),
        *("reward", "accuracy", "feedback", "guidance_length", "continues"),
    )
    rows = [
        Said(*row)
        for batch in batches
        for row in zip(*(batch.column(name).to_pylist() for name in names), strict=True)
    ]
    return sorted(rows, key=lambda each: each.index)


def follow_ups(request: GroupRequest, first: Sequence[Said], texts: Texts) -> list[GroupRequest]:
    """What is asked for now; nothing where what was asked for before is not whole.

    Args:
        first: all completions so far: the first, and under a rule of several stages later ones.

    Each is a request for completions of one kind that begin alike, with their place in the group.
    """
    config = request.follow_up
    if config is None or len(first) < request.num_completions:
        return []
    asked, index = [], request.num_completions
    for each in rule_of(config)(request, config, first, texts):
        asked.append(replace(each, first_index=index, greedy=False, follow_up=None))
        index += each.num_completions
    return asked


def rule_of(config: FollowUpConfig) -> Rule:
    """The rule that `kind` names; raises `UserError` for one that cannot be imported."""
    if config.kind in RULES:
        return RULES[config.kind]
    own: Rule = import_named("algorithm.rollout.follow_up.kind", config.kind, tuple(RULES))
    return own


def refine(
    request: GroupRequest, config: FollowUpConfig, first: Sequence[Said], texts: Texts
) -> list[GroupRequest]:
    """G completions behind the draft of highest reward, the first of equals [P; first: I].

    It may be wrong: all drafts being wrong is no reason not to refine [P]. Without any reward there
    is nothing to choose by, and the group fails as one that nobody could judge.
    """
    best = _best(first)
    if best is None:
        return []
    return [_behind(request, config, texts.fill({"draft": best.text}), texts)]


def critique(
    request: GroupRequest, config: FollowUpConfig, first: Sequence[Said], texts: Texts
) -> list[GroupRequest]:
    """The last completion of the group, behind the best so far and what it lacks [3P; first: I].

    Where that lacks nothing, the last one is sampled as the others were [3P].
    """
    best = _best(first)
    if best is None:
        return []
    last = replace(request, part=JOINS, num_completions=request.num_follow_up - len(first))
    if not best.feedback:
        return [last]
    shown = {"draft": best.text, "feedback": best.feedback}
    return [_sampled_behind(last, config, texts.fill(shown), texts)]


def hint(
    request: GroupRequest, config: FollowUpConfig, first: Sequence[Said], texts: Texts
) -> list[GroupRequest]:
    """G completions behind the hint in place of those without it, where all of these failed [P].

    A completion that nobody could judge has not failed. A question without a hint stays as it is.
    """
    failed = all(each.accuracy is not None and each.accuracy <= 0 for each in first)
    if not failed or request.follow_up_ids == (HOLE,):
        return []
    return [_behind(request, config, list(request.follow_up_ids), texts)]


def branches(
    request: GroupRequest, config: FollowUpConfig, first: Sequence[Said], texts: Texts
) -> list[GroupRequest]:
    """K continuations from the start of each completion, and from tokens that `branch.at` names."""
    return [
        replace(
            request,
            part=PROBE,
            continues=one.index,
            num_completions=config.branch.samples,
            guidance_ids=tuple(one.token_ids[:at]),
            num_guided=config.branch.samples if at else 0,
            mask_guidance=True,
        )
        for one in first
        for at in points_of(one, config.branch, texts.decode)
    ]


def tree(
    request: GroupRequest, config: FollowUpConfig, first: Sequence[Said], texts: Texts
) -> list[GroupRequest]:
    """Siblings of every node that is there and has none yet, each to its end.

    The node of level k ends behind k n tokens. A completion is the first child of each of its
    nodes, and what is asked for are the others; they are children of the prefix in the same law
    [D]. Asked again, it goes on with the nodes of these, so that level follows level. Where a
    completion has ended there is no branch, and none inside of what ended it.
    """
    every, children = config.tree.every, config.tree.children
    grown = {(one.continues, one.given) for one in first}
    return [
        replace(
            request,
            part=JOINS,
            continues=one.index,
            num_completions=count - 1,
            guidance_ids=tuple(one.token_ids[:at]),
            num_guided=count - 1,
            mask_guidance=True,
        )
        for one in first
        for at, count in zip(range(every, every * len(children) + 1, every), children, strict=True)
        if at > one.given and (one.index, at) not in grown and _goes_on(one, at, texts.decode)
    ]


def _goes_on(one: Said, at: int, decode: Callable[[list[int]], str]) -> bool:
    """Whether the completion goes on behind its first `at` tokens.

    A prefix that the text does not begin with has a part of what ended the completion.
    """
    return at < len(one.token_ids) and one.text.startswith(decode(one.token_ids[:at]))


def points_of(one: Said, config: BranchConfig, decode: Callable[[list[int]], str]) -> list[int]:
    """Numbers of first tokens behind which a completion is continued, ascending, 0 first."""
    if not one.token_ids:
        return []
    return branch_points(
        lambda t: decode([one.token_ids[t]]),
        one.logprobs,
        config.rules,
        may_be=lambda t: _goes_on(one, t, decode),
    )


def _behind(
    request: GroupRequest, config: FollowUpConfig, prompt_ids: list[int], texts: Texts
) -> GroupRequest:
    """The learner's completions of the group, sampled behind another prompt."""
    asked = replace(request, part=REPLACES, num_completions=request.num_follow_up)
    return _sampled_behind(asked, config, prompt_ids, texts)


def _sampled_behind(
    asked: GroupRequest, config: FollowUpConfig, prompt_ids: list[int], texts: Texts
) -> GroupRequest:
    if not config.behind_own:
        return replace(asked, sampled_behind=tuple(prompt_ids))
    return replace(asked, prompt_ids=prompt_ids, prompt_text=texts.decode(prompt_ids))


def _best(first: Sequence[Said]) -> Said | None:
    """The completion of highest reward, the first of equals; None where none was judged."""
    judged = [(one.reward, one) for one in first if one.reward is not None]
    return max(judged, key=lambda pair: (pair[0], -pair[1].index))[1] if judged else None


def _nothing(
    request: GroupRequest, config: FollowUpConfig, first: Sequence[Said], texts: Texts
) -> list[GroupRequest]:
    return []


RULES: Mapping[str, Rule] = {
    "none": _nothing,
    "refine": refine,
    "hint": hint,
    "critique": critique,
    "branches": branches,
    "tree": tree,
}
