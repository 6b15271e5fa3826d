"""Generators and learner ranks on the same devices: the plan of their memory, and who starts first.

vLLM starts only where its share of the device is free, and counts as its own what others take
meanwhile. So generators start alone. Their cache has the bytes that the plan leaves it, whatever
is free at that moment. Then they sleep, and the learner takes its place. It wakes them with the
first weights that it publishes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from actors.generation.generator import Generator
from actors.rollout.pool import all_answer
from actors.rollout.pools import start_generators
from common.config.sections import Config
from common.devices import Device
from common.errors import UserError
from common.supervision.calls import Handle, ask, call
from common.supervision.waits import Waits
from deploy.predict.cluster_plan import ClusterPlan


async def start_asleep(
    config: Config,
    generators: Mapping[str, Handle[Generator]],
    waits: Waits,
    notify: Callable[[str], None],
) -> None:
    """Start generators with the cache that the plan gives them, and have them sleep.

    Raises:
        UserError: a device does not hold what the run needs.
    """
    deadline_s = config.generator.start_timeout_s
    sizes = [
        waits.on(
            ask(handle, Generator.device_bytes),
            owner="start-up",
            cause=f"the memory of {name}'s device",
            deadline_s=deadline_s,
        )
        for name, handle in generators.items()
    ]
    plan = plan_on(config, min(await asyncio.gather(*sizes)))
    for line in plan.memory_lines():
        notify(line)
    cache_bytes = plan.memory.kv_cache_bytes
    await start_generators(generators, waits, deadline_s, cache_bytes)
    await sleep(generators, waits, deadline_s)


async def sleep(
    generators: Mapping[str, Handle[Generator]], waits: Waits, deadline_s: float
) -> None:
    """Have generators leave their devices to the learner."""
    await all_answer(generators, call(Generator.sleep), waits, deadline_s)


def plan_on(config: Config, device_bytes: int) -> ClusterPlan:
    """The plan of a device of `device_bytes`, which a generator and a learner rank share.

    Raises:
        UserError: it does not hold what the run needs; or the model is of another shape than the
            plan knows.
    """
    device = Device(flops=0.0, bandwidth=0.0, memory=device_bytes, link=0.0)
    try:
        plan = ClusterPlan.on(config, device, device)
    except KeyError as error:
        raise UserError(
            f"the memory of {config.model.path} cannot be planned, since its config.json does not "
            f"say {error}, and generator and learner share a device: give them two, with "
            "weights.transport=object_store or nccl"
        ) from error
    if plan.problems:
        raise UserError(
            "generator and learner do not fit on one device:\n  "
            + "\n  ".join(plan.memory_lines())
            + f"\n{'; '.join(plan.problems)}. Or use a smaller model"
        )
    return plan
