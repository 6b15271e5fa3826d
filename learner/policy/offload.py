"""Activations that wait in the memory of the host between the forward and the backward pass.

A layer that is computed again keeps its input alone. On its way into autograd's account that input
is copied to the host, and back when the backward pass asks for it: a copy changes no bit. What
belongs to the layer itself, its weights, stays where it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def offload_inputs(layers: nn.ModuleList) -> None:
    """Have each layer's saved tensors wait on the host; behind `checkpoint_activations`.

    `forward` is wrapped, not the module: FSDP's hooks, which gather the weights, run outside.
    """
    for layer in layers:
        forward = layer.forward

        def waiting(*args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
            with saved_tensors_hooks(_to_host, _back):
                return _forward(*args, **kwargs)

        layer.forward = waiting


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """A copy on the host, and where it came from.

    It is made on the stream that made the tensor and that will make the copy back. So nothing waits
    for it, and the device's memory is free for what follows on that stream.
    """
    pinned = tensor.device.type == "cuda"
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    return tensor.device, host.copy_(tensor, non_blocking=pinned)


def _back(waiting: tuple[torch.device, Tensor]) -> Tensor:
    device, host = waiting
    return host.to(device, non_blocking=host.is_pinned())
