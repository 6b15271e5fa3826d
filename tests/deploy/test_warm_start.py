"""The optimiser of the warm start against torch's."""

from __future__ import annotations

import pytest
import torch

from deploy.models.warm_start import Muon, orthogonal

SHAPES = [(16, 48), (48, 16), (32, 32)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert values[0] / values[-1] > 3
    found = orthogonal(matrix)
    inner = left.T @ found @ right.T
    assert inner.diagonal().min() > 0.6 and inner.diagonal().max() < 1.3
    torch.testing.assert_close(inner, inner.diagonal().diag(), rtol=0, atol=1e-4)


def test_steps_are_those_of_torch_but_for_its_rounding_to_bfloat16() -> None:
    torch.manual_seed(0)
    ours = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
    theirs = [each.detach().clone().requires_grad_() for each in ours]
    begun = [each.detach().clone() for each in ours]
    optimizers = [Muon(ours, 0.01), torch.optim.Muon(theirs, 0.01, adjust_lr_fn="match_rms_adamw")]
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, before in zip(ours, theirs, begun, strict=True):
        moved = (other - before).norm()
        assert (one - other).norm() < 0.02 * moved
