"""Host memory for what leaves a device: pinned, so that the copy is asynchronous.

A copy is only begun here. `wait_for_copies` before the host reads it, and before the device's
tensor changes.
"""

from __future__ import annotations

import torch


def host_buffer(nbytes: int, filled_from: torch.device) -> torch.Tensor:
    """`nbytes` of host memory as uint8, not initialised; pinned where a CUDA device fills it."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=filled_from.type == "cuda")


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` on the host; one that is there already stays as it is."""
    if tensor.device.type == "cpu":
        return tensor
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    copy = host_buffer(flat.numel(), tensor.device)
    copy.copy_(flat, non_blocking=True)
    return copy.view(tensor.dtype).view(tensor.shape)


def wait_for_copies(device: torch.device) -> None:
    """Return when all copies from `device` that were begun are there."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
