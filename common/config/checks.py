"""Values of several keys that cannot work together: each rule stands here, once.

What bounds one number alone stands beside its field (`common.config.bounds`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from common.config.algorithm import ALONE, CriticConfig
from common.config.bounds import check_bounds
from common.config.data import SERVED_RANKS
from common.config.environment import BUILTIN_ENVIRONMENTS, ENVIRONMENT_RULE
from common.config.follow_up import check_follow_up
from common.config.names import check_name, check_names
from common.config.quantization import check_quantization
from common.config.scaffold import check_scaffold
from common.config.scorers import check_scorer
from common.config.sections import Config, VerifierSpec
from common.errors import UserError, nearest
from common.weights.registry import names_where


def check_config(config: Config) -> None:
    """Raise `UserError` for values that cannot work together, naming the keys and a remedy."""
    check_bounds(config)
    check_secrets(asdict(config))
    _check_lengths(config)
    _check_stops(config)
    _check_processes(config)
    _check_groups(config)
    _check_shared_devices(config)
    _check_publish(config)
    _check_data(config)
    _check_rules(config)
    _check_guidance(config)
    _check_environment(config)
    check_follow_up(config)
    check_scaffold(config)
    check_quantization(config)
    check_scorer(config)
    _check_critic(config)
    _check_memory(config)
    check_names(config)


_WITH_PASSWORD = re.compile(
    r"\w[\w+.-]*://[^/?#\s]*:[^/?#\s]*@|[?&;](?:\w*(?:secret|password|token|access_key)\w*)=", re.I
)
_OF_A_SECRET = re.compile(
    r"(?:.*_)?(?:api_?key|secret(?:_.*)?|password|passwd|(?:access|auth|bearer)_(?:key|token))",
    re.I,
)


def check_secrets(values: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse passwords and keys: a configuration is written to config.yaml and to every sink.

    Raises:
        UserError: a value holds one. It is not repeated.
    """
    for name, value in values.items():
        key = f"{prefix}{name}"
        each = value if isinstance(value, (list, tuple)) else [value]
        for inner in each:
            if isinstance(inner, Mapping):
                check_secrets(inner, f"{key}.")
            elif isinstance(inner, str) and (
                _WITH_PASSWORD.search(inner) or (inner and _OF_A_SECRET.fullmatch(str(name)))
            ):
                raise UserError(
                    f"{key} holds a password or a key, which would be written to config.yaml and "
                    "to every metrics sink. Give it by the environment (AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY for s3://), or by a file that only you can read"
                )


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


