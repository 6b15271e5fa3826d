"""What generators that compute in eight bits go together with (`generator.quantization`).

Whether a run is on CUDA is not known here: `deploy.run.service` refuses the wrong kind for it.
"""

from __future__ import annotations

from common.config.sections import Config
from common.errors import UserError
from common.weights.registry import names_where


def check_device(kind: str | None, *, cuda: bool) -> None:
    """Raise `UserError` where generators on this device do not compute with `kind`."""
    if kind is not None and (kind == "fp8") != cuda:
        here, other = ("CUDA", "fp8") if cuda else ("a CPU", "int8")
        raise UserError(
            f"generator.quantization={kind} does not run on {here}: set it to {other} or null"
        )


def check_quantization(config: Config) -> None:
    """Raise `UserError` unless type, device and transport go with `generator.quantization`."""
    kind = config.generator.quantization
    key = f"generator.quantization={kind}"
    if kind is not None and config.served_adapter is not None:
        raise UserError(
            f"{key} and weights.publish=adapter: an adapter beside weights in eight bits was not "
            "tried. Set weights.publish=merged, or generator.quantization=null"
        )
    if kind == "fp8" and config.model.dtype == "float32":
        raise UserError(
            f"{key} and model.dtype=float32: vLLM's fp8 takes 16-bit weights alone; set "
            "model.dtype=bfloat16, or generator.quantization=null"
        )
    if kind != "int8":
        return
    if config.generator.devices > 1:
        raise UserError(
            f"{key} is for a generator in one process on a CPU: set generator.tensor_parallel and "
            "pipeline_parallel to 1, or generator.quantization=null"
        )
    if config.transport.needs_cuda:
        choices = names_where(lambda transport: not transport.needs_cuda)
        raise UserError(
            f"{key} is for CPUs, and weights.transport={config.weights.transport} for CUDA "
            f"devices: use generator.quantization=fp8, or weights.transport={choices}"
        )
