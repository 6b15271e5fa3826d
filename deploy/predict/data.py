"""What `plan` says of the data: it reads them as a run does, and samples nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.data.account import counted, example
from actors.data.prompts import PromptSource, prompt_source_of
from actors.environments.check import environment_tools, inspect_environment
from actors.rendering.renderer import Renderer
from common.config.sections import Config
from common.errors import UserError
from deploy.models.resolve import tokenizer_here
from deploy.predict.episodes import Trial


@dataclass(frozen=True)
class DataSeen:
    """What was found in the data, and in the environment that episodes of them are played in."""

    lines: list[str]
    trial: Trial | None = None
    """None where there is no environment, or nothing was read."""


def see_data(config: Config) -> DataSeen:
    """Rows, what cannot be used, lengths, and one example as policy and verifiers get it.

    Data of the hub, and tokenizers, are read where they are at hand.

    Raises:
        UserError: the data cannot be used.
    """
    tokenizer = tokenizer_here(config.model.path, config.model.trust_remote_code)
    if tokenizer is None:
        return DataSeen([f"not read: the tokenizer of {config.model.path} is not on this machine"])
    tools = environment_tools(config.environment)
    try:
        source = prompt_source_of(config, tokenizer, tools)
    except UserError as error:
        if "hub" in config.data.kinds:
            return DataSeen([f"not read: {error}"])
        raise
    lines = [*counted(source), *example(source, tokenizer)]
    if config.environment.name is None:  # a command is tried by a policy alone
        return DataSeen(lines + inspect_environment(config.environment, {}).notes)
    more, trial = _environment(config, source, tools, tokenizer)
    return DataSeen(lines + more, trial)


def _environment(
    config: Config, source: PromptSource, tools: Sequence[Mapping[str, Any]], tokenizer: Any
) -> tuple[list[str], Trial]:
    """The tools of the environment, what a trial of it says, and what the template does."""
    environment = config.environment
    names = ", ".join(str(tool["function"]["name"]) for tool in tools)
    task = json.loads(source.rows.train[0].reference)
    found = inspect_environment(environment, task)
    renderer = Renderer.of_environment(tokenizer, config.data, environment, tools)
    # A turn that was cut is given its end too; the text itself is a token.
    said = [{"role": environment.role, "content": "1"}]
    between = len(renderer.behind(said, ended=False)) - 1
    longest = max(source.lengths)
    trial = Trial(between, found.speaks_first, found.reset_s, found.turn_s, longest)
    return [*([f"tools: {names}"] if names else []), *found.notes, *renderer.notes], trial
