"""Whether a rule's gradient goes the way of the measured one.

Two gradients of the same completions, at the policy that sampled them, under one objective and one
aggregation, the rule's:

    g   every token has the advantage that the rule credits it with
    m   every token has the measured advantage of its segment

The *cosine* of both says how much of the rule's step goes where the branches say. Noise turns m,
too: the *ceiling* is the cosine that m itself would have with the true gradient, from gradients of
two halves of the continuations (Spearman and Brown). KL, entropy and likelihood are left out, for
they follow no advantage. Tokens whose advantage could not be measured are left out of g and m.

Intervals are of 95 %, by drawing whole completions anew.

Legend: C completions, D entries of a sketched gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from common.config.sections import Config
from deploy.credit.agreement import of_all_samples
from deploy.credit.measured import Floats, Measured
from deploy.eval.metrics import Estimate
from deploy.inspector.replay import policy_at
from learner.algorithm.recipe import Recipe
from learner.policy.step_batch import StepBatch
from learner.training.credited import (
    Credited,
    advantages_alone,
    as_prepared,
    sketched_gradients,
)
from learner.training.trainer import Trainer

Sketches = npt.NDArray[np.float32]
Key = tuple[int, int]
"""Group and completion."""
_DRAWS = 1000
_NOISE = 1e-12
"""Share of the squares of the gradients below which the square of their sum is rounding."""
_CHUNK = 2**16
"""Entries of sketches that are multiplied at a time."""


@dataclass(frozen=True)
class Directions:
    """How far a rule's gradient goes the way of the measured one."""

    cosine: Estimate
    ceiling: Estimate
    """The cosine that a perfect rule could show."""
    missing: str
    """Why there is no cosine; empty where there is one."""


def directions(
    run: Config,
    policy: Path | None,
    groups: Sequence[pa.RecordBatch],
    measured: Mapping[Key, Measured],
    rules: Mapping[str, tuple[Config, pa.Table]],
) -> dict[str, Directions]:
    """Compare the gradient of every rule with the measured one.

    Args:
        policy: checkpoint of the policy that sampled; None: the model that the run began from.
        groups: all of the step.
        rules: configuration of each, and its table of the credit log.
    """
    batch = StepBatch.from_record_batches(groups)
    with policy_at(run, policy) as learner:
        return {
            name: of_rule(learner.trainer, batch, groups, config, table, measured)
            for name, (config, table) in rules.items()
        }


def of_rule(
    trainer: Trainer,
    batch: StepBatch,
    groups: Sequence[pa.RecordBatch],
    config: Config,
    table: pa.Table,
    measured: Mapping[Key, Measured],
) -> Directions:
    """Compare the gradient of one rule with the measured one: see `directions`."""
    length = config.generator.max_completion_tokens
    recipe = advantages_alone(config.algorithm, config.correction_kind, length)
    place = {key: row for row, key in enumerate(_keys(pa.Table.from_batches(groups)))}
    rows = {place[key]: row for key, row in zip(_keys(table), table.to_pylist(), strict=True)}
    chosen = {place[key]: each for key, each in measured.items()}
    weights_B = _weights(recipe, batch, rows, chosen)

    def gradients(advantages: Mapping[int, Floats], of_rule: bool = False) -> Sketches:
        given = [
            Credited(i, rows[i]["token_weight"] if of_rule else float(weights_B[i]), values_T)
            for i, values_T in advantages.items()
        ]
        return sketched_gradients(trainer, batch, recipe, given)

    known = {i: each.of_tokens() for i, each in chosen.items()}
    own = {i: _credited(rows[i]["advantages"], values_T) for i, values_T in known.items()}
    both = [{i: each.half(side).of_tokens() for i, each in chosen.items()} for side in (0, 1)]
    for i in chosen:  # a token counts where both halves know it
        unknown_T = np.isnan(both[0][i]) | np.isnan(both[1][i])
        both[0][i][unknown_T] = both[1][i][unknown_T] = math.nan
    mine, true = gradients(own, of_rule=True), gradients(known)
    found, halves = cosine(mine, true), cosine(gradients(both[0]), gradients(both[1]))
    missing = _missing(mine, true) if math.isnan(found.value) else ""
    return Directions(found, of_all_samples(halves), missing)


