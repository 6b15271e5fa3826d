"""A learner step on tensors without content: what it holds, launches, multiplies and sends.

The policy, its head and FSDP2 are the real ones. Tensors are fake (shape and type alone), and so is
the process group: this process is rank 0 of as many ranks as a test asks for. What torch compiles
on a device counts as one kernel that holds its results alone.

It counts what the code asks for on a CPU's mesh. A device adds contexts, NCCL's buffers and what
its allocator leaves between blocks.
"""

from __future__ import annotations

import collections
import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.initialization import no_init_weights

from common.config.sections import AdapterConfig
from learner.policy import logprobs
from learner.policy import offload as host
from learner.policy.adapters import add_adapters
from learner.policy.model import Policy, checkpoint_activations
from learner.policy.packing import PackedRow, pack_row
from learner.policy.shape import ModelShape
from learner.policy.varlen import VARLEN_NAME
from learner.training import fsdp
from learner.training.eight_bits import BLOCK
from learner.training.heap import narrow

_FREE = ("aten.detach", "aten.empty", "aten.lift_fresh", "prim.", "profiler.", "c10d")
"""Operations that launch nothing on a device, and those that are counted as messages."""


@dataclass
class Count:
    """What a step asks of a rank."""

    peak: int = 0
    """Most bytes that live at a time."""
    held: dict[int, int] = field(default_factory=dict, repr=False)
    """Bytes of every block at the peak."""
    kernels: int = 0
    touched: int = 0
    """Bytes that kernels read and write."""
    sent: collections.Counter[str] = field(default_factory=collections.Counter)
    """Bytes of messages, by collective."""
    messages: collections.Counter[str] = field(default_factory=collections.Counter)
    flops: int = 0
    """Of matrix products; attention is not among them."""
    saved: int = 0
    """Bytes that live as the backward pass begins, beyond those before the forward pass."""


class _Watch(TorchDispatchMode):
    """Keeps the account of living memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()
        self.living = 0
        self._sizes: dict[int, int] = {}
        self._within = False

    def hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._set(storage, new=storage._cdata not in self._sizes)

    def _set(self, storage: torch.UntypedStorage, *, new: bool) -> None:
        key = storage._cdata
        if new:
            weakref.finalize(storage, self._drop, key)
        self.living += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()
        if self.living > self.count.peak:
            self.count.peak, self.count.held = self.living, dict(self._sizes)

    def _drop(self, key: int) -> None:
        self.living -= self._sizes.pop(key)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP gathers and frees weights by the size of their storage."""
        if storage._cdata in self._sizes:
            self._set(storage, new=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._within:
            self._account(func, (args, kwargs), out)
        return out

    def _account(self, func: Any, given: Any, out: Any) -> None:
        name = str(func)
        inputs = [t for t in tree_iter(given) if isinstance(t, Tensor)]
        outputs = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        for tensor in outputs:
            self.hold(tensor)
        if name.startswith("c10d"):
            what = name.split(".")[1].strip("_").removesuffix("_base")
            self.count.messages[what] += 1
            self.count.sent[what] += max(map(_size, inputs))
        elif not func.is_view and not name.startswith(_FREE):
            self.count.kernels += 1
            read = {tensor.untyped_storage()._cdata: tensor for tensor in inputs}
            self.count.touched += sum(map(_size, read.values())) + sum(map(_size, outputs))
            if name.startswith(("aten.mm.", "aten.addmm.")):
                left = inputs[int("addmm" in name)]
                self.count.flops += 2 * outputs[0].numel() * left.shape[1]

    def unseen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as one whose results are on another device."""

        def elsewhere(*args: Any) -> Any:
            self._within = True
            out = function(*args)
            self._within = False
            return out

        return elsewhere

    def one_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as a compiler makes it: its inputs are read, its results written."""

        def fused(*args: Any) -> Any:
            self._within = True
            out = function(*args)
            self._within = False
            self._account(torch.ops.aten.clone.default, args, out)
            return out

        return fused


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def hf_config(shape: ModelShape) -> PretrainedConfig:
    """The configuration of transformers for a shape."""
    kind = Qwen2Config if shape.attention_bias else LlamaConfig
    if shape.head_norms:
        kind = Qwen3Config
    return kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32_768,
    )


