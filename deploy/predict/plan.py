"""`grpo-lambda plan`: show what a run would be, and start none of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from common.config.load import Loaded, dump_with_origins
from common.config.notes import notes, updates_of
from common.config.sections import Config
from common.errors import UserError
from deploy.placement.cores import available_cores
from deploy.placement.cpu_runtime import preload_libraries
from deploy.placement.options import CorePlan, plan_here, with_compute_dtype
from deploy.placement.walls import walls_here
from deploy.predict.cluster_plan import ClusterPlan, logged_lengths
from deploy.predict.simulate import Costs

_ORDER = "# defaults < recipe < file < command line; a comment says what a value was changed by"


def describe(loaded: Loaded, lengths: Path | None = None, costs: Path | None = None) -> str:
    """Describe a run as text: configuration, placement, batch arithmetic.

    With `placement.generator_device` the placement is one on GPUs, and a step is predicted.

    Args:
        lengths: folder of a run; the prediction takes the lengths of its completions.
        costs: file with a JSON object of `Costs` that were measured.

    Raises:
        UserError: the configuration cannot run where it is meant to.
    """
    config = loaded.config
    tail = ["", "# Batch arithmetic", *_batches(config)]
    if config.placement.generator_device is None:
        if lengths is not None or costs is not None:
            raise UserError(
                "--lengths and --costs are for the simulation of GPUs: name what to compute with, "
                "e.g. placement.generator_device=H100-80GB"
            )
        config = with_compute_dtype(config)
        cores = plan_here(config, preload_libraries())
        placed = _placement(config, cores, len(available_cores()))
        return "\n".join([*_shown_config(loaded, config), "# Placement", *placed, *tail])
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    plan = ClusterPlan.of(config)
    lines = plan.lines(logged_lengths(lengths) if lengths else None, read_costs(costs))
    text = "\n".join([*_shown_config(loaded, config), *lines, *tail])
    if plan.problems:
        raise UserError(f"{text}\n\nthis plan does not fit: {'; '.join(plan.problems)}")
    return text


def _shown_config(loaded: Loaded, planned: Config) -> list[str]:
    """The configuration that is planned, as YAML; each value says where it came from."""
    origins = dict(loaded.origins)
    if planned.model.dtype != loaded.config.model.dtype:
        origins["model.dtype"] = f"{loaded.config.model.dtype}, for the devices"
    return ["# Configuration", _ORDER, dump_with_origins(Loaded(planned, origins))]


def read_costs(path: Path | None) -> Costs | None:
    """Read measured costs from a JSON file. Raises `UserError` when it does not hold them."""
    if path is None:
        return None
    try:
        given = json.loads(path.read_text())
        return Costs(**{name: float(seconds) for name, seconds in given.items()})
    except (OSError, ValueError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            f"--costs {path}: {error}; it should be a JSON object with "
            f"{', '.join(Costs.__dataclass_fields__)}"
        ) from error


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
    allocator = ", ".join(cores.preload) or "the C library's (tcmalloc is used where installed)"
    lines.append(f"their allocator        {allocator}")
    for rank in range(learner.ranks):
        lines.append(
            f"learner rank {rank}         {cores.learner_threads} thread(s), cores "
            f"{_shown(cores.learner_cores[rank])}"
        )
    rules = ", ".join(f"{rule.name} x {rule.weight:g}" for rule in verifier.rules)
    lines.append(f"verifiers              {verifier.workers} ({rules})")
    return lines + [f"  behind walls         {wall}" for wall in walls_here(verifier)]


def _shown(cores: list[int] | None) -> str:
    return "any" if cores is None else ",".join(map(str, cores))


def _batches(config: Config) -> list[str]:
    """Batch arithmetic as lines, each of which says what follows from what."""
    batch, generator = config.batch, config.generator
    groups, completions = config.groups_per_step, config.completions_per_step
    most_tokens = completions * generator.max_completion_tokens
    rows = -(-most_tokens // batch.tokens_per_microbatch)
    staleness, in_flight = generator.max_staleness, config.max_groups_in_flight
    lines = []
    if groups != batch.prompts_per_step:
        rate = config.algorithm.rollout.prune_rate
        lines.append(
            f"prompts a step         batch.prompts_per_step {batch.prompts_per_step} / (1 - "
            f"algorithm.rollout.prune_rate {rate:g}) = {groups}: more, for the places that pruning "
            "frees"
        )
    epochs, updates = config.algorithm.objective.epochs, updates_of(config)
    part = f"all {completions} completions" if updates == 1 else f"1/{updates} of the prompts"
    return [
        *lines,
        f"completions a step     {groups} prompts x {batch.group_size} completions = "
        f"{completions}: batch.prompts_per_step x batch.group_size, each compared with its group",
        f"completion tokens      {completions} completions x generator.max_completion_tokens "
        f"{generator.max_completion_tokens} = {most_tokens} a step at most",
        f"micro-batches          {most_tokens} tokens / batch.tokens_per_microbatch "
        f"{batch.tokens_per_microbatch} = {rows} forward and backward passes at most for the "
        "completions; their prompts come on top. It bounds memory and changes no gradient",
        f"optimiser steps        steps {config.steps} x algorithm.objective.epochs {epochs} x "
        f"updates_per_batch {updates} = {config.steps * epochs * updates}, each on {part}",
        f"staleness budget       (generator.max_staleness {staleness} + 1) x {groups} prompts = "
        f"{in_flight} groups in flight at most, so no token is trained on that is more than "
        f"{staleness} version(s) old",
        f"in flight              {in_flight} groups x {batch.group_size} = "
        f"{in_flight * batch.group_size} completions over {generator.count} generator(s) of "
        f"generator.max_concurrent_sequences {generator.max_concurrent_sequences}",
        f"off-policy correction  {config.correction_kind}"
        + (
            f", because generator.max_staleness is {staleness}"
            if config.algorithm.correction.kind == "auto"
            else ", as algorithm.correction.kind says"
        ),
        f"completions in all     steps {config.steps} x {completions} = "
        f"{config.steps * completions}, and what is filtered or abandoned",
        *(f"note                   {note}" for note in notes(config)),
    ]
