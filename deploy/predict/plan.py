"""`grpo-lambda plan`: show what a run would be, and start none of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from common.config.load import Loaded, dump_with_origins
from common.config.quantization import check_device
from common.config.sections import Config
from common.errors import UserError
from deploy.models.teacher import check_teacher
from deploy.placement.cores import available_cores
from deploy.placement.cpu_runtime import preload_libraries
from deploy.placement.devices import check_savings, on_these_devices
from deploy.placement.memory import GIB, estimate
from deploy.placement.options import (
    CorePlan,
    environment_actors,
    plan_here,
    uses_cuda,
    with_compute_dtype,
)
from deploy.placement.walls import environment_walls, walls_planned
from deploy.predict.cluster_plan import ClusterPlan, logged_lengths
from deploy.predict.data import see_data
from deploy.predict.episodes import Trial, episode_lines
from deploy.predict.memory import teacher_parameters
from deploy.predict.models import model_shape
from deploy.predict.notes import adapter_line, notes, publish_line, updates_of
from deploy.predict.propose import devices_of, propose
from deploy.predict.simulate import Costs
from deploy.run.settled import settled
from learner.training.memory import OtherModels

_ORDER = "# defaults < recipe < file < command line; a comment says what a value was changed by"


def describe(loaded: Loaded, lengths: Path | None = None, costs: Path | None = None) -> str:
    """Describe a run as text: configuration, data, placement, batch arithmetic.

    With `placement.generator_device` the placement is one on GPUs, and a step is predicted.

    Args:
        lengths: folder of a run; the prediction takes the lengths of its completions.
        costs: file with a JSON object of `Costs` that were measured.

    Raises:
        UserError: the configuration cannot run where it is meant to.
    """
    said: list[str] = []
    check_teacher(loaded.config)
    check_savings(loaded.config)
    config = settled(loaded.config, said.append)
    loaded = _with_settled(loaded, config)
    seen = see_data(config)
    data = ["", "# Data", *said, *seen.lines, ""]
    tail = ["", "# Batch arithmetic", *_batches(config, loaded.origins)]
    if config.placement.generator_device is None:
        if lengths is not None or costs is not None:
            raise UserError(
                "--lengths and --costs are for the simulation of GPUs: name what to compute with, "
                "e.g. placement.generator_device=H100-80GB"
            )
        check_device(config.generator.quantization, cuda=uses_cuda(config))
        config, changed = on_these_devices(with_compute_dtype(config))
        cores = plan_here(config, preload_libraries())
        placed = _placement(config, cores, len(available_cores()))
        placed += [f"devices                {changed}"] if changed else []
        played = _episodes(config, seen.trial)
        return "\n".join(
            [*_shown_config(loaded, config), *data, "# Placement", *placed, *tail, *played]
        )
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    plan = ClusterPlan.of(config)
    logged, measured = logged_lengths(lengths) if lengths else None, read_costs(costs)
    prediction = None if plan.problems else plan.predict(logged, measured)
    lines = plan.lines(logged, measured, prediction)
    step_s = None if prediction is None else prediction.step_s
    played = _episodes(config, seen.trial, step_s)
    text = "\n".join([*_shown_config(loaded, config), *data, *lines, *tail, *played])
    if plan.problems:
        raise UserError(f"{text}\n\nthis plan does not fit: {'; '.join(plan.problems)}")
    return text


def _episodes(config: Config, trial: Trial | None, step_s: float | None = None) -> list[str]:
    """The part on episodes, where they are played in an environment that could be tried."""
    return [] if trial is None else ["", "# Episodes", *episode_lines(config, trial, step_s)]


def _with_settled(loaded: Loaded, config: Config) -> Loaded:
    """`config`, and the data as the origin of what they have decided."""
    origins = dict(loaded.origins)
    if loaded.config.data.source != config.data.source:
        origins["data.source"] = "follows from data.path"
    if loaded.config.verifier.rules != config.verifier.rules:
        origins["verifier.rules"] = "what fits the data"
    return Loaded(config, origins)


def describe_proposal(loaded: Loaded, devices: str, file: Path) -> str:
    """Propose a configuration for devices, say what it gives up, and describe its plan, as text.

    Args:
        devices: as `8xH100` (`deploy.predict.propose`).
        file: the YAML file that the configuration began from.

    Raises:
        UserError: there are no such devices, the model's shape is not known, or nothing fits.
    """
    config = replace(loaded.config, model=replace(loaded.config.model, dtype="bfloat16"))
    found = propose(config, devices_of(devices))
    keys = found.keys(config)
    given = f"model.path={config.model.path}"
    return "\n".join(
        [
            *found.lines(config),
            "",
            f"# Keys beside --config {file}",
            *([given] if loaded.origins.get("model.path") == "command line" else []),
            *keys,
            "",
            *found.plan.lines(),
        ]
    )


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
    lines += _environments(config)
    lines += _adapters(config)
    rules = ", ".join(f"{rule.name} x {rule.weight:g}" for rule in verifier.rules)
    lines.append(f"verifiers              {verifier.workers} ({rules})")
    return lines + [
        f"  behind walls         {wall}" for wall in walls_planned(verifier, config.ray.address)
    ]


def _environments(config: Config) -> list[str]:
    """Where episodes are played, and behind what; nothing where there is no environment."""
    environment, actors = config.environment, environment_actors(config)
    if environment.name is None:
        return []
    beside = f"{environment.workers} process(es) beside each generator"
    asked = {"CPU": environment.num_cpus, **environment.resources}
    wanted = ", ".join(f"{name} {amount:g}" for name, amount in asked.items())
    on = ", ".join(f"{key}={value}" for key, value in environment.labels.items())
    pooled = f"{actors} actor(s), each {wanted}" + (f", on nodes with {on}" if on else "")
    return [
        f"environments           {environment.name}: {pooled if actors else beside}",
        f"  memory               {environment.memory_gib:g} GiB an episode at most",
        *(
            f"  behind walls         {wall}"
            for wall in environment_walls(environment, config.ray.address)
        ),
    ]


def _adapters(config: Config) -> list[str]:
    """What adapters train and save, on a CPU; nothing where all weights are trained."""
    adapter = config.model.adapter
    if not adapter.rank:
        return []
    try:
        shape = model_shape(config.model.path)
        trained = shape.adapter_parameters(adapter.rank, adapter.targets)
        others = OtherModels.of(config.algorithm, teacher_parameters(config))
    except UserError as error:  # a run counts them from the model's folder
        return [f"trained                adapters of rank {adapter.rank}, not counted: {error}"]
    kept, full = (
        estimate(config, shape.parameters, others, adapters=each).learner / GIB
        for each in (trained, 0)
    )
    return [
        f"trained                {adapter_line(adapter, trained, shape.parameters)}",
        f"published              {publish_line(config, trained, shape.parameters)}",
        f"learner's memory       {kept:.2f} GiB for all ranks, besides activations; {full:.2f} GiB "
        "were all weights trained",
    ]


def _shown(cores: list[int] | None) -> str:
    return "any" if cores is None else ",".join(map(str, cores))


def _of_a_group(config: Config) -> tuple[int, str, str]:
    """Completions that the learner gets of a group, the keys that say so, and whether at most."""
    follow_up, size = config.algorithm.rollout.follow_up, config.batch.group_size
    if follow_up.kind != "tree":
        return size, "batch.group_size", ""
    children = " x ".join(map(str, follow_up.tree.children))
    keys = f"batch.group_size {size} x algorithm.rollout.follow_up.tree.children {children}"
    return follow_up.most_learnt(size), keys, " at most"


def _of_eight_bits(config: Config) -> str:
    kind = config.generator.quantization
    return "" if kind is None else f" and generator.quantization {kind}"


def _batches(config: Config, origins: Mapping[str, str]) -> list[str]:
    """Batch arithmetic as lines, each of which says what follows from what."""
    batch, generator = config.batch, config.generator
    groups, completions = config.groups_per_step, config.completions_per_step
    (size, of_group, most), compared = _of_a_group(config), "each compared with its group"
    if most:
        compared = "each compared with what goes on from the same tokens"
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
    objective, updates = config.algorithm.objective, updates_of(config)
    apart = "" if objective.isolate_below is None else " x 2 for algorithm.objective.isolate_below"
    steps = config.steps * objective.epochs * updates * (2 if apart else 1)
    part = f"all {completions} completions" if updates == 1 else f"1/{updates} of the prompts"
    return [
        *lines,
        f"completions a step     {groups} prompts x {size} completions = "
        f"{completions}{most}: batch.prompts_per_step x {of_group}, {compared}",
        f"completion tokens      {completions} completions x generator.max_completion_tokens "
        f"{generator.max_completion_tokens} = {most_tokens} a step at most",
        f"micro-batches          {most_tokens} tokens / batch.tokens_per_microbatch "
        f"{batch.tokens_per_microbatch} = {rows} forward and backward passes at most for the "
        "completions; their prompts come on top. It bounds memory and changes no gradient",
        f"optimiser steps        steps {config.steps} x algorithm.objective.epochs "
        f"{objective.epochs} x updates_per_batch {updates}{apart} = {steps}, each on {part}",
        f"staleness budget       (generator.max_staleness {staleness} + 1) x {groups} prompts = "
        f"{in_flight} groups in flight at most, so no token is trained on that is more than "
        f"{staleness} version(s) old",
        f"in flight              {in_flight} groups x {size} = "
        f"{in_flight * size} completions{most} over {generator.count} generator(s) of "
        f"generator.max_concurrent_sequences {generator.max_concurrent_sequences}",
        f"off-policy correction  {config.correction_kind}"
        + (
            f", because generator.max_staleness is {staleness}{_of_eight_bits(config)}"
            if config.algorithm.correction.kind == "auto"
            else ", as algorithm.correction.kind says"
        ),
        f"completions in all     steps {config.steps} x {completions} = "
        f"{config.steps * completions}, and what is filtered or abandoned",
        *(f"note                   {note}" for note in notes(config, origins)),
    ]