def row_of(tokens: int, vocabulary: int, prompt: int = 256, completion: int = 1024) -> PackedRow:
    """Groups of at most seven completions behind a prompt, which fill `tokens` but for a rest."""
    ids = np.zeros(completion, np.int64)
    parts, left = [], tokens
    while (fits := min(7, (left - prompt) // completion)) > 0:
        parts.append((np.zeros(prompt, np.int64), [ids] * fits))
        left -= prompt + fits * completion
    if left > prompt + 1:
        parts.append((np.zeros(prompt, np.int64), [np.zeros(left - prompt, np.int64)]))
    return pack_row(parts, range(sum(len(c) for _, c in parts)), "cpu")


@contextlib.contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """This process is rank 0 of so many, and hears from none of the others."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_step(
    shape: ModelShape,
    ranks: int,
    *,
    shard_ranks: int | None = None,
    tokens: int = 14_592,
    logits_mib: float = 1024,
    recompute: bool = True,
    reduce_once: bool = False,
    varlen: bool = True,
    fused: bool = True,
    microbatches: int = 2,
    moments: int = 2,
    adapter_rank: int = 0,
    lean: bool = False,
    offload: bool = False,
) -> Count:
    """Count the forward and backward passes of a step, after its first one made the optimiser.

    Args:
        fused: the head runs as it does on a device.
        moments: float32 numbers that the optimiser keeps for a parameter.
        adapter_rank: that of adapters on all linear layers; 0 trains all weights.
        lean: weights are bfloat16, and so many moments are in eight bits.
        offload: inputs of layers wait on the host, which is not counted.
    """
    watch = _Watch()
    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        done = resize(storage, size)
        watch.resized(storage)
        return done

    on_device = contextlib.ExitStack()
    if offload:
        on_device.enter_context(patch.object(host, "_to_host", watch.unseen(host._to_host)))
        on_device.enter_context(patch.object(host, "_back", lambda waiting: waiting[1].clone()))
    if fused:
        on_device.enter_context(patch.object(logprobs, "_compile", watch.one_kernel))
        on_device.enter_context(patch.object(logprobs, "_WIDE_PRODUCTS", {"cpu"}))
    with fake_ranks(ranks), patch.object(torch.UntypedStorage, "resize_", resized), on_device:
        mesh = fsdp.data_mesh(torch.device("cpu"), shard_ranks)
        with FakeTensorMode():
            policy = _policy(shape, logits_mib, recompute=recompute, fused=fused, varlen=varlen)
            if adapter_rank:
                adapter = AdapterConfig(rank=adapter_rank)
                # They are where their layers are, and a move there wants content.
                with patch.object(torch.nn.Module, "to", lambda module, *args, **_: module):
                    add_adapters(policy, adapter, seed=0, weights=False)
                frozen = (p for p in policy.model.parameters() if not p.requires_grad)
                narrow(frozen, torch.bfloat16)
            if lean:
                narrow(policy.model.parameters(), torch.bfloat16)
            if offload:
                host.offload_inputs(policy.layers)
            fsdp.shard(policy.model, policy.layers, mesh, torch.bfloat16)
            parameters = list(policy.model.parameters())
            with watch:
                trained = [p._local_tensor for p in parameters if p.requires_grad]
                state = [_moment(tensor, lean) for tensor in trained * moments]
                for parameter in parameters:
                    watch.hold(parameter._local_tensor)
                row = row_of(tokens, shape.vocabulary)
                for index in range(microbatches):
                    fsdp.before_backward(
                        policy.model,
                        last=index == microbatches - 1,
                        keep_gathered=False,
                        reduce_once=reduce_once,
                    )
                    before = watch.living
                    logprobs_N, _ = policy.logprobs(row, temperature=1.0)
                    watch.count.saved = watch.living - before
                    logprobs_N.sum().backward()
                    del logprobs_N
                    row.layout.derived.clear()
                del state
    return watch.count


def _moment(weight: Tensor, lean: bool) -> list[Tensor]:
    if not lean or weight.ndim < 2:
        return [torch.empty_like(weight, dtype=torch.float32)]
    scales = torch.empty(len(weight), -(-weight.shape[1] // BLOCK))
    return [torch.empty_like(weight, dtype=torch.uint8), scales]


def _policy(
    shape: ModelShape, logits_mib: float, *, recompute: bool, fused: bool, varlen: bool
) -> Policy:
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(hf_config(shape), dtype=torch.float32)
    model.tie_weights()
    policy = Policy(model, max(1, int(logits_mib * 2**20 / (4 * shape.vocabulary))))
    if recompute:
        checkpoint_activations(policy.layers)
    if fused:
        policy.head.use_compiled()
    if varlen:
        policy.model.config._attn_implementation = VARLEN_NAME
    return policy
