"""What the control plane passes around: requests and receipts, never tokens of completions.

The tokens travel as Arrow record batches (`common.record.schema`) behind object references.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from common.config.follow_up import FollowUpConfig
from common.record.episodes import EpisodeSums
from common.record.parts import NOTHING, Aside
from common.supervision.calls import Ref

if TYPE_CHECKING:
    import pyarrow as pa


def ticket_seed(seed: int, ticket: int) -> int:
    """Seed of the samples of a ticket, or of an evaluation's problem; sample i adds i."""
    digest = hashlib.sha256(f"{seed}/{ticket}".encode()).digest()
    return int.from_bytes(digest[:6])


def group_seed(seed: int | None, ticket: int) -> int | None:
    """Seed of a group's samples and of its environment; `seed` is `Config.sampling_seed`."""
    return None if seed is None else ticket_seed(seed, ticket)


@dataclass(frozen=True)
class Begun:
    """The beginning of an episode on record, from which others go on."""

    token_ids: tuple[int, ...]
    """Behind the prompt, with what was given to the policy between its turns."""
    turns: tuple[tuple[int, int, str], ...]
    """First token of each turn, the one behind its last, and why it ended. The last turn is to be
    gone on with where it has no such reason."""
    seed: int
    """Seed of the environment in which it was played."""


class Behind(NamedTuple):
    """What a completion is sampled behind in the place of its group's prompt."""

    token_ids: tuple[int, ...] = ()
    """Empty: the group's prompt."""
    text: str = ""
    """What it is trained behind as well, as a text; empty: it is trained behind the group's
    prompt."""


@dataclass(frozen=True)
class GroupRequest:
    """Sample `num_completions` completions of one prompt."""

    group_id: int
    ticket: int
    """The prompt's place in the order of serving, over all epochs; -1 outside training."""
    prompt_id: str
    epoch: int
    question: str
    prompt_text: str
    """The question in its template."""
    prompt_ids: list[int]
    reference: str
    num_completions: int
    max_tokens: int
    temperature: float
    dispatch_version: int
    """Version every live generator held when the group was dispatched."""
    dispatched_s: float
    guidance_ids: tuple[int, ...] = ()
    """First tokens of a reference solution; they lead the last `num_guided` completions."""
    num_guided: int = 0
    mask_guidance: bool = True
    greedy: bool = False
    """Whether the first completion is sampled at temperature 0 and stays out of the loss."""
    source: str = ""
    """Name of the prompt's data set, among several."""
    seed: int | None = None
    """Seed of this group's samples; None leaves them to the engine's random state."""
    cap_s: float | None = None
    """Seconds after which completions still being sampled are aborted and left out."""
    context_ids: tuple[int, ...] = ()
    """What a scorer reads in the place of the prompt (`common.config.contexts`)."""
    answer_pattern: str = ""
    """Regular expression of the answer in a completion; empty where nobody asks where it stands."""
    follow_up: FollowUpConfig | None = None
    """What is asked for after the verdicts; None: nothing."""
    follow_up_ids: tuple[int, ...] = ()
    """What that is sampled behind, where it is another prompt; with a hole for what is known only
    then (`common.config.contexts`)."""
    num_follow_up: int = 0
    """Completions of the learner's that a follow-up samples, where it samples any."""
    part: str = ""
    """Name of the part of the group that these are (`common.record.parts`)."""
    first_index: int = 0
    """Index in the group of the first of these completions."""
    continues: int | None = None
    """Index of the completion whose first tokens, `guidance_ids`, these go on from."""
    sampled_behind: tuple[int, ...] = ()
    """What is sampled behind where that is not `prompt_ids`, behind which is trained."""
    behind: tuple[Behind, ...] = ()
    """What each completion is sampled behind, by its index, where they differ."""
    begun: Begun | None = None
    """How every episode of the group begins, in an environment that is brought there again."""

    def apart(self) -> list[GroupRequest]:
        """A request for every stretch of completions that are sampled behind the same."""
        if not any(each.token_ids for each in self.behind):
            return [self]
        found, first = [], self.first_index
        for prompt, same in groupby(self.behind):
            one = replace(self, num_completions=len(list(same)), first_index=first, behind=())
            if prompt.text:
                one = replace(one, prompt_ids=list(prompt.token_ids), prompt_text=prompt.text)
            else:
                one = replace(one, sampled_behind=prompt.token_ids)
            found.append(one)
            first += one.num_completions
        return found


@dataclass(frozen=True)
class GroupReceipt:
    """A verified group that is in the trajectory log."""

    group_id: int
    ticket: int
    batch_ref: Ref[pa.RecordBatch] | None
    """The group's record batch; None as long as only the log's client knows it."""
    dispatch_version: int
    min_version: int
    """Oldest weight version any token was sampled with."""
    max_version: int
    """Newest weight version any token was sampled with, those of probes included."""
    num_completions: int
    """Completions that the learner gets. Drafts and probes count in no field but their own."""
    num_tokens: int
    """Tokens that were sampled: guidance does not count."""
    reward_mean: float
    rewards_equal: bool
    """Whether all completions have the same reward, so that the group carries no advantage."""
    num_unscored: int
    """Completions whose verdict was `error` or `timeout`."""
    unscored_tokens: int
    """Tokens of these completions."""
    generate_s: float
    """Seconds from dispatch to the last completion, that of a follow-up included, or probe."""
    accuracy_mean: float = float("nan")
    """Mean of the first verifier's reward, over the completions that have one."""
    num_compared: int = 0
    """Completions with a reward that others are compared with: no token of theirs is in the loss.
    """
    compared_tokens: int = 0
    """Tokens of these completions."""
    source: str = ""
    """Name of the data set that the prompt is from, among several."""
    suspicious: tuple[str, ...] = ()
    """One entry a completion that touched a wall of the sandbox: the kinds, joined by commas. Those
    of drafts are among them, those of probes are not."""
    episodes: EpisodeSums | None = None
    """What the episodes of the group add up to; None where they were played in no environment."""
    drafts: Aside = NOTHING
    probes: Aside = NOTHING
    suspicious_probes: tuple[str, ...] = ()
    """One entry a probe that touched a wall of the sandbox: the kinds, joined by commas."""

    @property
    def every(self) -> Aside:
        """All that was sampled of the group."""
        return Aside(
            self.num_completions + self.drafts.completions + self.probes.completions,
            self.num_tokens + self.drafts.tokens + self.probes.tokens,
        )

    @property
    def unjudged(self) -> bool:
        """Whether no completion has a reward."""
        return self.num_unscored == self.num_completions


def batch_refs(receipts: Iterable[GroupReceipt]) -> list[Ref[pa.RecordBatch]]:
    """The record batches of groups.

    Raises:
        ValueError: a receipt is not complete: the trajectory log's client completes them.
    """
    refs = []
    for receipt in receipts:
        if receipt.batch_ref is None:
            raise ValueError(f"the receipt of group {receipt.group_id} has no batch_ref")
        refs.append(receipt.batch_ref)
    return refs
