"""The fused head against log_softmax, and its memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from learner.policy import logprobs
from learner.policy.logprobs import HeadRequest, LogitTransform, LogprobHead, chunked_logprobs

N, H, V = 11, 6, 13
TRANSFORMS = [LogitTransform(), LogitTransform(0.5), LogitTransform(2.0, 1.5)]


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, V, (N,))


def _oracle(hidden, weight, bias, labels, temperature, transform) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, labels[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chunk", [1, 4, N, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_log_softmax(transform: LogitTransform, chunk: int, temperature: float) -> None:
    hidden, weight, bias, labels = _inputs()
    request = HeadRequest(torch.arange(N), labels, temperature, with_entropy=True)
    found = chunked_logprobs(hidden, weight, bias, request, chunk, transform)
    expected = _oracle(hidden, weight, bias, labels, temperature, transform)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert not found[1].requires_grad
    upstream = torch.randn(N, dtype=torch.float64)
    inputs = (hidden, weight, bias)
    gradients = torch.autograd.grad(found[0], inputs, upstream)
    oracle = torch.autograd.grad(expected[0], inputs, upstream)
    torch.testing.assert_close(gradients, oracle, atol=1e-11, rtol=1e-11)


def test_the_entropy_of_a_certain_token_has_a_finite_gradient() -> None:
    """Probabilities that round to 0 in float32: p log p and its slope are 0 there."""
    hidden = torch.tensor([[300.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    labels = torch.tensor([0])
    request = HeadRequest(torch.arange(1), labels, 1.0, with_entropy=True, entropy_learns=True)
    _, entropy = chunked_logprobs(hidden, weight, None, request, 4)
    entropy.sum().backward()
    assert hidden.grad is not None and hidden.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradcheck(transform: LogitTransform) -> None:
    hidden, weight, bias, labels = _inputs()
    request = HeadRequest(torch.arange(N), labels, 0.8)

    def scored(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_logprobs(hidden, weight, bias, request, 4, transform)[0]

    assert torch.autograd.gradcheck(scored, (hidden, weight, bias))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chunk", [4, 100])
def test_an_entropy_that_learns_has_the_gradient_of_its_definition(
    transform: LogitTransform, chunk: int
) -> None:
    hidden, weight, bias, labels = _inputs()
    request = HeadRequest(torch.arange(N), labels, 0.7, entropy_learns=True)
    found = chunked_logprobs(hidden, weight, bias, request, chunk, transform)
    expected = _oracle(hidden, weight, bias, labels, 0.7, transform)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    upstream = tuple(torch.randn(N, dtype=torch.float64) for _ in found)
    inputs = (hidden, weight, bias)
    gradients = torch.autograd.grad(found, inputs, upstream)
    oracle = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(gradients, oracle, atol=1e-11, rtol=1e-11)


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor with a vocabulary axis."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() and out.shape[-1] == 1009:
            self.elements = max(self.elements, out.numel())
        return out


def test_logits_never_exceed_one_chunk() -> None:
    tokens, chunk, vocabulary = 64, 8, 1009
    hidden = torch.randn(tokens, H, requires_grad=True)
    weight = torch.randn(vocabulary, H, requires_grad=True)
    request = HeadRequest(torch.arange(tokens), torch.zeros(tokens, dtype=torch.long), 1.0, True)
    saved: list[int] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with _LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
            logprobs, _ = chunked_logprobs(hidden, weight, None, request, chunk)
        logprobs.sum().backward()
    assert largest.elements == chunk * vocabulary
    assert max(saved) == max(weight.numel(), hidden.numel())


def test_a_device_multiplies_into_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of chunks are added up in float32, with torch's wide products as on CUDA."""
    torch.manual_seed(0)
    hidden = torch.randn(24, H).bfloat16().requires_grad_()
    weight = torch.randn(V, H).bfloat16().requires_grad_()
    request = HeadRequest(torch.arange(24), torch.randint(0, V, (24,)))

    def gradient() -> Tensor:
        scored = chunked_logprobs(hidden, weight, None, request, 5)[0]
        return torch.autograd.grad(scored.sum(), weight)[0]

    narrow = gradient()
    calls = []

    def mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        calls.append("mm")
        return left.to(out_dtype) @ right.to(out_dtype)

    def addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype, out: Tensor) -> Tensor:
        calls.append("addmm")
        return out.addmm_(left.to(out_dtype), right.to(out_dtype))

    monkeypatch.setattr(logprobs, "_WIDE_PRODUCTS", {"cpu"})
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    wide = gradient()
    assert calls == ["mm", *["addmm"] * 4]
    torch.testing.assert_close(wide, narrow, atol=0.05, rtol=0.02)


def test_no_tokens_give_zero_gradients() -> None:
    hidden = _inputs()[0]
    none = torch.empty(0, dtype=torch.long)
    head = LogprobHead(torch.nn.Linear(H, V), 4, LogitTransform())
    with head.requested(HeadRequest(none, none)):
        scores = head(hidden.float()[None])
    assert scores.shape == (1, 0, 2)
    scores.sum().backward()
    assert hidden.grad is not None and not hidden.grad.any()
    assert head.weight.grad is not None and not head.weight.grad.any()


def test_head_refuses_to_run_unasked() -> None:
    head = LogprobHead(torch.nn.Linear(H, V), 4, LogitTransform())
    with pytest.raises(RuntimeError, match="requested"):
        head(torch.zeros(1, 2, H))
