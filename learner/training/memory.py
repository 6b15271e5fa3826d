"""Memory of a learner rank, counted from the shape of its model before anything is loaded.

    kept         float32 weights and the optimiser's state: this rank's shard, at all times; where
                 adapters are trained, both of them alone, and the frozen weights in bfloat16; twice
                 with a critic; bfloat16 weights where `learner.masters` says so
    gradients    of the weights' type: this rank's shard; or whole in float32, where they are
                 reduced once a step
    gathered     bfloat16 weights of two layers, of the embedding and the head; the largest input
                 of a reduction
    head         logits of a chunk, and the float32 sum of the head's gradient
    activations  inputs of all layers, and one layer in full; all layers in full without recompute;
                 one layer alone where inputs wait on the host

The peak is reached in the backward pass of the head or of the last layer, whichever needs more.
`tests/learner/test_memory.py` compares it with a count of the real modules on tensors without
content. Layers that are compiled keep less than is counted here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.config.algorithm import AlgorithmConfig
from learner.policy.shape import BYTES, ModelShape

MASTER = 4
"""Bytes of a float32 weight or gradient."""
CONTEXT = 0.6e9
"""Bytes of CUDA's context and the libraries' workspaces, of each process on a device."""
NCCL = 1.0e9
"""Bytes of NCCL's buffers, of each process that has peers."""
SLACK = 0.05
"""Share of a device that is lost between blocks of memory."""
_SMALL = 4e9
"""Parameters up to which a whole float32 gradient may stand on every rank."""


@dataclass(frozen=True)
class OtherModels:
    """The models that a rank holds a shard of, beside the policy."""

    reference: bool = False
    """The model that the run began from, frozen."""
    teacher: float = 0.0
    """Parameters of a teacher; 0 where none is held in a gradient step."""
    critic: bool = False
    """A critic, as large as the policy, which is trained as the policy is."""
    average: bool = False
    """A moving average of what is trained of the policy, in float32."""

    @classmethod
    def of(cls, algorithm: AlgorithmConfig, teacher: float) -> OtherModels:
        """Those that `algorithm` asks for, and a teacher of so many parameters."""
        return cls(
            reference=algorithm.needs_reference,
            teacher=teacher,
            critic=algorithm.needs_critic,
            average=algorithm.needs_average,
        )


ALONE = OtherModels()


@dataclass(frozen=True)
class LearnerLoad:
    """What a rank is asked to hold."""

    shards: int
    """Ranks that hold one copy of the weights between them."""
    tokens: int
    """Tokens of the longest micro-batch."""
    logits_mib: float
    recompute: bool
    """Whether layers are computed again in the backward pass."""
    reduce_once: bool = False
    """Whether gradients stay whole on every rank until the step's last micro-batch."""
    state_bytes: float = 8.0
    """Bytes that the optimiser keeps for a parameter; 8 is AdamW's two moments."""
    others: OtherModels = ALONE
    adapters: float = 0.0
    """Parameters of adapters, which are trained beside frozen weights; 0 where all are trained."""
    master: int = MASTER
    """Bytes of a weight that is trained."""
    offload: bool = False
    """Whether the inputs that are kept for `recompute` wait on the host."""


@dataclass(frozen=True)
class LearnerMemory:
    """Bytes of a learner rank at its peak, by what needs them."""

    kept: float
    gradients: float
    gathered: float
    head: float
    activations: float
    host: float = 0.0
    """Bytes on the host, where activations wait there."""

    @property
    def peak(self) -> float:
        """Bytes of all together."""
        return self.kept + self.gradients + self.gathered + self.head + self.activations


