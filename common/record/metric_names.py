"""Every metric that a run writes: its name, its unit, what it means and who writes it.

`METRICS` is the contract behind `metrics.jsonl`, the sinks and Ray's gauges. The reference in
common/README.md is made from it by `python tests/support/metric_table.py`. Tests hold that each
name in the code stands here, and that each name here stands in the code of its writer.

A step's record has the metrics that were measured in that step. Step 0, before training, has the
evaluation, the canary and the policy's version alone. The first record of a run, also of one that
goes on, has what its start took.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What one number of a record means."""

    unit: str
    """`share` is between 0 and 1; `count` a whole number; `nats` of log-probability."""
    meaning: str
    writer: str
    """Module that writes it, as a path from the top of the repository."""


_OF_SOURCE = re.compile(r"source/[^/]+/")


def of_source(metric: str, name: str) -> str:
    """Name of a `metric` with a star in it, for the data set called `name`."""
    return metric.replace("*", name)


def in_table(metric: str) -> str:
    """Name under which `METRICS` has a metric, whatever data set it is of."""
    return _OF_SOURCE.sub("source/*/", metric)


_LOSS = "learner/algorithm/loss.py"
_DATA = "learner/training/batch_checks.py"
_TRAINER = "learner/training/trainer.py"
_SCORING = "learner/training/scoring.py"
_CRITIC = "learner/training/critic.py"
_RANK = "learner/training/rank.py"
_COUNTERS = "learner/training/counters.py"
_LOOP = "learner/loop.py"
_PUBLISH = "learner/weights/publish.py"
_AGGREGATION = "learner/algorithm/aggregation.py"
_BOOK = "actors/rollout/group_book.py"
_GUIDANCE = "actors/rollout/guidance.py"
_EVALUATION = "actors/rollout/evaluate.py"
_LOG = "common/record/writer.py"
_EPISODES = "common/record/episodes.py"
_METRICS = "common/record/metrics.py"
_CONSISTENCY = "learner/training/consistency.py"
_RUN = "deploy/run/coordinator.py"
_ASSEMBLY = "deploy/run/assembly.py"
_START = "deploy/run/start_times.py"