def cosine(one_CD: Sketches, other_CD: Sketches, seed: int = 0) -> Estimate:
    """Cosine of the sums of two sets of gradients, with an interval over completions drawn anew.

    NaN where one of the sums is 0, and for the interval of a single completion.
    """
    count = len(one_CD)
    pairs = ((one_CD, other_CD), (one_CD, one_CD), (other_CD, other_CD))
    both, first, second = (_products(*pair) for pair in pairs)

    def of(times_XC: Floats) -> Floats:
        """Of X draws, by how often each has a completion."""
        inner, a, b = (
            np.einsum("xc,cd,xd->x", times_XC, products, times_XC)
            for products in (both, first, second)
        )
        squares = times_XC**2
        some_X = (a > _NOISE * (squares @ first.diagonal())) & (
            b > _NOISE * (squares @ second.diagonal())
        )
        found = np.full(len(times_XC), math.nan)
        found[some_X] = inner[some_X] / np.sqrt(a[some_X] * b[some_X])
        return found.clip(-1, 1)

    value = float(of(np.ones((1, count)))[0]) if count else math.nan
    drawn = np.random.default_rng(seed).integers(count or 1, size=(_DRAWS, count))
    times = np.stack([(drawn == c).sum(axis=1) for c in range(count)], axis=1) if count else drawn
    known = of(times.astype(np.float64))
    known = known[~np.isnan(known)]
    if count < 2 or math.isnan(value) or not len(known):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(known, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def _products(one_CD: Sketches, other_CD: Sketches) -> Floats:
    """Inner products of every pair, [C, C] float64, without a float64 copy of all entries."""
    found = np.zeros((len(one_CD), len(other_CD)))
    for begin in range(0, one_CD.shape[1], _CHUNK):
        some = slice(begin, begin + _CHUNK)
        found += one_CD[:, some].astype(np.float64) @ other_CD[:, some].astype(np.float64).T
    return found


def _missing(mine: Sketches, true: Sketches) -> str:
    """Why two sets of gradients have no cosine."""
    if _vanishes(true):
        return "the measured gradient of these completions is 0"
    return "its gradient of these completions is 0" if _vanishes(mine) else ""


def _vanishes(gradients_CD: Sketches) -> bool:
    """Whether gradients add up to 0, but for rounding."""
    products = _products(gradients_CD, gradients_CD)
    return bool(products.sum() <= _NOISE * products.trace())


def _credited(advantages: list[float] | None, known_T: Floats) -> Floats:
    """What a rule credits the tokens with, NaN where nothing was measured; 0 outside its loss."""
    if advantages is None:
        found = np.zeros_like(known_T)
    else:
        found = np.nan_to_num(np.array(advantages, np.float64), nan=0.0)
    found[np.isnan(known_T)] = math.nan
    return found


def _weights(
    recipe: Recipe,
    batch: StepBatch,
    rows: Mapping[int, dict[str, object]],
    chosen: Mapping[int, Measured],
) -> Floats:
    """Token weights of the measured gradient, [B]: the rule's own.

    A completion that the rule leaves out was measured nevertheless. Where there is one, the rule's
    aggregation is asked again for weights with it.
    """
    order = range(len(batch.group_B))
    weights_B = np.array([rows[i]["token_weight"] for i in order], np.float64)
    if (weights_B[list(chosen)] != 0).all():
        return weights_B
    counted_B = torch.from_numpy((weights_B != 0) | np.isin(order, list(chosen)))
    advantages_B = torch.tensor([rows[i]["advantage"] for i in order], dtype=torch.float64)
    prepared = as_prepared(batch, advantages_B, torch.zeros_like(advantages_B), counted_B)
    found: Floats = recipe.weigh(prepared).token_weights_B.numpy()
    return found


def _keys(table: pa.Table) -> list[Key]:
    names = ("group_id", "completion_index")
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))
