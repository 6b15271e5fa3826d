"""Devices that Ray gives, on devices that are only counted: real Ray, `num_gpus` made up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config.load import load_config
from deploy.placement.options import actor_options, plan_cores


@pytest.fixture(scope="module")
def four_devices() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@ray.remote
class Actor:
    def devices(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    def executors(self, chosen: str | None) -> tuple[str, str | None]:
        """What vLLM takes for a generator of two devices: by itself, and as chosen by us."""
        from unittest import mock

        import torch
        from vllm.config.parallel import ParallelConfig
        from vllm.platforms import current_platform

        def of(backend: str | None) -> str:
            found = ParallelConfig(tensor_parallel_size=2, distributed_executor_backend=backend)
            return str(found.distributed_executor_backend)

        with (
            mock.patch.object(torch.cuda, "device_count", return_value=2),
            mock.patch.object(torch.accelerator, "device_count", return_value=2),
            mock.patch.object(type(current_platform), "device_count", return_value=2, create=True),
            mock.patch.object(type(current_platform), "is_cuda", return_value=True),
        ):
            return of(None), of(chosen)


def in_place(gpus: int, options: dict[str, Any]) -> Any:
    """An actor in a bundle of its own with `gpus` devices, as on a cluster."""
    group = placement_group([{"CPU": 1, "GPU": gpus}])
    ray.get(group.ready(), timeout=60)
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    chosen = options | {"num_cpus": 1, "scheduling_strategy": strategy}
    return Actor.options(**chosen).remote()  # type: ignore[attr-defined]


def options_of(*overrides: str, cuda: bool) -> dict[str, Any]:
    config = load_config([], ["model.path=x", *overrides])
    return dict(actor_options(config, plan_cores(config, [0, 1], []), cuda).generator)


def test_in_a_bundle_of_several_devices_vllm_starts_its_workers_by_itself(
    four_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would want a bundle for each worker, and none has room for the second."""
    import torch

    from actors.generation.engine_arguments import engine_arguments
    from common.config.sections import GeneratorConfig, ModelConfig
    from common.weights.registry import TRANSPORTS

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    generator = GeneratorConfig(tensor_parallel=2)
    transport = TRANSPORTS["nccl"]
    chosen = engine_arguments(ModelConfig(path="x"), generator, transport, 0, None)
    actor = in_place(2, options_of("generator.tensor_parallel=2", cuda=True))
    devices = ray.get(actor.devices.remote(), timeout=60)
    assert len(devices.split(",")) == 2
    backend = chosen["distributed_executor_backend"]
    assert ray.get(actor.executors.remote(backend), timeout=120) == ("ray", "mp")


def test_a_generator_of_a_run_on_the_cpu_sees_none_of_the_devices(four_devices: None) -> None:
    """An actor that asks Ray for no device sees them all, unless it is told otherwise."""
    of_cpu = options_of("learner.device=cpu", cuda=False)
    actor = Actor.options(**(of_cpu | {"num_cpus": 0.1})).remote()  # type: ignore[attr-defined]
    assert ray.get(actor.devices.remote(), timeout=60) == ""
    plain = Actor.options(num_cpus=0.1, num_gpus=0).remote()  # type: ignore[attr-defined]
    assert ray.get(plain.devices.remote(), timeout=60) is None
