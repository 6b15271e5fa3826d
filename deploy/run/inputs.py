"""What a run begins from: a model of some step, and the prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from actors.data.prompts import PromptSource, build_prompt_source
from common.config.sections import Config
from common.errors import UserError
from deploy.models.resolve import ModelLocation, check_vocabulary, resolve_model
from deploy.placement.options import with_compute_dtype
from deploy.run.directory import QUARANTINE, RunDirectory

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """Found and checked, before a process is started."""

    config: Config
    """`model.path` is a folder of this machine, `model.dtype` is no longer `auto`."""
    first_step: int
    """The step of the checkpoint to go on from; 0 for the model as it was."""
    origin: ModelLocation
    """The model before step 1: after a resume it is still the reference policy."""
    source: PromptSource


def find_inputs(config: Config, run: RunDirectory, notify: Notify) -> Inputs:
    """Find model and prompts, and say what was found.

    Raises:
        UserError: something is missing or cannot be used.
    """
    first_step = _first_step(config, run, notify)
    name = config.model.path
    if first_step:
        folder = str(run.checkpoint(first_step))
        needed = config.algorithm.objective.kl > 0
        origin = ModelLocation(name, str(resolve_model(name)) if needed else None)
    else:
        folder = str(resolve_model(name))
        origin = ModelLocation(name, folder)
    source = _prompt_source(config, folder, run, notify)
    config = with_compute_dtype(config)
    config = replace(config, model=replace(config.model, path=folder))
    return Inputs(config, first_step, origin, source)


def _first_step(config: Config, run: RunDirectory, notify: Notify) -> int:
    """On resume the newest checkpoint's, if there is one."""
    step = run.newest_checkpoint(notify) if config.resume else 0
    if step >= config.steps:
        raise UserError(
            f"{run.path} is at step {step} and steps={config.steps}: give a larger steps= to go on"
        )
    notify(f"resuming from step {step}" if step else f"model {config.model.path}, from step 0")
    return step


def _prompt_source(config: Config, folder: str, run: RunDirectory, notify: Notify) -> PromptSource:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=config.model.trust_remote_code
    )
    check_vocabulary(tokenizer.get_vocab().values(), Path(folder))
    source = build_prompt_source(
        config.data,
        config.eval.prompts,
        config.seed,
        tokenizer,
        config.model.max_length - config.generator.max_completion_tokens,
        config.verifier.rules,
    )
    if bad := source.quarantine.rows:
        path = run.path / QUARANTINE
        source.quarantine.write(path)
        notify(
            f"{len(bad)} of {source.quarantine.seen} rows cannot be used, the first because "
            f"{bad[0].reason}; all are in {path}"
        )
    return source
