"""Cut traces by exact enumeration: which weight has which expectation.

Every completion of 4 tokens out of 2 symbols, a policy that differs from the sampler in every
state, and an advantage that depends on the whole completion. No sampling: sums over all 16.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from maths_oracles import algorithm, normal, random
from torch import Tensor

from learner.algorithm.loss import CompletionBatch, policy_loss

LENGTH, DECAY = 4, 0.9
SEQUENCES = list(itertools.product(range(2), repeat=LENGTH))


class World:
    """Policy and sampler by tables of logits, [prefix, symbol]; the advantage of a completion."""

    def __init__(self, seed: int) -> None:
        generator = random(seed)
        self.states = {
            prefix: i
            for i, prefix in enumerate(
                p for length in range(LENGTH) for p in itertools.product(range(2), repeat=length)
            )
        }
        size = 2 * len(self.states)
        self.policy_SV = normal(size, generator).view(-1, 2).requires_grad_()
        self.sampler_SV = self.policy_SV.detach() + normal(size, generator, 0.5).view(-1, 2)
        self.advantages_B = normal(len(SEQUENCES), generator)

    def logprobs(self, table_SV: Tensor) -> Tensor:
        """Log-probability of every token of every completion, [B, T]."""
        rows = [[self.states[o[:t]] for t in range(LENGTH)] for o in SEQUENCES]
        return table_SV.log_softmax(-1)[torch.tensor(rows), torch.tensor(SEQUENCES)]

    def gradient(self, weights_BT: Tensor) -> Tensor:
        """sum_o sum_k weights grad log pi(o_k), by state."""
        total = (weights_BT * self.logprobs(self.policy_SV)).sum()
        return torch.autograd.grad(total, self.policy_SV)[0]

    def expected(self) -> Tensor:
        """Prefixes from the sampler, token k and all behind it from the policy: c_k A as weight."""
        policy_BT = self.logprobs(self.policy_SV).detach()
        sampler_BT = self.logprobs(self.sampler_SV)
        credit_T = [sum(DECAY**j for j in range(LENGTH - k)) for k in range(LENGTH)]
        weights_BT = torch.zeros(len(SEQUENCES), LENGTH, dtype=torch.float64)
        for k in range(LENGTH):
            log_p_B = sampler_BT[:, :k].sum(1) + policy_BT[:, k:].sum(1)
            weights_BT[:, k] = log_p_B.exp() * self.advantages_B * credit_T[k]
        return self.gradient(weights_BT)

    def found(self, cap: float = math.inf, **credit: object) -> Tensor:
        """The gradient of the real loss over all completions, each as often as it is sampled."""
        policy_BT = self.logprobs(self.policy_SV)
        sampler_BT = self.logprobs(self.sampler_SV)
        size = len(SEQUENCES)
        batch = CompletionBatch(
            logprobs_N=policy_BT.flatten(),
            old_logprobs_N=policy_BT.detach().flatten(),
            behaviour_logprobs_N=sampler_BT.flatten(),
            reference_logprobs_N=None,
            entropy_N=None,
            loss_mask_N=torch.ones(size * LENGTH, dtype=torch.bool),
            lengths_B=torch.full((size,), LENGTH),
            advantages_B=self.advantages_B,
            token_weights_B=sampler_BT.sum(1).exp(),
            prefix_counts_N=None,
        )
        trace = {"kind": "lambda_trace", "application": "weight", "lambda_": DECAY, **credit}
        config = algorithm(credit=trace, correction={"cap": cap})
        return -torch.autograd.grad(policy_loss(batch, config, "tis").loss, self.policy_SV)[0]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("seed", range(5))
def test_without_a_bound_the_suffix_product_is_exact(seed: int) -> None:
    world = World(seed)
    found = world.found(cut=True, args={"cut_bound": math.inf})
    assert error(found, world.expected()) < 1e-14


def per_token(world: World, weight: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """The gradient where TD error t reaches token k with `weight(ratios, k, t)`, A at every t."""
    sampler_BT = world.logprobs(world.sampler_SV)
    ratios_BT = (world.logprobs(world.policy_SV).detach() - sampler_BT).exp()
    weights_BT = torch.zeros_like(ratios_BT)
    for k in range(LENGTH):
        for t in range(k, LENGTH):
            weights_BT[:, k] += DECAY ** (t - k) * weight(ratios_BT, k, t)
    chance_B = sampler_BT.sum(1).exp()
    return world.gradient(weights_BT * (chance_B * world.advantages_B)[:, None])


@pytest.mark.parametrize("seed", range(5))
def test_the_product_up_to_the_td_error_is_not(seed: int) -> None:
    """V-trace's k..t is right for TD errors of a critic; A knows what comes behind t."""
    world = World(seed)
    expected = world.expected()
    to_the_end = per_token(world, lambda ratios, k, t: ratios[:, k:].prod(1))
    assert error(to_the_end, expected) < 1e-14
    to_the_error = per_token(world, lambda ratios, k, t: ratios[:, k : t + 1].prod(1))
    assert error(to_the_error, expected) > 0.05


def test_what_the_bounds_cost() -> None:
    """Relative errors over 200 worlds: bounded cuts are biased, and less so than no cut at all."""
    worlds = [World(seed) for seed in range(200)]

    def median(**options: object) -> float:
        errors = [error(w.found(**options), w.expected()) for w in worlds]  # type: ignore[arg-type]
        return float(torch.tensor(errors).median())

    whole = median(cap=2.0, cut=True)
    by_factor = median(cap=2.0, cut=True, args={"cut_by_factor": True})
    none = median(cap=2.0)
    print(f"product {whole:.3f}, factors {by_factor:.3f}, no cut {none:.3f}")
    assert whole < by_factor
    assert whole < none
