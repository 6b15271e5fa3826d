"""A configuration made to fit the CUDA devices of this machine.

Where there is one device, generator and learner take turns on it: weights go by `ipc`, and the run
is synchronous. Where there are more, they stand apart, as the configuration says.
"""

from __future__ import annotations

from dataclasses import replace

from common.config.sections import Config
from common.errors import UserError
from common.weights.registry import TransportName
from deploy.placement.options import devices_wanted, uses_cuda, with_compute_dtype

_SHARED: TransportName = "ipc"
_CHANGED = (
    "generator.count",
    "generator.tensor_parallel",
    "generator.pipeline_parallel",
    "generator.max_staleness",
    "learner.ranks",
    "weights.transport",
)


def on_these_devices(config: Config) -> tuple[Config, str | None]:
    """The configuration for this machine, and what was changed, as a sentence; None: nothing.

    Only a run on a cluster of its own is changed, which has this machine alone.

    Raises:
        UserError: it would have to be changed to what it cannot be with its other keys.
    """
    if config.ray.address != "local" or not uses_cuda(config):
        return config, None
    import torch

    if torch.cuda.device_count() != 1 or devices_wanted(config) <= 1:
        return config, None
    if config.served_adapter is not None:
        raise UserError(
            "one CUDA device here, on which generator and learner take turns, and "
            f"weights.transport={_SHARED}, by which they do, carries no adapters alone: set "
            "weights.publish=merged, or use a machine with two devices"
        )
    together = replace(
        config,
        generator=replace(
            config.generator,
            count=1,
            min_count=None,
            num_gpus=0.0,
            tensor_parallel=1,
            pipeline_parallel=1,
            max_staleness=0,
        ),
        learner=replace(config.learner, ranks=1, shard_ranks=None),
        weights=replace(config.weights, transport=_SHARED),
    )
    changes = [
        f"{key}={_value(together, key)} for {_value(config, key)}"
        for key in _CHANGED
        if _value(together, key) != _value(config, key)
    ]
    return together, (
        "one CUDA device here, so generator and learner take turns on it: "
        + ", ".join(changes)
        + ". With two devices or more they work at once"
    )


def check_savings(config: Config) -> None:
    """Raise `UserError` for savings of memory that cannot be made on the devices of this machine.

    A plan for devices by name (`placement.generator_device`) is one for CUDA.
    """
    from learner.training.ways import check_offload

    if config.placement.generator_device is not None or uses_cuda(config):
        return
    check_offload(config.learner)
    if config.learner.masters == "bfloat16" and with_compute_dtype(config).model.dtype == "float32":
        raise UserError(
            "learner.masters=bfloat16 trains weights that are narrower than what this CPU computes "
            "in, which multiplies no bfloat16 by itself: set model.dtype=bfloat16, which is slower "
            "here, or learner.masters=float32"
        )


def _value(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
