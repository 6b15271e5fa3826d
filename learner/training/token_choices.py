"""The tokens of an update on all ranks together, for the rules that choose among them.

See `learner.algorithm.choices`. Shapes: B completions of the step, N completion tokens of a
micro-batch, M trained tokens of the update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learner.algorithm.choices import TokenColumns, TokenShare
from learner.algorithm.prepared import Prepared
from learner.algorithm.recipe import Recipe
from learner.policy.model import Policy
from learner.training import fsdp
from learner.training.work import Microbatch

Chosen = Mapping[str, Tensor]
"""What is said of the tokens of a micro-batch by axis, [N] bool or float64 on its device."""

_Columns = npt.NDArray[np.float64]
_ROWS = 7
"""log pi, log pi_old, log mu, entropy, advantage, weight, whether it is in the loss."""


@torch.no_grad()
def choose_tokens(
    recipe: Recipe,
    policy: Policy,
    microbatches: Sequence[Microbatch],
    old: Sequence[Tensor] | None,
    prepared: Prepared,
    temperature: float,
    share: TokenShare | None,
) -> list[Chosen]:
    """What the recipe's rules choose among all tokens of an update, by micro-batch. Collective.

    It costs a forward pass where a rule chooses, and nothing elsewhere.

    Args:
        old: log-probabilities before the first update of the batch; None if this is the first.
        share: tokens that the update is for; None: all.
    """
    choosers = recipe.choosers()
    if not choosers:
        return [{} for _ in microbatches]
    mine: dict[int, _Columns] = {}
    for i, each in enumerate(microbatches):
        logprobs_N, entropy_N = policy.logprobs(
            each.row, temperature=temperature, with_entropy=True
        )
        each.row.layout.derived.clear()  # dense masks of all would outlive the pass
        old_N = logprobs_N if old is None else old[i]
        mask_N = each.loss_mask_N if share is None else each.loss_mask_N & share(old_N)
        mine |= _by_completion(each, mask_N, logprobs_N, old_N, entropy_N, prepared)
    fsdp.reshard(policy.model)
    found = {c: columns for part in fsdp.gather_objects(mine) for c, columns in part.items()}
    order = sorted(found)  # of the batch, whoever scored them
    everything = np.concatenate([np.zeros((_ROWS, 0)), *(found[c] for c in order)], axis=1)
    lengths = [found[c].shape[1] for c in order]
    mask_M = torch.from_numpy(everything[-1] > 0)
    columns = TokenColumns(*torch.from_numpy(everything[:-1])[:, mask_M])
    by_axis: dict[str, dict[int, Tensor]] = {}
    for axis, chooser in choosers.items():
        answer = chooser(columns)
        chosen = answer.new_zeros(mask_M.shape)
        chosen[mask_M] = answer
        by_axis[axis] = dict(zip(order, chosen.split(lengths), strict=True))
    return [_share(each, by_axis) for each in microbatches]


def _by_completion(
    microbatch: Microbatch,
    mask_N: Tensor,
    logprobs_N: Tensor,
    old_N: Tensor,
    entropy_N: Tensor,
    prepared: Prepared,
) -> dict[int, _Columns]:
    """The columns of each completion, [7, its tokens]."""

    def of_tokens(values_B: Tensor) -> Tensor:
        return values_B[microbatch.indices_B].repeat_interleave(microbatch.lengths_B.cpu())

    advantages_N = microbatch.advantages_N
    if advantages_N is None:
        advantages_N = of_tokens(prepared.advantages_B)
    behaviour_N = microbatch.behaviour_logprobs_N
    if microbatch.elsewhere_B is not None:  # what another prompt made likely says nothing here
        elsewhere_N = microbatch.elsewhere_B.repeat_interleave(microbatch.lengths_B)
        behaviour_N = behaviour_N.masked_fill(elsewhere_N, math.nan)
    rows = [
        logprobs_N,
        old_N,
        behaviour_N,
        entropy_N,
        advantages_N,
        of_tokens(prepared.token_weights_B),
        mask_N,
    ]
    columns = torch.stack([row.double().cpu() for row in rows])
    parts = columns.split(list(microbatch.row.lengths), dim=1)
    completions = microbatch.row.completions
    return {c: part.numpy() for c, part in zip(completions, parts, strict=True)}


def _share(microbatch: Microbatch, by_axis: Mapping[str, Mapping[int, Tensor]]) -> Chosen:
    device, own = microbatch.loss_mask_N.device, microbatch.row.completions
    if not own:
        return {}
    return {
        axis: torch.cat([chosen[c] for c in own]).to(device) for axis, chosen in by_axis.items()
    }