def fitting(
    shape: ModelShape,
    load: LearnerLoad,
    room: float,
    recompute: bool | None,
    reduce_once: bool | None,
) -> LearnerLoad:
    """The fastest way to compute a step of `load` within `room` bytes; the leanest if none fits.

    A second forward pass costs a quarter of a step, a reduction in every micro-batch less.

    Args:
        recompute, reduce_once: what is wished; None leaves it to this function. Inputs that wait
            on the host are those of layers that are computed again.
    """
    recompute = True if load.offload else recompute
    small = load.shards > 1 and shape.parameters <= _SMALL
    ways = [
        replace(load, recompute=again, reduce_once=once)
        for again in ([False, True] if recompute is None else [recompute])
        for once in ([small, False] if reduce_once is None else [reduce_once])
    ]
    return next((way for way in ways if learner_memory(shape, way).peak <= room), ways[-1])


def learner_memory(shape: ModelShape, load: LearnerLoad) -> LearnerMemory:
    """Bytes that a rank needs for its shard and a micro-batch of `load.tokens`."""
    in_head = _in_head(shape, load)
    in_layer = _in_layer(shape, load)
    gathered, head, activations = max(in_head, in_layer, key=sum)
    others = load.others
    apart = others.reference or load.adapters  # the base is the reference too
    trained = load.adapters or shape.parameters
    bases = (1 if apart else 0) + (1 if load.adapters and others.critic else 0)
    frozen = bases * shape.parameters + others.teacher
    frozen_bytes = (BYTES * frozen + MASTER * trained * others.average) / load.shards
    models = 2 if others.critic else 1  # they step one after the other: gradients of one at a time
    gradients = load.master * trained / load.shards
    if load.reduce_once:
        gradients = float(MASTER * trained)
    return LearnerMemory(
        kept=models * (load.master + load.state_bytes) * trained / load.shards + frozen_bytes,
        gradients=gradients,
        gathered=gathered,
        head=head,
        activations=activations,
        host=BYTES * load.tokens * shape.hidden * shape.layers if load.offload else 0.0,
    )


def _in_head(shape: ModelShape, load: LearnerLoad) -> tuple[float, float, float]:
    """Bytes as the head's backward pass ends: gathered, head, activations."""
    embedding, row = shape.embedding, BYTES * load.tokens * shape.hidden
    saved = _saved(shape, load.tokens) if not load.recompute else row
    gathered = BYTES * (embedding + shape.layer_parameters) + _reduced(shape, load)
    head = load.logits_mib * 2**20
    if not load.adapters:
        head = MASTER * embedding + max(head, BYTES * embedding)
    kept = 0.0 if load.offload else shape.layers * saved
    return gathered, head, kept + 6 * row


def _in_layer(shape: ModelShape, load: LearnerLoad) -> tuple[float, float, float]:
    """Bytes as the backward pass is in the last layer: gathered, head, activations."""
    embedding, row = shape.embedding, BYTES * load.tokens * shape.hidden
    saved = _saved(shape, load.tokens)
    others = 0.0 if load.offload else (shape.layers - 1) * (row if load.recompute else saved)
    # A tied weight stays gathered, and its gradient waits for the embedding's.
    head = 2.0 * BYTES * embedding if shape.tied and not load.adapters else 0.0
    gathered = 2 * BYTES * shape.layer_parameters + _reduced(shape, load)
    within = saved + BYTES * load.tokens * (2 * shape.intermediate + 2 * shape.hidden)
    return gathered, head, others + within + row


def _reduced(shape: ModelShape, load: LearnerLoad) -> float:
    """Bytes of the input of the last reduction, which lives until the next one."""
    if load.adapters:
        return MASTER * load.adapters / shape.layers
    return 0.0 if load.reduce_once else MASTER * shape.embedding


def _saved(shape: ModelShape, tokens: int) -> float:
    """Bytes that one layer keeps for its backward pass, run operation by operation.

    Norms keep their input and output in float32 and bfloat16, attention its queries, keys, values
    and output (a prompt's keys once for each completion), the MLP four of its units.
    """
    width, kv_width = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    norms = 16 * shape.hidden + (8 * (width + kv_width) if shape.head_norms else 0)
    attention = 4 * width + 5 * kv_width + 4 * shape.heads
    return float(tokens * (norms + attention + 8 * shape.intermediate))
