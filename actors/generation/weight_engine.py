"""The vLLM worker's side of the `object_store` transport.

The generator actor takes a bucket of the learner's weights from Ray's object store and lends it to
the worker, which may be in a process that is not Ray's; the worker loads the tensors through
vLLM's layerwise reload, so that fused and prepacked layers are rebuilt as at start-up. vLLM's base
class synchronises an accelerator after every update, hence the override.

Loaded into the worker by `worker_extension_cls`; importing this module registers the transport
and ties the worker's life to its parent's.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from actors.generation.lending import buffer_at
from common.errors import WeightsError
from common.supervision.faults import reached
from common.weights import WeightBucket, unpack_tensors

TRANSPORT = "object_store"
_PR_SET_PDEATHSIG = 1


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """No rendezvous: every update names its file."""


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """One bucket: where `actors.generation.lending` put it, and `WeightBucket`'s fields about
    it."""

    place: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: int
    checksum: int


class ObjectStoreWeightEngine(WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]):
    """Loads buckets that were lent; the generator has checked all of them before the first."""

    init_info_cls = ObjectStoreInitInfo
    update_info_cls = ObjectStoreUpdateInfo

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        refresh_tied_heads(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        """Load one bucket. Raises `WeightsError` when it is not what the learner packed."""
        bucket = WeightBucket(
            ref=None,
            names=tuple(update_info.names),
            dtypes=tuple(update_info.dtypes),
            shapes=tuple(tuple(shape) for shape in update_info.shapes),
            offsets=tuple(update_info.offsets),
            nbytes=update_info.nbytes,
            checksum=update_info.checksum,
        )
        self.model.load_weights(unpack_tensors(bucket, buffer_at(update_info.place)))
        reached("weights half loaded")

    def shutdown(self) -> None:
        """No resources outlive an update."""


def refresh_tied_heads(model: torch.nn.Module) -> None:
    """Rebuild what output heads derive from weights they share with the embedding.

    A layerwise reload rebuilds a layer when weights of its own arrive. A tied head has none: it
    keeps the tensor it shares, which is updated in place, but also, on CPU, a packed copy for its
    matrix product, which would stay that of the first weights for ever.

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
    """Named in `worker_extension_cls` so that the worker imports this module; adds nothing."""


def _die_with_parent() -> None:
    """A worker whose generator actor was killed must not live on with its memory and cores."""
    in_actor = multiprocessing.parent_process() is None  # Ray's processes are Ray's to end
    if sys.platform.startswith("linux") and not in_actor:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if TRANSPORT not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(TRANSPORT, ObjectStoreWeightEngine)
    _die_with_parent()