def _check_stops(config: Config) -> None:
    for stop in config.generator.stop:
        is_token = isinstance(stop, int) and not isinstance(stop, bool) and stop >= 0
        if not (is_token or (isinstance(stop, str) and stop)):
            raise UserError(
                f"generator.stop holds {stop!r}: give texts that are not empty, and numbers of "
                "tokens"
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
    kind = config.algorithm.baseline.kind
    if batch.group_size == 1 and kind not in ALONE and ":" not in kind:
        raise UserError(
            f"batch.group_size=1 leaves nothing to compare with under algorithm.baseline.kind="
            f"{kind}: use at least 2, or one of {', '.join(ALONE)}"
        )


def _asks_an_endpoint(rule: VerifierSpec) -> bool:
    mixed = rule.name in ("rubric", "right_prefix") and rule.args.get("judge") is not None
    return rule.name == "llm_judge" or mixed


def _check_rules(config: Config) -> None:
    rules, sets = config.verifier.rules, config.data.each
    asking = [rule.name for rule in rules if _asks_an_endpoint(rule)]
    if asking and not config.verifier.network:
        raise UserError(
            f"verifier.rules names {asking[0]}, which asks an endpoint: set verifier.network=true"
        )
    if rules and not any(rule.weight for rule in rules):
        raise UserError(
            "verifier.rules gives every rule a weight of 0, so every reward is 0: give one a weight"
        )
    names = [one.name for one in config.data.sources]
    for rule in rules:
        for source in rule.sources:
            if source not in names:
                raise UserError(
                    f"verifier.rules has {rule.name} judge the source {source!r}, which is none of "
                    f"data.sources ({', '.join(names) or 'there are none'}){nearest(source, names)}"
                )
    for one in sets:
        own = [rule for rule in rules if rule.judges(one.name)]
        if rules and not own:
            raise UserError(
                f"no rule of verifier.rules judges the source {one.name!r}: name one, or leave "
                "verifier.rules empty to have those that fit"
            )
        if one.kind != "reasoning_gym" and any(rule.name == "reasoning_gym" for rule in own):
            raise UserError(
                "verifier.rules names reasoning_gym, which scores the answers of its own tasks "
                f"only, and {one.path} comes from a {one.kind}: use math_answer or another "
                "verifier, or verifier.rules=[] to have the one that fits"
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


def _check_publish(config: Config) -> None:
    """Refuse adapters that travel alone where there are none, or where that was not measured."""
    adapter, pipeline = config.served_adapter, config.generator.pipeline_parallel
    if adapter is None:
        return
    key, otherwise = "weights.publish=adapter", "or weights.publish=merged"
    if not adapter.rank:
        raise UserError(
            f"{key} sends adapters alone, and model.adapter.rank=0 trains all weights: set a rank, "
            f"{otherwise}"
        )
    if not adapter.served_rank:
        raise UserError(
            f"{key}: vLLM serves adapters of rank {SERVED_RANKS[-1]} at most, and model.adapter."
            f"rank={adapter.rank}: lower it, {otherwise}"
        )
    if not config.transport.carries_adapters:
        raise UserError(
            f"{key} was measured through weights.transport="
            f"{names_where(lambda transport: transport.carries_adapters)} alone, and weights."
            f"transport={config.weights.transport}: use that, {otherwise}"
        )
    if pipeline > 1:
        raise UserError(
            f"{key}: where generator.pipeline_parallel={pipeline} divides the layers, no process "
            f"sees whether every adapter found its layer: set it to 1, {otherwise}"
        )


def _check_guidance(config: Config) -> None:
    guidance, data = config.algorithm.rollout.guidance, config.data
    key = "algorithm.rollout.guidance"
    guided = all(one.kind == "reasoning_gym" or one.solution_column for one in data.each)
    if guidance.ratio > 0 and not guided:
        raise UserError(
            f"{key}.ratio={guidance.ratio} needs data.solution_column, the worked solutions"
        )


def _check_environment(config: Config) -> None:
    environment = config.environment
    if environment.args and environment.name is None:
        raise UserError("environment.args are those of environment.name, which is null")
    if environment.placement != "generator" and environment.name is None:
        raise UserError(
            f"environment.placement={environment.placement} is that of environment.name, which is "
            "null: name one"
        )
    if not environment.playing:
        if any(rule.name == ENVIRONMENT_RULE for rule in config.verifier.rules):
            raise UserError(
                "verifier.rules names environment, which gives the reward of the environment that "
                "an episode was played in, and environment.name is null: name one"
            )
        return
    if environment.command is None:
        check_name("environment.name", environment.name or "", BUILTIN_ENVIRONMENTS)
        key = f"environment.name={environment.name}"
    else:
        _check_command(config)
        key = "environment.command"
    step_s, episode_s = environment.step_timeout_s, environment.episode_timeout_s
    if environment.command is None and step_s > episode_s:
        raise UserError(
            f"environment.step_timeout_s={step_s:g} is longer than all turns together may take, "
            f"environment.episode_timeout_s={episode_s:g}: lower it, or raise the latter"
        )
    if episode_s >= config.generator.group_timeout_s:
        raise UserError(
            f"environment.episode_timeout_s={episode_s:g} must be shorter than "
            f"generator.group_timeout_s={config.generator.group_timeout_s:g}, behind which the run "
            "ends: one environment that hangs would end it"
        )
    unused = [key for key in ("resources", "labels") if getattr(environment, key)]
    if unused and environment.placement == "generator":
        raise UserError(
            f"environment.{unused[0]} is what Ray actors ask for, and environments play beside "
            "their generator: set environment.placement=actors"
        )
    if config.algorithm.rollout.guidance.ratio > 0:
        raise UserError(
            f"{key} and algorithm.rollout.guidance.ratio="
            f"{config.algorithm.rollout.guidance.ratio}: a solution's first tokens are no turn of "
            "an episode; set one of them off"
        )


def _check_command(config: Config) -> None:
    environment = config.environment
    if environment.name is not None:
        raise UserError(
            f"environment.name={environment.name} and environment.command: an episode is played by "
            "one of the two; set the other to null"
        )
    if not environment.command or not all(environment.command):
        raise UserError(
            "environment.command is a list of words, the program first: [python, agent.py]"
        )
    if config.data.template != "chat":
        raise UserError(
            f"environment.command and data.template={config.data.template}: agents send messages, "
            "which only data.template=chat renders"
        )
    if config.algorithm.advantage.kind == "prefix_values":
        raise UserError(
            "algorithm.advantage.kind=prefix_values compares completions of one prompt, and the "
            "conversations of environment.command have prompts of their own: use another kind"
        )


def _check_critic(config: Config) -> None:
    """Refuse settings of a critic that is not there."""
    advantage = config.algorithm.advantage
    if not config.algorithm.needs_critic and advantage.critic != CriticConfig():
        raise UserError(
            f"algorithm.advantage.critic is that of algorithm.advantage.kind=gae, and the kind "
            f"is {advantage.kind}: leave it out, or set kind=gae"
        )


def _check_memory(config: Config) -> None:
    """Refuse savings of memory that save nothing, or that nothing is there to make."""
    learner, model = config.learner, config.model
    optimizer = learner.optimizer
    for key, given, usual in (
        ("learner.optimizer.state", optimizer.state, "float32"),
        ("learner.masters", learner.masters, "float32"),
    ):
        if given != usual and (optimizer.kind != "AdamW" or optimizer.matrices_only):
            raise UserError(
                f"{key}={given} is AdamW's for all parameters, and learner.optimizer has kind="
                f"{optimizer.kind} and matrices_only={optimizer.matrices_only}: set kind=AdamW and "
                f"matrices_only=false, or {key}={usual}"
            )
    if learner.masters == "bfloat16" and model.dtype == "float32":
        raise UserError(
            "learner.masters=bfloat16 trains weights that are narrower than model.dtype=float32: "
            "set one of them to the other"
        )
    if learner.masters == "bfloat16" and model.adapter.rank:
        raise UserError(
            f"learner.masters=bfloat16 is for training all weights. With model.adapter.rank="
            f"{model.adapter.rank} the adapters alone have masters, which are few: leave it out"
        )
    if learner.activation_offload and learner.activation_checkpointing is False:
        raise UserError(
            "learner.activation_offload=true moves the inputs of layers that are computed again, "
            "and learner.activation_checkpointing=false computes none again: set it to null"
        )


def _check_data(config: Config) -> None:
    data = config.data
    names = [one.name for one in data.sources]
    if data.sources and (data.path or data.source):
        raise UserError(
            "data.sources takes the place of data.source and data.path: set both to null, and give "
            "each source its own"
        )
    for name in names:
        if not _SOURCE_NAME.fullmatch(name):
            raise UserError(
                f"data.sources has the name {name!r}: use letters, digits, '.', '_' and '-' only"
            )
        if names.count(name) > 1:
            raise UserError(f"data.sources has two data sets of the name {name!r}")
    for one, count in zip(data.each, data.held_out(config.eval.prompts), strict=True):
        if one.kind != "reasoning_gym" and not one.path:
            raise UserError(
                f"data.source={one.source} needs data.path: a file, or a data set's name"
            )
        if one.source == "reasoning_gym" and one.path:
            raise UserError(
                f"data.source=reasoning_gym reads no data.path={one.path}: set data.source=null, "
                "file or hub"
            )
        if one.kind == "reasoning_gym" and count >= one.reasoning_gym.size:
            raise UserError(
                f"eval.prompts={config.eval.prompts} leaves no training prompts of "
                f"data.reasoning_gym.size={one.reasoning_gym.size}"
            )


_SOURCE_NAME = re.compile(r"[\w.-]+")