METRICS: dict[str, Metric] = {
    # What was sampled, and how good it was.
    "reward/mean": Metric("reward", "Mean reward of the step's completions.", _DATA),
    "reward/accuracy": Metric("reward", "Mean of the first verifier's reward.", _DATA),
    "reward/greedy": Metric("reward", "Mean reward of the step's greedy completions.", _DATA),
    "reward/kl_penalty": Metric(
        "reward", "Mean KL penalty that was taken off the rewards (`kl_in: reward`).", _SCORING
    ),
    "scorer/gap": Metric(
        "nats",
        "Mean over sampled tokens of log μ less the scorer's log-probability: the one-sample "
        "divergence from the scorer (`algorithm.advantage.scorer`).",
        _SCORING,
    ),
    "scorer/without_context": Metric(
        "count",
        "Completions that were not trained on, since the scorer had no context for them: no right "
        "sibling, no answer on record, no feedback.",
        _SCORING,
    ),
    "scorer/context_too_long": Metric(
        "count",
        "Completions that were not trained on, since context and completion are longer than "
        "`model.max_length`.",
        _SCORING,
    ),
    "scorer/consistency": Metric(
        "probability", "Mean probability of an answer's tokens under the scorer.", _CONSISTENCY
    ),
    "reward/consistency_bonus": Metric(
        "reward", "Mean bonus for consistent answers that the rewards have got.", _CONSISTENCY
    ),
    "completion_length/mean": Metric("tokens", "Mean length of a completion.", _DATA),
    "completions/unscored": Metric(
        "count", "Completions without a reward: a verifier failed or timed out.", _LOOP
    ),
    "verdict/suspicious": Metric(
        "count",
        "Completions whose program touched a wall of the sandbox, drafts and probes included; a "
        "rising curve is the first sign of reward hacking.",
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
    "verdict/suspicious/probes": Metric(
        "count", "Of all these, probes; written where the step has any.", _LOOP
    ),
    "completions/zero_advantage": Metric(
        "count", "Completions whose advantage is 0, so that they teach nothing.", _DATA
    ),
    # Episodes that were played in an environment.
    "episode/turns": Metric("count", "Mean number of turns of an episode.", _EPISODES),
    "episode/segments": Metric(
        "count", "Mean conversations of an episode: those of sub-agents count each.", _EPISODES
    ),
    "episode/given_tokens": Metric(
        "tokens",
        "Mean tokens of an episode that the environment gave, its template's included.",
        _EPISODES,
    ),
    "episode/tool_calls": Metric(
        "count", "Mean tool calls of an episode that its environment answered.", _EPISODES
    ),
    "episode/tool_errors": Metric(
        "count", "Of these, calls that could not be made: no such tool, or wrong.", _EPISODES
    ),
    "episode/environment_s": Metric(
        "s", "Mean time of an episode in its environment, while others are sampled.", _EPISODES
    ),
    "episode/environment_share": Metric(
        "share",
        "The same, of the time from a group's dispatch to the end of its episodes: 1 is all.",
        _EPISODES,
    ),
    "episode/ended/stop": Metric("count", "Episodes that ended by themselves.", _EPISODES),
    "episode/ended/length": Metric("count", "Episodes out of tokens.", _EPISODES),
    "episode/ended/turns": Metric("count", "Episodes out of turns.", _EPISODES),
    "episode/ended/context": Metric("count", "Episodes that filled the context.", _EPISODES),
    "episode/ended/error": Metric(
        "count", "Episodes whose environment failed: they have no reward.", _EPISODES
    ),
    "episode/ended/timeout": Metric(
        "count", "Episodes whose environment was too slow: they have no reward.", _EPISODES
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
    "tokens/generated": Metric("tokens", "Tokens that were sampled for the step.", _LOOP),
    "tokens/drafts": Metric("tokens", "Of these, of drafts.", _LOOP),
    "tokens/probes": Metric("tokens", "Of these, of probes.", _LOOP),
    "completions/drafts": Metric(
        "count", "Completions in whose place others of their group are trained on.", _LOOP
    ),
    "completions/probes": Metric(
        "count", "Continuations that measured the value of prefixes.", _LOOP
    ),
    "completions/joined": Metric(
        "count", "Completions that go on from inside of others, and are trained on too.", _DATA
    ),
    "tokens/trained": Metric("tokens", "Of these, tokens with a part in the loss.", _DATA),
    "staleness/mean": Metric(
        "versions", "Mean age of a trained token: learner's version minus the token's.", _DATA
    ),
    "staleness/max": Metric("versions", "Age of the oldest trained token.", _DATA),
    # Each data set of `data.sources`, by its name.
    "source/*/reward": Metric("reward", "Mean reward of the data set's completions.", _LOOP),
    "source/*/accuracy": Metric("reward", "Mean of their first verifier's reward.", _LOOP),
    "source/*/groups": Metric("count", "Groups of the step that are from the data set.", _LOOP),
    "source/*/equal_rewards": Metric(
        "count", "Of these, groups whose completions all have the same reward.", _LOOP
    ),
    "source/*/unscored": Metric("count", "Completions of these without a reward.", _LOOP),
    "source/*/tokens": Metric("tokens", "Tokens of the completions of these.", _LOOP),
    "source/*/eval_accuracy": Metric(
        "reward", "`eval/accuracy` over the data set's held-out prompts.", _LOG
    ),
    "source/*/eval_unscored": Metric("count", "`eval/unscored` of these prompts.", _LOG),
    # The loss and the gradient.
    "loss/policy": Metric("loss", "Loss of the step without its KL and its entropy.", _LOSS),
    "loss/kl": Metric("loss", "KL term of the loss (`kl_in: loss`).", _LOSS),
    "loss/entropy": Metric("loss", "What a bonus for entropy takes off the loss.", _LOSS),
    "loss/likelihood": Metric(
        "loss", "What the log-likelihood of right answers adds (`objective.likelihood`).", _LOSS
    ),
    "kl/mean": Metric(
        "nats", "Mean KL estimate of a token to the reference (`kl_estimator`).", _LOSS
    ),
    "clip_fraction": Metric("share", "Trained tokens whose ratio was clipped.", _LOSS),
    "credit/mean_weight": Metric("ratio", "Mean credit of a trained token; 1 under GRPO.", _LOSS),
    "entropy/mean": Metric(
        "nats", "Mean entropy of the policy at a token, where a rule or a bonus asks for it.", _LOSS
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
    # The critic, where the recipe has one (`algorithm.advantage.kind=gae`).
    "critic/loss": Metric("loss", "Mean loss of a value, half its squared error.", _CRITIC),
    "critic/explained_variance": Metric(
        "share",
        "1 - var(G - V) / var(G) of the values V that the step's advantages came from, and the "
        "returns G: 1 knows, 0 says the same everywhere, below 0 misleads.",
        _CRITIC,
    ),
    "critic/value": Metric("reward", "Mean value of the states before sampled tokens.", _CRITIC),
    "critic/clip_fraction": Metric(
        "share", "Values further from the old one than `critic.value_clip`.", _CRITIC
    ),
    "critic/grad_norm": Metric(
        "norm", "Norm of the critic's last gradient, before it was clipped.", _CRITIC
    ),
    "critic/learning_rate": Metric("rate", "Learning rate of the critic in the step.", _CRITIC),
    "lambda_grpo/lambda": Metric(
        "number", "Learned preference for lengths (λ-GRPO).", _AGGREGATION
    ),
    "lambda_grpo/gradient": Metric("number", "The gradient it was moved by.", _AGGREGATION),
    "packing/efficiency": Metric(
        "share", "Work of a rank on average, over that of the busiest one.", _TRAINER
    ),
    # What a CUDA device did.
    "learner/tflops": Metric(
        "TFLOP/s", "Useful products of a rank: 6 for each weight and token of the step.", _COUNTERS
    ),
    "learner/mfu": Metric(
        "share", "The same, of the peak in the device's data sheet, where it is known.", _COUNTERS
    ),
    "memory/peak": Metric("bytes", "Most memory of rank 0's tensors in the step.", _COUNTERS),
    "time/exposed_communication": Metric(
        "seconds", "Rank 0's device waited for weights of other ranks.", _COUNTERS
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
    "time/score": Metric(
        "seconds", "The scorer's forward pass, and the policy's that it is compared with.", _SCORING
    ),
    "time/wait_scores": Metric(
        "seconds", "Waited for the scores of a teacher in generators of its own.", _LOOP
    ),
    "time/critic": Metric("seconds", "The critic valued the batch and learned.", _TRAINER),
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
    "time/generate": Metric(
        "seconds",
        "Mean time to sample a group of the step: from its dispatch to its last completion or "
        "probe, with the verdicts that a follow-up waits for.",
        _LOOP,
    ),
    "time/eval": Metric("seconds", "The evaluation, beside the next step.", _EVALUATION),
    "time/start/process": Metric(
        "seconds", "From the start of the process until it has read its configuration.", _START
    ),
    "time/start/inputs": Metric("seconds", "Found model and prompts, and checked them.", _RUN),
    "time/start/ray": Metric("seconds", "Started Ray, or joined it, and asked for actors.", _RUN),
    "time/start/generators": Metric("seconds", "Until all generators could sample.", _ASSEMBLY),
    "time/start/learner": Metric(
        "seconds", "Until the learner could train, beside the generators.", _ASSEMBLY
    ),
    "time/start/verifiers": Metric(
        "seconds", "Until the verifiers could judge, beside the generators.", _ASSEMBLY
    ),
    "time/start/weights": Metric(
        "seconds", "Published the first weights, and proved them.", _ASSEMBLY
    ),
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
