"""What a run begins from: a model of some step, and the prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from actors.data.account import counted
from actors.data.prompts import PromptSource, prompt_source_of
from actors.environments.check import environment_tools, inspect_environment
from actors.rendering.renderer import Renderer
from common.config.load import differing, load_config
from common.config.sections import Config
from common.errors import UserError
from common.record.ledger import check_ledger
from common.record.metrics import read_metrics
from common.record.trajectory_log import missing_segments
from deploy.models.resolve import ModelLocation, check_vocabulary, resolve_model
from deploy.models.teacher import find_teacher
from deploy.placement.devices import check_savings
from deploy.placement.options import with_compute_dtype
from deploy.run.directory import LEDGER, QUARANTINE, RunDirectory

Notify = Callable[[str], None]

_OWN = ("resume", "name", "runs_dir")
"""Keys that say which run it is."""


@dataclass(frozen=True)
class Inputs:
    """Found and checked, before a process is started."""

    config: Config
    """`model.path` is a folder of this machine, `model.dtype` is no longer `auto`."""
    first_step: int
    """The step of the checkpoint to go on from; 0 for the model as it was."""
    origin: ModelLocation
    """The model before step 1: after a resume it is still the reference policy, and what adapters
    stand beside."""
    source: PromptSource


def find_inputs(config: Config, run: RunDirectory, notify: Notify) -> Inputs:
    """Find model and prompts, and say what was found.

    Raises:
        UserError: something is missing or cannot be used.
    """
    check_savings(config)
    first_step = _first_step(config, run, notify)
    if config.resume:
        _look_at(run, first_step, notify)
        _compare(config, run, notify)
    name = config.model.path
    if first_step:
        needed = config.algorithm.needs_reference or config.model.adapter.rank > 0
        origin = ModelLocation(name, str(resolve_model(name)) if needed else None)
        folder = _folder_to_serve(config, run.checkpoint(first_step), origin)
    else:
        folder = str(resolve_model(name))
        origin = ModelLocation(name, folder)
    source = find_prompts(config, folder, notify)
    if source.quarantine.rows:
        path = run.path / QUARANTINE
        source.quarantine.write(path)
        notify(f"the rows that cannot be used are in {path}")
    teacher = find_teacher(config, Path(folder))
    config = with_compute_dtype(config)
    config = replace(config, model=replace(config.model, path=folder), teacher=teacher)
    return Inputs(config, first_step, origin, source)


def _folder_to_serve(config: Config, checkpoint: Path, origin: ModelLocation) -> str:
    """The model's folder after a resume.

    A checkpoint holds merged weights. Generators that are sent adapters need those beside which
    they stand: on merged ones the adapters would count twice.
    """
    if config.served_adapter is None:
        return str(checkpoint)
    assert origin.folder is not None
    return origin.folder


def _look_at(run: RunDirectory, step: int, notify: Notify) -> None:
    """What a run is resumed from, before half a minute is spent on starting its parts.

    Raises:
        UserError: it cannot go on.
    """
    if (run.path / LEDGER).exists():  # a run that never came to its first step has none
        check_ledger(run.path / LEDGER, step)
    metrics = run.path / "metrics.jsonl"
    if metrics.is_file():
        read_metrics(metrics)
    if run.config_was_edited():
        notify(
            f"warning: {run.path / 'config.yaml'} is not as the run wrote it; what it says now "
            "holds from here on"
        )
    if gone := missing_segments(run.path / "trajectories"):
        notify(
            f"warning: {', '.join(gone)} of the trajectory log {'is' if len(gone) == 1 else 'are'} "
            "gone: the account will not close (inspect --ledger), and those steps cannot be "
            "replayed"
        )


def _compare(config: Config, run: RunDirectory, notify: Notify) -> None:
    """Say which keys are others than those the run began with, as under a `--config` of now."""
    try:
        recorded = load_config([run.path / "config.yaml"], [], resolved=True)
    except UserError as error:
        notify(f"warning: what the run began with cannot be compared: {error}")
        return
    changed = differing(recorded, config)
    words = [f"{key}={now} (was {was})" for key, (was, now) in changed.items() if key not in _OWN]
    if words:
        notify(f"goes on with other values than in its config.yaml: {', '.join(words)}")


def _first_step(config: Config, run: RunDirectory, notify: Notify) -> int:
    """On resume the newest checkpoint's, if there is one."""
    step = run.newest_checkpoint(notify) if config.resume else 0
    if step >= config.steps:
        raise UserError(
            f"{run.path} is at step {step} and steps={config.steps}: give a larger steps= to go on"
        )
    notify(f"resuming from step {step}" if step else f"model {config.model.path}, from step 0")
    return step


def find_prompts(config: Config, folder: str, notify: Notify) -> PromptSource:
    """The prompts of the model in `folder`, and what they are said about.

    Raises:
        UserError: data, template or environment cannot be used.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=config.model.trust_remote_code
    )
    check_vocabulary(tokenizer.get_vocab().values(), Path(folder))
    tools = environment_tools(config.environment)
    source = prompt_source_of(config, tokenizer, tools)
    if config.environment.name is not None:
        task = json.loads(source.rows.train[0].reference)
        found = inspect_environment(config.environment, task)
        renderer = Renderer.of_environment(tokenizer, config.data, config.environment, tools)
        for note in (*found.notes, *renderer.notes):
            notify(note)
    else:  # of a command, that it is there and that the walls hold
        for note in inspect_environment(config.environment, {}).notes:
            notify(note)
    for line in counted(source):
        notify(line)
    return source
