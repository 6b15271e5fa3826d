"""Section `environment` of the configuration: what the policy acts in, turn after turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from common.config.bounds import Count, NotNegative, Positive, Seconds, at_least

BUILTIN_ENVIRONMENTS = ("calculator", "guess", "mcp", "python")
"""Environments that come with this package (`actors.environments.resolve`)."""

ENVIRONMENT_RULE = "environment"
"""Rule of `verifier.rules` that gives the reward of the environment that an episode was played in.
It is no program: the row says it (`actors.verifiers.judge`)."""


@dataclass
class EnvironmentConfig:
    """What the policy acts in. Without name and command an episode is one answer, judged by the
    rules."""

    name: str | None = None
    """Class of the environment as `package.module:Class`, or one that comes with this package.
    Those are `calculator`, `guess`, `mcp` (the tools of an MCP server) and `python` (runs
    programs). Null is none: the policy answers once."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class."""
    command: list[str] | None = None
    """Instead of a name, a command to run for each episode: an agent that calls the policy as it
    would call OpenAI (chat completions). It is given `OPENAI_BASE_URL`, `OPENAI_API_KEY`, and its
    task as JSON on standard input. `python` is the one that runs this; any other program is looked
    for on `PATH`. A last line `{"reward": 0.5}` of its output is its reward."""
    max_turns: Count = 8
    """Most turns of an episode, those of all its conversations together."""
    turn_tokens: Count = 256
    """Most tokens of a turn. All of an episode, with what is given between turns, have
    `generator.max_completion_tokens`."""
    observation_tokens: Count = 512
    """Most tokens of an observation. A longer one is cut in the middle, and says so."""
    step_timeout_s: Seconds = 10.0
    """Seconds in which the environment has to answer. Behind them its process is killed, and the
    episode has no reward."""
    episode_timeout_s: Seconds = 120.0
    """Seconds that an episode may spend in the environment, all turns together; of a command all
    that it does itself, from its start to its end."""
    placement: Literal["generator", "actors"] = "generator"
    """Where episodes are played. `generator` has `workers` processes beside every generator,
    `actors` has `workers` Ray actors, each with such a process, that all generators share."""
    workers: Count = 1
    """Worker processes. A worker forks a process for each episode, so one serves many."""
    num_cpus: Positive = 1.0
    """CPUs that each of the `actors` asks Ray for."""
    resources: dict[str, NotNegative] = field(default_factory=dict)
    """Custom Ray resources that each of the `actors` asks for."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes on which the `actors` may stand."""
    memory_gib: Annotated[float, at_least(0.25)] = 4.0
    """Memory that an episode may hold in the environment, in GiB. Behind it the episode has no
    reward."""
    network: bool = False
    """Whether environments may open network connections. A command that may not has a network of
    its own, with the endpoint alone in it."""
    readable: list[str] = field(default_factory=list)
    """Files and folders that environments may read, beside Python and what can be imported. A
    command may read the system, the files that it names, and their Python environments."""
    forks: Literal["segment", "error"] = "segment"
    """What becomes of a conversation that does not go on from another one of the episode: that of a
    sub-agent, or one begun anew from a summary. `segment` trains it behind its own prompt; `error`
    refuses it."""
    role: Literal["user", "tool"] = "user"
    """Role in which the policy is told what the environment says."""
    tool_parser: str = "auto"
    """How tool calls are found in a reply: the name of one of vLLM's tool parsers. `auto` takes
    that of the model's template."""
    thoughts: Literal["refuse", "keep"] = "refuse"
    """What to do under a chat template that leaves the thoughts of earlier turns out. `keep` keeps
    them in the episode, which then is not what the template would write; `refuse` ends the run
    before it starts."""
    cut_turns: Literal["go_on", "end"] = "go_on"
    """What becomes of an episode when a turn reaches `turn_tokens`. `go_on` has the environment
    answer what there is; `end` ends the episode there."""

    @property
    def playing(self) -> bool:
        """Whether episodes are played, by a class or by a command."""
        return self.name is not None or self.command is not None
