"""Simulate a run by discrete events: how long a step takes, and what it waits for.

Generators decode in continuous batches; verifiers and the trajectory log are queues. The learner
takes steps by the staleness budget and the window of a real run (`common.budget`), and weights
reach the generators beside the next step. What each part costs is given (`Costs`): measured, or
derived from a device's data sheet (`deploy.predict.costs`). Nothing else is simulated: no failures,
no evaluation, no checkpoints, and the network only as far as the costs contain it.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from common.budget import GroupWindow, StalenessBudget
from common.config.bounds import NotNegative, check_bounds
from common.config.sections import Config
from common.errors import UserError
from common.trajectory import GroupReceipt

Lengths = Callable[[int], Sequence[float]]
"""Function from a number of completions to the tokens of each."""

_SKIPPED = 4
"""First steps, which are not counted: their groups all begin at once."""


@dataclass(frozen=True)
class Costs:
    """Costs of a run's parts, each in seconds."""

    decode_round_s: NotNegative
    """One round of decoding: a token for every running sequence of a generator."""
    decode_sequence_s: NotNegative
    """What each running sequence adds to a round."""
    prefill_token_s: NotNegative
    """A token of a prompt."""
    request_s: NotNegative
    """What a completion costs its generator, beside its tokens."""
    coordinate_s: NotNegative
    """What a group costs the coordinator."""
    verify_s: NotNegative
    """A completion's verdict, of one verifier."""
    log_group_s: NotNegative
    """A group, in the trajectory log."""
    learner_step_s: NotNegative
    """A step, beside its tokens."""
    learner_token_s: NotNegative
    """A token trained on, all ranks together."""
    export_s: NotNegative
    """Time from the end of a step until the learner may go on."""
    deliver_s: NotNegative
    """Time until the generators begin to load, beside the learner's next step."""
    stall_s: NotNegative
    """Time for which generation stands still in every update."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.decode_round_s + self.decode_sequence_s == 0:
            raise UserError("decode_round_s and decode_sequence_s are both 0: decoding takes time")


@dataclass(frozen=True)
class Workload:
    """What a run asks for."""

    prompts_per_step: int
    group_size: int
    max_staleness: int
    generators: int
    sequences: int
    """How many completions one generator runs at a time."""
    verifiers: int
    prompt_tokens: int
    trained_share: float = 1.0
    """Share of the completions whose advantage is not zero."""

    @classmethod
    def of(
        cls, config: Config, *, sequences: int, prompt_tokens: int, trained_share: float = 1.0
    ) -> Workload:
        """What the run of `config` asks for; what is not in a configuration is given."""
        return cls(
            prompts_per_step=config.groups_per_step,
            group_size=config.completions_per_step // config.groups_per_step,
            max_staleness=config.generator.max_staleness,
            generators=config.generator.count,
            sequences=sequences,
            verifiers=config.verifier.workers,
            prompt_tokens=prompt_tokens,
            trained_share=trained_share,
        )


@dataclass(frozen=True)
class Prediction:
    """Means over the steps that count; shares are shares of time."""

    step_s: float
    completions_per_s: float
    generating: float
    """Share of time that a generator decodes; the rest it waits for prompts or loads weights."""
    learning: float
    verifying: float
    coordinating: float
    logging: float

    @property
    def bottleneck(self) -> str:
        """The part that is busiest, of which more would help; none where all wait."""
        shares = {
            "generation": self.generating,
            "learning": self.learning,
            "verification": self.verifying,
            "the coordinator": self.coordinating,
            "the trajectory log": self.logging,
        }
        name = max(shares, key=shares.__getitem__)
        if shares[name] < _BUSY:
            return (
                "none: parts wait for each other (a larger generator.max_staleness overlaps them)"
            )
        return name


_BUSY = 0.8


class _Generator:
    """A generator, whose running sequences advance together, a token a round."""

    def __init__(self, costs: Costs, slots: int) -> None:
        self._costs = costs
        self._slots = slots
        self._running: list[tuple[float, int, int]] = []  # (progress at its end, tie, group)
        self._waiting: deque[tuple[float, int]] = deque()  # (tokens, group)
        self._ties = itertools.count()
        self._progress = 0.0  # tokens that a sequence running from the start would have
        self._now = 0.0
        self._busy_from = 0.0
        self.busy_s = 0.0
        self.groups = 0
        self.changes = 0

    def advance(self, now: float) -> None:
        elapsed = now - max(self._now, self._busy_from)
        if self._running and elapsed > 0:
            self._progress += elapsed / self._round_s
            self.busy_s += elapsed
        self._now = now

    @property
    def _round_s(self) -> float:
        return self._costs.decode_round_s + self._costs.decode_sequence_s * len(self._running)

    def add(self, group: int, tokens: Sequence[float], admit_s: float) -> None:
        self.hold(admit_s)
        self.busy_s += admit_s
        self._waiting.extend((float(count), group) for count in tokens)
        self._fill()

    def hold(self, seconds: float) -> None:
        """Decode nothing for `seconds`, after what holds it already."""
        self._busy_from = max(self._now, self._busy_from) + seconds

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._slots:
            tokens, group = self._waiting.popleft()
            heapq.heappush(self._running, (self._progress + tokens, next(self._ties), group))
        self.changes += 1

    def next_end(self) -> float | None:
        """The time at which the next sequence ends if nothing changes; None where none runs."""
        if not self._running:
            return None
        left = max(0.0, self._running[0][0] - self._progress)
        return max(self._now, self._busy_from) + left * self._round_s

    def ended(self) -> list[int]:
        """Take out the sequences that end at `next_end`, and return the group of each."""
        groups = []
        self._progress = max(self._progress, self._running[0][0])  # whatever rounding left of it
        while self._running and self._running[0][0] <= self._progress + 1e-6:
            groups.append(heapq.heappop(self._running)[2])
        self._fill()
        return groups


class _Queue:
    """A queue before equal servers: first come, first served."""

    def __init__(self, servers: int) -> None:
        self._free_at = [0.0] * servers
        self.busy_s = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """Queue what comes now and return when it is done."""
        done = max(now, heapq.heappop(self._free_at)) + seconds
        heapq.heappush(self._free_at, done)
        self.busy_s += seconds
        return done


@dataclass
class _Group:
    """A group between its dispatch and the learner."""

    receipt: GroupReceipt
    generator: _Generator
    left: int
    """Completions still to be verified."""


class Simulation:
    """The simulation of one run."""

    def __init__(self, work: Workload, costs: Costs, lengths: Lengths) -> None:
        self._work, self._costs, self._lengths = work, costs, lengths
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now = 0.0
        self._generators = [_Generator(costs, work.sequences) for _ in range(work.generators)]
        self._verifiers = _Queue(work.verifiers)
        self._coordinator, self._log = _Queue(1), _Queue(1)
        self._budget = StalenessBudget(work.max_staleness, work.prompts_per_step)
        self._window = GroupWindow(work.max_staleness, work.prompts_per_step)
        self._groups: dict[int, _Group] = {}
        self._group_ids = itertools.count()
        self._version = self._delivered = 0
        self._learning = False
        self._delivered_at = 0.0
        self.learner_busy_s = 0.0
        self.step_ends: list[float] = []

    def run(self, steps: int) -> Prediction:
        """Simulate `steps` learner steps and sum them up; `steps` is above `_SKIPPED`."""
        self._dispatch()
        self._until_step(_SKIPPED)
        busy = self._busy()
        self._until_step(steps)
        since = self.step_ends[_SKIPPED - 1]
        span = self.step_ends[-1] - since
        shares = [(end - begin) / span for begin, end in zip(busy, self._busy(), strict=True)]
        times = np.diff(self.step_ends[_SKIPPED - 1 :])
        step_s = statistics.fmean(times)
        work = self._work
        return Prediction(
            step_s,
            work.prompts_per_step * work.group_size / step_s,
            shares[0] / work.generators,
            shares[1],
            shares[2] / work.verifiers,
            *shares[3:],
        )

    def _until_step(self, steps: int) -> None:
        while len(self.step_ends) < steps:
            self._now, _, happen = heapq.heappop(self._events)
            happen()

    def _busy(self) -> list[float]:
        for generator in self._generators:
            generator.advance(self._now)
        decoding = sum(generator.busy_s for generator in self._generators)
        queues = (self._verifiers, self._coordinator, self._log)
        return [decoding, self.learner_busy_s, *(queue.busy_s for queue in queues)]

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen))

    def _dispatch(self) -> None:
        """Fill every free slot with a group, on the generator that has the fewest."""
        touched: dict[int, _Generator] = {}
        while self._budget.try_acquire():
            group = next(self._group_ids)
            generator = min(self._generators, key=lambda each: each.groups)
            tokens = self._lengths(self._work.group_size)
            receipt = _receipt(group, self._delivered, sum(tokens))
            self._groups[group] = _Group(receipt, generator, left=len(tokens))
            self._window.dispatch(group, self._delivered)
            generator.advance(self._now)
            generator.add(group, tokens, self._admit_s)
            generator.groups += 1
            touched[id(generator)] = generator
        for generator in touched.values():
            self._watch(generator)

    @property
    def _admit_s(self) -> float:
        """Time of a group before its first token; its completions share the prompt."""
        costs, work = self._costs, self._work
        return work.prompt_tokens * costs.prefill_token_s + work.group_size * costs.request_s

    def _watch(self, generator: _Generator) -> None:
        """Come back when its next sequence ends, unless it changes before."""
        end, changes = generator.next_end(), generator.changes

        def happen() -> None:
            if generator.changes == changes:
                generator.advance(self._now)
                for group in generator.ended():
                    self._sampled(group)
                self._watch(generator)

        if end is not None:
            self._at(end, happen)

    def _sampled(self, group_id: int) -> None:
        verified = self._verifiers.serve(self._now, self._costs.verify_s)
        group = self._groups[group_id]
        group.left -= 1
        if group.left == 0:
            group.generator.groups -= 1
            seen = self._coordinator.serve(verified, self._costs.coordinate_s)
            logged = self._log.serve(seen, self._costs.log_group_s)
            self._at(logged, lambda: self._complete(self._groups.pop(group_id)))

    def _complete(self, group: _Group) -> None:
        self._window.complete(group.receipt)
        self._learn()

    def _learn(self) -> None:
        if self._learning or self._window.num_complete < self._work.prompts_per_step:
            return
        taken = self._window.take(self._version)
        if taken is None:
            return
        self._learning = True
        tokens = self._work.trained_share * sum(receipt.num_tokens for receipt in taken)
        tokens += len(taken) * self._work.prompt_tokens
        train_s = self._costs.learner_step_s + tokens * self._costs.learner_token_s
        # One version is on its way at a time.
        exports_at = max(self._now + train_s, self._delivered_at)
        busy_s = train_s + self._costs.export_s
        self._at(exports_at + self._costs.export_s, lambda: self._stepped(busy_s))

    def _stepped(self, busy_s: float) -> None:
        self._learning = False
        self.learner_busy_s += busy_s
        self._version += 1
        self.step_ends.append(self._now)
        loads_at = self._now + self._costs.deliver_s
        self._delivered_at = loads_at + self._costs.stall_s
        self._at(loads_at, self._load)
        self._at(self._delivered_at, self._release)
        self._learn()

    def _load(self) -> None:
        for generator in self._generators:
            generator.advance(self._now)
            generator.hold(self._costs.stall_s)
            generator.changes += 1
            self._watch(generator)

    def _release(self) -> None:
        self._delivered += 1
        self._budget.release(self._work.prompts_per_step)
        self._dispatch()


def lognormal_lengths(median: float, sigma: float, longest: int, seed: int = 0) -> Lengths:
    """Log-normal lengths of completions, from one token to `longest`."""
    draw = np.random.default_rng(seed)

    def lengths(count: int) -> Sequence[float]:
        drawn = draw.lognormal(np.log(median), sigma, count)
        return [float(tokens) for tokens in np.clip(np.round(drawn), 1, longest)]

    return lengths


def measured_lengths(pool: Sequence[int], seed: int = 0) -> Lengths:
    """Lengths that are drawn from those of a trajectory log."""
    draw = np.random.default_rng(seed)
    return lambda count: [float(tokens) for tokens in draw.choice(np.asarray(pool), count)]


def _receipt(group: int, version: int, tokens: float) -> GroupReceipt:
    return GroupReceipt(
        group_id=group,
        ticket=group,
        batch_ref=None,
        dispatch_version=version,
        min_version=version,
        max_version=version,
        num_completions=1,
        num_tokens=int(tokens),
        reward_mean=0.0,
        rewards_equal=False,
        num_unscored=0,
        unscored_tokens=0,
        generate_s=0.0,
    )
