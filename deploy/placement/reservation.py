"""Reserve room on a cluster: a placement group for each part of a run.

The learner's ranks are packed onto as few nodes as hold them; verifiers and
actors of environments are spread. Every
generator has a group of its own, so that it can come and go alone. A group without room stays
pending, which is what an autoscaler sees. After a deadline an error says what is missing.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.errors import UserError
from deploy.placement.config import ActorConfig, teacher_names
from deploy.placement.options import ActorOptions, environment_actors

_LOOK_S = 0.5
LEARNER, VERIFIERS, ENVIRONMENTS = "learner", "verifiers", "environments"


@dataclass(frozen=True)
class Wish:
    """Room that is asked for: `count` times the resources of `bundle`, on nodes with `labels`."""

    name: str
    bundle: dict[str, float]
    count: int
    labels: dict[str, str]
    strategy: str

    def __str__(self) -> str:
        wanted = ", ".join(f"{name} {amount:g}" for name, amount in self.bundle.items())
        on = ", ".join(f"{key}={value}" for key, value in self.labels.items())
        return f"{self.name}: {self.count} x ({wanted})" + (f" on nodes with {on}" if on else "")


def wishes(config: ActorConfig, options: ActorOptions) -> list[Wish]:
    """What a run, or an evaluation, asks of a cluster."""
    generator, learner, verifier = config.generator, config.learner, config.verifier
    of_generator = _bundle(options.generator, generator.resources)
    generators = [
        Wish(name, of_generator, 1, generator.labels, "PACK") for name in generator_names(config)
    ]
    of_verifier = _bundle(options.verifier, verifier.resources)
    of_teacher = _bundle(options.teacher, {})
    spread = [
        *(Wish(name, of_teacher, 1, {}, "PACK") for name in teacher_names(config)),
        Wish(VERIFIERS, of_verifier, verifier.workers, verifier.labels, "SPREAD"),
        *_environments(config, options),
    ]
    if learner is None:
        return [*spread, *generators]
    of_rank = _bundle(options.learner, learner.resources)
    if config.transport.shares_devices:
        both, labels = Counter(of_generator), generator.labels | learner.labels
        both.update(of_rank)
        return [Wish(LEARNER, dict(both), learner.ranks, labels, "PACK"), *spread]
    ranks = Wish(LEARNER, of_rank, learner.ranks, learner.labels, "PACK")
    return [ranks, *spread, *generators]


def _environments(config: ActorConfig, options: ActorOptions) -> list[Wish]:
    environment, count = config.environment, environment_actors(config)
    bundle = _bundle(options.environment, environment.resources)
    return [Wish(ENVIRONMENTS, bundle, count, environment.labels, "SPREAD")] if count else []


def generator_names(config: ActorConfig) -> list[str]:
    """Names of the generators, which are also those of their places."""
    return [f"generator-{index}" for index in range(config.generator.count)]


def _bundle(options: dict[str, Any], resources: dict[str, float]) -> dict[str, float]:
    bundle = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0), **resources}
    return {name: float(amount) for name, amount in bundle.items() if amount}


class Reservation:
    """Placement groups of one run; Ray takes them back when its connection ends.

    A generator without a wish of its own stands where the learner's rank of its number does.
    """

    def __init__(self, wanted: Sequence[Wish]) -> None:
        self._wishes = {wish.name: wish for wish in wanted}
        self._groups: dict[str, PlacementGroup] = {
            wish.name: placement_group(
                [wish.bundle] * wish.count,
                strategy=wish.strategy,
                bundle_label_selector=[wish.labels] * wish.count if wish.labels else None,
            )
            for wish in wanted
        }

    def is_ready(self, name: str) -> bool:
        """Whether a place is kept for the part called `name`."""
        place = name if name in self._groups else LEARNER
        return bool(self._groups[place].wait(0))

    async def wait(
        self, config: ActorConfig, deadline_s: float, notify: Callable[[str], None]
    ) -> list[str]:
        """Wait until all that the run cannot do without has a place.

        Returns the names of the generators that have one.

        Raises:
            UserError: something has none after `deadline_s`; it names what is missing.
        """
        generators = generator_names(config)
        needed = [name for name in self._wishes if name not in generators]
        ends = asyncio.get_running_loop().time() + deadline_s
        announced = False
        while True:
            ready = [name for name in generators if await asyncio.to_thread(self.is_ready, name)]
            fixed = [await asyncio.to_thread(self.is_ready, name) for name in needed]
            if all(fixed) and len(ready) >= fewest_generators(config):
                return ready
            if asyncio.get_running_loop().time() > ends:
                raise UserError(self._missing(deadline_s))
            if not announced:
                announced = True
                notify(f"waiting up to {deadline_s:.0f} s for room on the cluster")
            await asyncio.sleep(_LOOK_S)

    async def room(self, name: str) -> None:
        """Wait for a place. It has no deadline: who cannot go on meanwhile has one."""
        while not await asyncio.to_thread(self.is_ready, name):
            await asyncio.sleep(_LOOK_S)

    def options(self, name: str, index: int = 0) -> dict[str, Any]:
        """Arguments of `.options` that put an actor into its place, besides its own.

        Places that follow each other are on one node as far as there is room: `learner.shard_ranks`
        ranks in a row gather their layers from each other.
        """
        if name not in self._groups:  # generator-N; custom resources of the place are the rank's
            beside = self.options(LEARNER, int(name.rpartition("-")[2]))
            return {"scheduling_strategy": beside["scheduling_strategy"]}
        group, wish = self._groups[name], self._wishes[name]
        if wish.count > 1:
            nodes = placement_group_table(group)["bundles_to_node_id"]
            index = sorted(nodes, key=lambda place: (nodes[place], place))[index]
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        return {"scheduling_strategy": strategy, "resources": _custom(wish.bundle)}

    def _missing(self, waited_s: float) -> str:
        lacking = [wish for name, wish in self._wishes.items() if not self.is_ready(name)]
        return missing(lacking, ray.nodes(), ray.available_resources(), waited_s)


def _custom(bundle: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}


def fewest_generators(config: ActorConfig) -> int:
    """Generators without which a run waits."""
    fewest = config.generator.min_count
    return config.generator.count if fewest is None else fewest


def missing(
    lacking: Sequence[Wish],
    nodes: Sequence[dict[str, Any]],
    free: dict[str, float],
    waited_s: float,
) -> str:
    """Say what a cluster does not have.

    Args:
        nodes: as `ray.nodes()` gives them.
        free: as `ray.available_resources()`.
    """
    alive = [node for node in nodes if node["Alive"]]
    wanted: dict[str, float] = defaultdict(float)
    for wish in lacking:
        for name, amount in wish.bundle.items():
            wanted[name] += amount * wish.count
    total: Counter[str] = Counter()
    for node in alive:
        total.update(node["Resources"])
    short = [
        f"{name}: {amount:g} wanted, {free.get(name, 0.0):g} free of {total[name]:g}"
        for name, amount in wanted.items()
        if amount > free.get(name, 0.0)
    ]
    labels = [
        f"no node has the label {key}={value}"
        for key, value in {(k, v) for wish in lacking for k, v in wish.labels.items()}
        if not any(node.get("Labels", {}).get(key) == value for node in alive)
    ]
    reasons = short + labels or ["enough in all, but no node holds one of them at once"]
    lines = [
        f"the cluster of {len(alive)} node(s) has no room, after {waited_s:.0f} s, for",
        *(f"  {wish}" for wish in lacking),
        *(f"  {reason}" for reason in reasons),
        "Add nodes, lower generator.count, learner.ranks or their resources, or give it more time "
        "by ray.placement_timeout_s",
    ]
    return "\n".join(lines)
