"""`grpo-lambda plan`: what a run would be, without starting any of it."""

from __future__ import annotations

from common.config import Config
from common.config_loader import dump_config
from deploy.placement import CorePlan


def describe(config: Config, cores: CorePlan, num_cores: int) -> str:
    """Configuration, placement and batch arithmetic as text."""
    return "\n".join(
        [
            "# Configuration",
            dump_config(config),
            "# Placement",
            *_placement(config, cores, num_cores),
            "",
            "# Batch arithmetic",
            *_batches(config),
        ]
    )


def _placement(config: Config, cores: CorePlan, num_cores: int) -> list[str]:
    generator, learner, verifier = config.generator, config.learner, config.verifier
    lines = [
        f"ray.address            {config.ray.address}"
        + (" (a cluster of this run's own)" if config.ray.address == "local" else ""),
        f"cores                  {num_cores} here; {cores.reason}",
    ]
    for index in range(generator.count):
        lines.append(
            f"generator-{index}            {cores.generator_threads} thread(s), cores "
            f"{_shown(cores.generator_cores[index])}, {generator.kv_cache_gib} GiB of KV cache, "
            f"{config.weights.transport} weights"
        )
    for rank in range(learner.ranks):
        lines.append(
            f"learner rank {rank}         {cores.learner_threads} thread(s), cores "
            f"{_shown(cores.learner_cores[rank])}"
        )
    rules = ", ".join(f"{rule.name} x {rule.weight:g}" for rule in verifier.rules)
    lines.append(f"verifiers              {verifier.workers} ({rules})")
    return lines


def _shown(cores: list[int] | None) -> str:
    return "any" if cores is None else ",".join(map(str, cores))


def _batches(config: Config) -> list[str]:
    batch, generator = config.batch, config.generator
    completions = config.completions_per_step
    most_tokens = completions * generator.max_completion_tokens
    in_flight = config.max_groups_in_flight
    return [
        f"completions a step     {config.groups_per_step} prompts x {batch.group_size} completions "
        f"= {completions}",
        f"completion tokens      at most {completions} x {generator.max_completion_tokens} "
        f"= {most_tokens} a step",
        f"micro-batches          at least {-(-most_tokens // batch.tokens_per_microbatch)} of "
        f"{batch.tokens_per_microbatch} tokens if every completion is full; prompts come on top",
        f"groups in flight       (max_staleness {generator.max_staleness} + 1) x "
        f"{config.groups_per_step} = {in_flight}, i.e. {in_flight * batch.group_size} completions "
        f"over {generator.count} generator(s)",
        f"optimiser steps        {config.steps} x {config.algorithm.objective.epochs} epoch(s)",
        f"off-policy correction  {config.correction_kind}",
        f"completions in all     {config.steps * completions}",
    ]
