"""What an environment is: it gives the policy something to answer, and rewards the answers.

An *episode* begins with a task, what a row of the data set says to its environment. Then policy and
environment take turns: the policy gives a reply, the environment answers with a `Step`. A step that
is done ends the episode and carries its reward.

    reset    tasks    ->  what the policy reads besides its prompt
    step     replies  ->  steps
    close    ends whatever it has started

The verbs take many episodes at once, one entry each, because a child process judges a batch in one
exchange. E stands for the number of episodes.

There is one environment today, `actors.environments.single_turn`, whose episodes are done after the
first reply. `actors.environments.worker` plays them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.verifiers.base import Verdict


@dataclass(frozen=True)
class Step:
    """What an environment says to one reply of the policy."""

    done: bool
    """The episode is over: the policy is not asked again."""
    observation: str = ""
    """What the policy reads before its next reply. It is the environment's text, so none of it is
    trained on."""
    reward: float | None = None
    """The reward of the whole episode, once it is done. None, and never 0: nobody could tell."""
    verdicts: tuple[Verdict, ...] = ()
    """What the reward was made of, one verdict a rule."""


class Environment(Protocol):
    """Plays episodes side by side. One thread calls it; `close` may come from any."""

    def wait_ready(self) -> None:
        """Returns when it can play; says what is wrong with its settings where it never will."""
        ...

    def reset(self, tasks: Sequence[str], prompts: Sequence[str] = ()) -> list[str]:
        """Begin [E] episodes, one a task, and forget those before.

        Args:
            prompts: [E] texts the policy has read, templates included; empty: nobody knows.

        Returns:
            [E] first observations; an empty one leaves the policy with its prompt.
        """
        ...

    def step(self, replies: Sequence[str], finish_reasons: Sequence[str] = ()) -> list[Step]:
        """[E] steps, each the answer to the reply of its episode.

        Args:
            finish_reasons: [E] why the replies ended, `stop` or `length`; empty: nobody knows.
        """
        ...

    def close(self) -> None:
        """End everything that was started. An episode that is being played fails."""
        ...
