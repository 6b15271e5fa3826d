"""AdamW in less memory: its moments in eight bits, its weights in bfloat16, or both.

    bytes a parameter    weight    moments
    torch's AdamW        4         8
    state_8bit           4         2 and a scale for each 256        `learner.optimizer.state: 8bit`
    bfloat16 weights     2         8                                 `learner.masters: bfloat16`

The sums are those of torch's AdamW, in float32, on some rows of a parameter at a time. Of the
second moment the square root is kept: it is what a step divides by, and its range is half as many
decades. Norms and biases are few, and keep float32 moments.

No step depends on how rows are shared between ranks. This is why torchao's AdamW8bit (0.18) is not
taken. Its blocks run through a rank's shard, so another number of ranks has others, and cannot load
those that begin within its own. A shard that is not a multiple of 256 stays in float32. Its
rounding draws from the device's random state, which a checkpoint does not hold. It refuses a
learning rate that is a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import Parameter
from torch.optim import Optimizer

from learner.training.eight_bits import BLOCK, dequantise, quantise
from learner.training.rounding import noise, round_to_bfloat16

_AT_A_TIME = 2**20
"""Numbers of a parameter that are in float32 at a time; on a CPU, for its caches, a quarter."""


class LeanAdamW(Optimizer):
    """See the module; a weight in bfloat16 is rounded stochastically."""

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        *,
        state_8bit: bool,
        seed: int,
        eps: float = 1e-8,
    ) -> None:
        """`seed` is that of the rounding.

        Args:
            state_8bit: whether moments of matrices are kept in eight bits.
        """
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, settings)
        self._state_8bit = state_8bit
        self._seed = seed

    @property
    def described(self) -> str:
        """What a checkpoint of its state must agree on."""
        narrow = any(p.dtype == torch.bfloat16 for g in self.param_groups for p in g["params"])
        parts = [
            *(["8-bit states"] if self._state_8bit else []),
            *(["bfloat16 masters"] if narrow else []),
        ]
        return f"AdamW with {' and '.join(parts)}"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step on every parameter that has a gradient."""
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, number)

    def _update(
        self, parameter: Parameter, gradient: Tensor, group: dict[str, Any], number: int
    ) -> None:
        state = self.state[parameter]
        if not state:
            state |= _no_moments(parameter, self._state_8bit)
        state["step"] += 1
        step = int(state["step"])
        columns = math.prod(parameter.shape[1:])
        first = _first_row(parameter) * columns
        weights_RC, gradient_RC = _rows(parameter), _rows(gradient)
        numbers = _AT_A_TIME // 4 if weights_RC.device.type == "cpu" else _AT_A_TIME
        for rows in _slices(len(weights_RC), columns, numbers):
            moments = _Moments(state, rows)
            weight = weights_RC[rows]
            found = _stepped(weight.float(), gradient_RC[rows].float(), moments, step, group)
            moments.keep()
            if weight.dtype == torch.bfloat16:
                place = first + rows.start * columns
                drawn = noise(self._seed, step, number, place, found.numel(), str(found.device))
                found = round_to_bfloat16(found, drawn.view(found.shape))
            weight.copy_(found)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, without its cast of every state to the type of the parameter."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                own = value if name == "step" else value.to(parameter.device)
                self.state[parameter][name] = own


class _Moments:
    """Both moments of some rows of a parameter, in float32."""

    def __init__(self, state: dict[str, Any], rows: slice) -> None:
        self._kept = {n: _rows(v)[rows] for n, v in state.items() if n != "step"}
        if "mean_scales" not in self._kept:
            self.mean, self.square = self._kept["exp_avg"], self._kept["exp_avg_sq"]
            return
        mean, root = (self._kept[name] for name in ("mean_codes", "root_codes"))
        self.mean = dequantise(mean, self._kept["mean_scales"], signed=True)
        self.square = dequantise(root, self._kept["root_scales"], signed=False).square_()

    def keep(self) -> None:
        """Write them back, where they are not the state itself."""
        if "mean_scales" not in self._kept:
            return
        mean, root = self.mean, self.square.sqrt_()
        for name, (codes, scales) in {
            "mean": quantise(mean, signed=True),
            "root": quantise(root, signed=False),
        }.items():
            self._kept[f"{name}_codes"].copy_(codes)
            self._kept[f"{name}_scales"].copy_(scales)


def _stepped(
    weight: Tensor, gradient: Tensor, moments: _Moments, step: int, group: dict[str, Any]
) -> Tensor:
    """The weight after a step, all in float32, as `torch.optim.AdamW` has it; moments move too."""
    (beta1, beta2), rate = group["betas"], group["lr"]
    weight = weight.mul_(1 - rate * group["weight_decay"])
    moments.mean.lerp_(gradient, 1 - beta1)
    moments.square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (moments.square.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    return weight.addcdiv_(moments.mean, root, value=-(rate / (1 - beta1**step)))


def _no_moments(parameter: Parameter, state_8bit: bool) -> dict[str, Tensor]:
    """The state before the first step: sharded as the parameter is."""
    state = {"step": torch.tensor(0.0)}
    if not state_8bit or parameter.ndim < 2:
        names = ("exp_avg", "exp_avg_sq")
        return state | {n: torch.zeros_like(parameter, dtype=torch.float32) for n in names}
    for name in ("mean", "root"):
        state[f"{name}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
        state[f"{name}_scales"] = _no_scales(parameter)
    return state


def _no_scales(parameter: Parameter) -> Tensor:
    """Scales of 0 for every block of a parameter's rows."""
    blocks = -(-math.prod(parameter.shape[1:]) // BLOCK)
    mine = _local(parameter)
    scales = torch.zeros(len(mine), blocks, dtype=torch.float32, device=mine.device)
    if not isinstance(parameter, DTensor):
        return scales
    return DTensor.from_local(
        scales,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size((len(parameter), blocks)),
        stride=(blocks, 1),
    )


def _first_row(parameter: Tensor) -> int:
    """The row of a whole parameter with which this rank's part begins."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh, placements = parameter.device_mesh, parameter.placements
    _, first = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    return int(first[0]) if first else 0


def _rows(tensor: Tensor) -> Tensor:
    """This rank's part as [rows, numbers of a row], without a copy."""
    mine = _local(tensor.detach())
    return mine.view(len(mine), math.prod(mine.shape[1:])) if mine.ndim else mine.view(1, 1)


def _slices(rows: int, columns: int, numbers: int) -> Iterator[slice]:
    """Rows that hold about so many numbers together."""
    each = max(1, numbers // max(1, columns))
    for start in range(0, rows, each):
        yield slice(start, min(start + each, rows))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
