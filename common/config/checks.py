"""Values of several keys that cannot work together: each rule stands here, once.

What bounds one number alone stands beside its field (`common.config.bounds`).
"""

from __future__ import annotations

from common.config.bounds import check_bounds
from common.config.names import check_names
from common.config.sections import Config
from common.errors import UserError
from common.weights.registry import names_where


def check_config(config: Config) -> None:
    """Raise `UserError` for values that cannot work together, naming the keys and a remedy."""
    check_bounds(config)
    _check_lengths(config)
    _check_processes(config)
    _check_groups(config)
    _check_shared_devices(config)
    _check_data(config)
    _check_rules(config)
    _check_guidance(config)
    check_names(config)


def _check_lengths(config: Config) -> None:
    longest = config.model.max_length
    for key, tokens in (
        ("generator.max_completion_tokens", config.generator.max_completion_tokens),
        ("eval.max_completion_tokens", config.eval.max_completion_tokens),
    ):
        if tokens is not None and tokens >= longest:
            raise UserError(
                f"{key}={tokens} leaves no room for a prompt within model.max_length={longest}: "
                "raise the latter"
            )


def _check_processes(config: Config) -> None:
    generator = config.generator
    fewest = generator.min_count
    if fewest is not None and fewest > generator.count:
        raise UserError(
            f"generator.min_count={fewest} must be at most generator.count={generator.count}"
        )
    if fewest is not None and config.transport.one_collective:
        others = names_where(lambda transport: not transport.one_collective)
        raise UserError(
            f"generator.min_count needs weights.transport={others}: the {generator.count} "
            f"generators of weights.transport={config.weights.transport} are one collective"
        )
    ranks, shards = config.learner.ranks, config.learner.shard_ranks
    if shards is not None and ranks % shards:
        raise UserError(f"learner.shard_ranks={shards} must divide learner.ranks={ranks}")


def _check_groups(config: Config) -> None:
    """What leaves a group nothing to learn from."""
    batch, rollout = config.batch, config.algorithm.rollout
    if rollout.refill and rollout.prune_rate == 0:
        raise UserError(
            "algorithm.rollout.refill=true fills the places that pruning frees: set "
            "algorithm.rollout.prune_rate above 0"
        )
    if int(round(batch.group_size * (1 - rollout.prune_rate), 9)) < 1:
        raise UserError(
            f"algorithm.rollout.prune_rate={rollout.prune_rate} leaves nothing to learn of a group "
            f"of batch.group_size={batch.group_size}: lower it, or raise the latter"
        )
    share = rollout.max_variance_share
    if share < 1 and round(batch.group_size * share) < 2:
        raise UserError(
            f"algorithm.rollout.max_variance_share={share} leaves nothing to compare of a group of "
            f"batch.group_size={batch.group_size}: raise it, so that two are left"
        )
    if batch.group_size == 1 and config.algorithm.baseline.kind in ("grpo", "dr_grpo", "rloo"):
        raise UserError(
            f"batch.group_size=1 gives zero advantage under algorithm.baseline.kind="
            f"{config.algorithm.baseline.kind}: use at least 2"
        )


def _check_rules(config: Config) -> None:
    rules, source = config.verifier.rules, config.data.source
    if not rules:
        raise UserError("verifier.rules is empty: name at least one verifier")
    if not any(rule.weight for rule in rules):
        raise UserError(
            "verifier.rules gives every rule a weight of 0, so every reward is 0: give one a weight"
        )
    if source != "reasoning_gym" and any(rule.name == "reasoning_gym" for rule in rules):
        raise UserError(
            "verifier.rules names reasoning_gym, which scores the answers of its own tasks only, "
            f"and data.source={source}: use math_answer or another verifier"
        )


def _check_shared_devices(config: Config) -> None:
    generator, ranks = config.generator, config.learner.ranks
    if not config.transport.shares_devices:
        return
    key = f"weights.transport={config.weights.transport}"
    if generator.max_staleness > 0:
        raise UserError(
            f"{key} has generators and learner take turns on their devices: "
            f"generator.max_staleness={generator.max_staleness} must be 0"
        )
    if generator.count != ranks or generator.devices > 1:
        raise UserError(
            f"{key} puts one generator and one learner rank on every device: "
            f"generator.count={generator.count} must be learner.ranks={ranks}, and "
            "generator.tensor_parallel and pipeline_parallel 1"
        )


def _check_guidance(config: Config) -> None:
    guidance, data = config.algorithm.rollout.guidance, config.data
    key = "algorithm.rollout.guidance"
    if guidance.ratio > 0 and data.source != "reasoning_gym" and not data.solution_column:
        raise UserError(
            f"{key}.ratio={guidance.ratio} needs data.solution_column, the worked solutions"
        )


def _check_data(config: Config) -> None:
    data = config.data
    if data.source == "reasoning_gym":
        if config.eval.prompts >= data.reasoning_gym.size:
            raise UserError(
                f"eval.prompts={config.eval.prompts} leaves no training prompts of "
                f"data.reasoning_gym.size={data.reasoning_gym.size}"
            )
        return
    if not data.path:
        raise UserError(f"data.source={data.source} needs data.path: a file, or a data set's name")
