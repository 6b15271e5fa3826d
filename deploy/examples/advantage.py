"""An advantage estimator of your own: it looks at the rank of a reward in its group, not its size.

    .venv/bin/grpo-lambda train --config deploy/configs/tiny.yaml recipe=grpo \
        algorithm.baseline.kind=deploy.examples.advantage:by_rank

One extreme reward then changes no other completion's advantage. Copy it anywhere on PYTHONPATH and
name it `package.module:function`. It is tried before anything starts.
"""

from __future__ import annotations

from common.config.algorithm import BaselineConfig
from learner.algorithm.grouped import Advantages, GroupedRewards


def by_rank(rewards: GroupedRewards, config: BaselineConfig) -> Advantages:
    """(completions it beats - completions that beat it) / (G - 1), so between -1 and 1.

    V completions with a reward, in all groups of the step. metrics.jsonl gets `advantage/tied`, the
    share of completions whose advantage is 0.
    """
    rewards_V, group_V = rewards.rewards_V, rewards.group_V
    together_VV = group_V[:, None] == group_V
    beats_VV = (rewards_V[:, None] > rewards_V) & together_VV
    lead_V = (beats_VV.sum(1) - beats_VV.sum(0)).double()
    tied = float((lead_V == 0).sum()) / max(len(lead_V), 1)
    return Advantages(
        advantages_V=lead_V / (rewards.size_V - 1).clamp(min=1),
        metrics={"advantage/tied": tied},
    )
