"""Every metric that a run writes: its name, its unit, what it means and who writes it.

`METRICS` is the contract behind `metrics.jsonl`, the sinks and Ray's gauges. The reference in
common/README.md is made from it by `python tests/support/metric_table.py`. Tests hold that each
name in the code stands here, and that each name here stands in the code of its writer.

A step's record has the metrics that were measured in that step. Step 0, before training, has the
evaluation, the canary and the policy's version alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What one number of a record means."""

    unit: str
    """`share` is between 0 and 1; `count` a whole number; `nats` of log-probability."""
    meaning: str
    writer: str
    """Module that writes it, as a path from the top of the repository."""


_LOSS = "learner/algorithm/loss.py"
_DATA = "learner/training/batch_checks.py"
_TRAINER = "learner/training/trainer.py"
_RANK = "learner/training/rank.py"
_LOOP = "learner/loop.py"
_PUBLISH = "learner/weights/publish.py"
_AGGREGATION = "learner/algorithm/aggregation.py"
_BOOK = "actors/rollout/group_book.py"
_GUIDANCE = "actors/rollout/guidance.py"
_EVALUATION = "actors/rollout/evaluate.py"
_LOG = "common/record/writer.py"
_METRICS = "common/record/metrics.py"

METRICS: dict[str, Metric] = {
    # What was sampled, and how good it was.
    "reward/mean": Metric("reward", "Mean reward of the step's completions.", _DATA),
    "reward/accuracy": Metric("reward", "Mean of the first verifier's reward.", _DATA),
    "reward/kl_penalty": Metric(
        "reward", "Mean KL penalty that was taken off the rewards (`kl_in: reward`).", _TRAINER
    ),
    "completion_length/mean": Metric("tokens", "Mean length of a completion.", _DATA),
    "completions/unscored": Metric(
        "count", "Completions without a reward: a verifier failed or timed out.", _LOOP
    ),
    "verdict/suspicious": Metric(
        "count",
        "Completions whose program touched a wall of the sandbox; a rising curve is the first sign "
        "of reward hacking.",
        _LOOP,
    ),
    "verdict/suspicious/files": Metric(
        "count", "Completions whose program tried to open or change files of others.", _LOOP
    ),
    "verdict/suspicious/judge": Metric(
        "count", "Completions whose program ended the process that ran it.", _LOOP
    ),
    "verdict/suspicious/kernel": Metric(
        "count", "Completions whose program asked the kernel for what no program needs.", _LOOP
    ),
    "verdict/suspicious/network": Metric(
        "count", "Completions whose program tried to open sockets.", _LOOP
    ),
    "verdict/suspicious/processes": Metric(
        "count", "Completions whose program tried to start or to reach processes.", _LOOP
    ),
    "completions/zero_advantage": Metric(
        "count", "Completions whose advantage is 0, so that they teach nothing.", _DATA
    ),
    "groups/equal_rewards": Metric(
        "count", "Groups of the step whose completions all have the same reward.", _LOOP
    ),
    "groups/dispatched": Metric("count", "Groups sent out since the run or resume began.", _BOOK),
    "groups/filtered": Metric("count", "Of these, left out by dynamic sampling.", _BOOK),
    "groups/abandoned": Metric(
        "count", "Of these, given up: too slow, or lost with a process.", _BOOK
    ),
    "guidance/length": Metric(
        "tokens", "Length of the guidance that the next groups get (G2RPO-A).", _GUIDANCE
    ),
    "tokens/generated": Metric("tokens", "Tokens of the step's completions.", _LOOP),
    "tokens/trained": Metric("tokens", "Of these, tokens with a part in the loss.", _DATA),
    "staleness/mean": Metric(
        "versions", "Mean age of a trained token: learner's version minus the token's.", _DATA
    ),
    "staleness/max": Metric("versions", "Age of the oldest trained token.", _DATA),
    # The loss and the gradient.
    "loss/policy": Metric("loss", "Loss of the step without its KL term.", _LOSS),
    "loss/kl": Metric("loss", "KL term of the loss (`kl_in: loss`).", _LOSS),
    "kl/mean": Metric("nats", "Mean KL estimate of a token to the reference (k3).", _LOSS),
    "clip_fraction": Metric("share", "Trained tokens whose ratio was clipped.", _LOSS),
    "credit/mean_weight": Metric("ratio", "Mean credit of a trained token; 1 under GRPO.", _LOSS),
    "entropy/mean": Metric(
        "nats", "Mean entropy of the policy at a token, where the credit rule asks for it.", _LOSS
    ),
    "is_ratio/mean": Metric(
        "ratio", "Mean of learner's over sampler's probability of a sampled token.", _LOSS
    ),
    "logprob_gap/mean": Metric(
        "nats", "Mean distance between learner's and sampler's log-probability of a token.", _LOSS
    ),
    "grad_norm": Metric("norm", "Norm of the last gradient, before it was clipped.", _TRAINER),
    "grad_norm/broadcast_credit": Metric(
        "norm",
        "The same on the same batch with GRPO's credit, every `learner.credit_probe_every` steps.",
        _TRAINER,
    ),
    "learning_rate": Metric("rate", "Learning rate of the step.", _TRAINER),
    "steps/skipped": Metric(
        "count", "Optimiser steps left out, since their gradient was not finite.", _TRAINER
    ),
    "lambda_grpo/lambda": Metric(
        "number", "Learned preference for lengths (λ-GRPO).", _AGGREGATION
    ),
    "lambda_grpo/gradient": Metric("number", "The gradient it was moved by.", _AGGREGATION),
    "packing/efficiency": Metric(
        "share", "Work of a rank on average, over that of the busiest one.", _TRAINER
    ),
    # Weights.
    "policy_version": Metric("count", "Version of the weights: learner steps done.", _LOOP),
    "canary/gap": Metric(
        "nats", "Largest mean gap of a canary sequence between learner and generator.", _PUBLISH
    ),
    "publish/bytes": Metric("bytes", "Size of the published weights.", _PUBLISH),
    "publish/stall": Metric("seconds", "Time a generator stood still for the update.", _PUBLISH),
    "publish/resends": Metric(
        "count", "Times the weights were sent again, since they arrived damaged.", _PUBLISH
    ),
    # Held-out evaluation.
    "eval/accuracy": Metric(
        "reward", "Mean of the first verifier's reward on held-out prompts, greedy.", _LOG
    ),
    "eval/length": Metric("tokens", "Mean length of a held-out completion.", _LOG),
    "eval/unscored": Metric("count", "Held-out completions without a verdict; they count 0.", _LOG),
    # Time.
    "time/step": Metric("seconds", "The whole step, from waiting for groups to export.", _LOOP),
    "time/wait_data": Metric("seconds", "Waited for the step's groups and their proof.", _LOOP),
    "time/train": Metric("seconds", "The learner's call, as the coordinator sees it.", _LOOP),
    "time/rank_train": Metric("seconds", "The same inside rank 0, without fetching.", _TRAINER),
    "time/fetch": Metric("seconds", "Read the batches from the object store.", _RANK),
    "time/pack": Metric("seconds", "Advantages and packing, before the first pass.", _TRAINER),
    "time/credit": Metric("seconds", "Wrote the credit log.", _RANK),
    "time/wait_delivery": Metric(
        "seconds", "Waited until the generators had the version before.", _LOOP
    ),
    "time/export": Metric("seconds", "The learner put its weights into the store.", _PUBLISH),
    "time/publish": Metric(
        "seconds", "Export, loading and proof; most of it beside the next step.", _PUBLISH
    ),
    "time/checkpoint": Metric(
        "seconds", "The learner stood still for a checkpoint before this step.", _LOOP
    ),
    "time/generate": Metric("seconds", "Mean time to sample a group of the step.", _LOOP),
    "time/eval": Metric("seconds", "The evaluation, beside the next step.", _EVALUATION),
    "sinks/dropped": Metric("count", "Records that a slow or broken sink did not get.", _METRICS),
}
"""By name, in the order of the reference."""

SUMMARY: dict[str, Metric] = {
    "summary/steps": Metric("count", "Learner steps of the run.", _METRICS),
    "summary/accuracy_before": Metric("reward", "First `eval/accuracy`.", _METRICS),
    "summary/accuracy": Metric("reward", "Last `eval/accuracy`.", _METRICS),
    "summary/accuracy_best": Metric("reward", "Largest `eval/accuracy`.", _METRICS),
    "summary/reward": Metric("reward", "Last `reward/mean`.", _METRICS),
    "summary/tokens_generated": Metric("tokens", "Sum of `tokens/generated`.", _METRICS),
    "summary/seconds": Metric("seconds", "Sum of `time/step`.", _METRICS),
}
"""What the sinks are given once, when the run ends."""
