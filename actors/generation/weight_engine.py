"""The vLLM worker's part of the transport through the object store.

The generator takes a bucket of the learner's weights from Ray's object store and lends it to the
worker, which may be in a process that is not Ray's (`common.weights.object_store`). The worker
loads the tensors through vLLM's layerwise reload, so that fused and prepacked layers are rebuilt
as at start-up.

vLLM loads this module into the worker by `worker_extension_cls`. The import registers the
transport and ties the worker's life to its parent's.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from actors.generation.adapters import replace_adapter
from common.errors import UserError, WeightsError
from common.supervision.faults import reached
from common.supervision.parents import die_with_parent
from common.weights.buckets import WeightBucket, unpack_tensors
from common.weights.lending import buffer_at
from common.weights.object_store import ObjectStore

_PREPARES_AGAIN = "_prepares_experts_again"
"""Attribute of a layer's method that `prepare_experts_again` has changed."""


class ObjectStoreWeightEngine(
    WeightTransferEngine[WeightTransferInitInfo, WeightTransferUpdateInfo]
):
    """Loads buckets that were lent; the generator has checked all of them before the first."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = WeightTransferUpdateInfo

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        prepare_experts_again(self.model)
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        refresh_tied_heads(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket; `update_info` has its fields, with a place for the buffer.

        vLLM's own method would synchronise an accelerator, which a CPU has not.

        Raises:
            UserError: vLLM does not know a tensor, or wants it in another shape.
        """
        bucket = WeightBucket(**update_info)
        try:
            self.model.load_weights(unpack_tensors(bucket, buffer_at(bucket.buffer)))
        except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"vLLM does not take the weights of {type(self.model).__name__} in an update: "
                f"{type(error).__name__}: {error}. No restart mends that: train another model"
            ) from error
        reached("weights half loaded")

    def receive_weights(self, update_info: WeightTransferUpdateInfo) -> None:
        raise NotImplementedError("update_weights loads buckets by itself")

    def shutdown(self) -> None:
        """No resources outlive an update."""


def prepare_experts_again(model: torch.nn.Module) -> None:
    """Have a reload prepare the weights of experts as their kernel had them at start-up.

    The kernel of a mixture may want another form than the checkpoint's: on CPU padded and packed
    for its grouped product. vLLM gives it that form when it loads a layer for the first time, and
    in a reload leaves the plain weights where the kernel reads the packed ones.
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is None or hasattr(method, _PREPARES_AGAIN):
            continue
        plain = method.process_weights_after_loading

        def process(layer: torch.nn.Module, _plain: Any = plain, _method: Any = method) -> None:
            _plain(layer)
            _method.moe_kernel.fused_experts.process_weights_after_loading(layer)

        method.process_weights_after_loading = process
        setattr(method, _PREPARES_AGAIN, True)


def refresh_tied_heads(model: torch.nn.Module) -> None:
    """Rebuild what output heads derive from weights they share with the embedding.

    A layerwise reload rebuilds a layer when weights of its own arrive. A tied head has none. It
    keeps the tensor it shares, which is updated in place. On CPU it also keeps a packed copy for
    its matrix product, which would stay that of the first weights for ever.

    Raises:
        WeightsError: a head no longer shares the embedding's memory.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    modules = list(model.modules())
    embeddings = {
        m.weight.data_ptr()
        for m in modules
        if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)
    }
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    for head in modules:
        if not isinstance(head, ParallelLMHead):
            continue
        if head.weight.data_ptr() in embeddings:
            head.quant_method.process_weights_after_loading(head)
        elif tied:
            raise WeightsError("the tied output head lost the embedding's memory in the update")


class WeightUpdateExtension:
    """Named in `worker_extension_cls`: the worker imports this module, and can be asked for what is
    here."""

    model_runner: Any
    """The worker's own."""

    def replace_adapter(self, update_infos: list[dict[str, Any]], rank: int, alpha: int) -> None:
        """See `actors.generation.adapters.replace_adapter`."""
        replace_adapter(self.model_runner.get_model(), update_infos, rank, alpha)


if ObjectStore.name not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(ObjectStore.name, ObjectStoreWeightEngine)
    if multiprocessing.parent_process() is not None:  # Ray's processes are Ray's to end
        die_with_parent()
