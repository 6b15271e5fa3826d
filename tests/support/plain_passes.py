"""The untouched model's forward and backward pass, one plain sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

ROW_SHAPES = [(9, (5, 12, 1, 7)), (4, (20,)), (17, (3, 3)), (1, (2, 6, 6))]


def spread_weights(count: int) -> Tensor:
    """[count] a different weight for every token, so that none can stand in for another."""
    return torch.linspace(-1.0, 2.0, count)


def one_at_a_time(model, groups, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """[N] log-probabilities of all completions, and the gradients of their weighted sum."""
    parts = []
    for prompt, completions in groups:
        for completion in completions:
            ids = torch.tensor([*prompt, *completion])[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            logprobs = (logits / temperature).log_softmax(-1)
            parts.append(logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0])
    logprobs_N = torch.cat(parts)
    (logprobs_N * spread_weights(len(logprobs_N))).sum().backward()
    return logprobs_N.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_same_pass(found, expected) -> None:
    """Log-probabilities and gradients agree but for rounding in float32."""
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        if gradient is None:  # nothing trains it, as some routers' biases
            assert found[1][name] is None
            continue
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5 * (1 + scale), rtol=1e-4)
