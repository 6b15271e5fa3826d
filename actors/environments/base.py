"""What a user writes: an environment gives the policy something to do, and says what it was worth.

    reset   a task and a seed   ->  what the policy reads besides its prompt
    step    a reply             ->  `Step`: an observation, perhaps a reward, perhaps the end
    reward  the last reply      ->  the reward of an episode that the environment did not end
    close   ends what `reset` opened

An *episode* is one instance and what the policy does with it. Policy and environment take *turns*:
the policy replies, the environment steps. An environment knows text and nothing of tokens. It is
named by its import path in `environment.name`, and plays in a process of its own
(`actors.environments.child`). So it may raise, hang or crash: that ends its episode, and is never a
reward. Any method may be a coroutine; it is awaited.

`actors.environments.tools` has environments whose methods are tools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from actors.sandbox.programs import Programs


@dataclass(frozen=True)
class ToolCall:
    """What the policy asked of a tool, as read from its reply."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    """Why it cannot be made: it was no JSON, say. The policy is told."""


class Reply(str):
    """What the policy said in a turn: its text, and the tool calls that were found in it."""

    __slots__ = ("calls",)
    calls: tuple[ToolCall, ...]

    def __new__(cls, text: str, calls: Sequence[ToolCall] = ()) -> Reply:
        reply = super().__new__(cls, text)
        reply.calls = tuple(calls)
        return reply


@dataclass(frozen=True)
class ToolResult:
    """What came of one tool call."""

    name: str
    text: str
    failed: bool = False
    """The call could not be made, and `text` says why."""


@dataclass(frozen=True)
class Step:
    """What an environment says to a reply."""

    observation: str = ""
    """What the policy reads before its next turn. None of it is trained on."""
    reward: float | None = None
    """Reward of this turn. The episode's is the sum of those given; where none was given,
    `verifier.rules` judge it."""
    done: bool = False
    """The episode is over: the policy is not asked again."""
    state: str | None = None
    """A name of the state that the policy was in when it replied. Turns of a group in one state can
    be compared (GiGPO)."""
    results: tuple[ToolResult, ...] = ()
    """What came of tool calls, one each. They make up the observation where there are any."""


class Environment:
    """Base class of environments. One instance plays one episode."""

    programs: ClassVar[str] = ""
    """Module with the entry points of programs that the policy writes (`actors.sandbox.programs`).
    Where it is named, `runner` is there from `reset` on."""
    runner: Programs
    """Runs such programs. Its process was forked before the episode began, and knows no task."""

    def reset(self, task: Mapping[str, Any], seed: int) -> Any:
        """Begin the episode; returns the first observation, "" for none.

        Args:
            task: the row of the data set, `prompt` and `answer` among its columns.
            seed: the same for all episodes of a group. Python's and NumPy's random numbers are
                seeded with it already.
        """
        return ""

    def step(self, reply: str) -> Any:
        """Answer the policy's reply, a `Reply`; returns a `Step`."""
        raise NotImplementedError(f"{type(self).__name__} has no method step")

    def reward(self, reply: str) -> Any:
        """Return the reward of an episode that a limit ended, on top of what the steps gave.

        Args:
            reply: the last one; "" where there was none.

        Returns: None for no more than the steps gave.
        """
        return None

    def close(self) -> Any:
        """End what `reset` has opened. The process ends anyway."""

    def tools(self) -> Any:
        """Return the JSON schemas of the tools that the policy is told of, none by default."""
        return []
