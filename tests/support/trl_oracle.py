"""TRL's losses and advantages beside ours, on the same tensors in float64.

    PYTHONPATH=. .venv-trl/bin/python tests/support/trl_oracle.py

in TRL's environment, which `make test-oracle` sets up, writes the largest differences into
`tests/bench/results/oracles.json`, from which a table of deploy/configs/recipes/README.md is made.

TRL's loss method runs on a stand-in that holds the log-probabilities and the settings it reads. The
blocks that make ratios and advantages are cut out of the source of another method, and run as they
stand.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import sys
import textwrap
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from maths_oracles import algorithm, normal, random  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from common.config.algorithm import AlgorithmConfig  # noqa: E402
from learner.algorithm.choices import TokenColumns  # noqa: E402
from learner.algorithm.loss import CompletionBatch  # noqa: E402
from learner.algorithm.recipe import Recipe  # noqa: E402
from learner.algorithm.rewarded import Rewarded  # noqa: E402

RECIPES = ROOT / "deploy" / "configs" / "recipes"
RECORD = ROOT / "tests" / "bench" / "results" / "oracles.json"
GROUPS, GROUP_SIZE, WIDTH = 3, 4, 9
ROWS = GROUPS * GROUP_SIZE
MAX_TOKENS = 16
SEEDS = range(3)
SETTINGS: dict[str, Any] = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "delta": None,
    "use_bias_correction_kl": False,
    "sampling": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}
"""TRL's own defaults; `sampling` is (mode, lowest, highest) of its correction for vLLM."""

OF_RECIPES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {
        "importance_sampling_level": "sequence",
        "epsilon_low": 3e-4,
        "epsilon_high": 4e-4,
    },
    "luspo": {
        "loss_type": "luspo",
        "importance_sampling_level": "sequence",
        "epsilon_low": 2e-3,
        "epsilon_high": 2.5e-3,
    },
    # The absolute upper bound of the ratio, and there is no lower one.
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "top_entropy": {"loss_type": "dapo", "epsilon_high": 0.28, "top_entropy_quantile": 0.2},
    "deepseek_v32": {
        "beta": 0.001,
        "use_bias_correction_kl": True,
        "off_policy_mask_threshold": 0.5,
    },
    "icepop": {"sampling": ("token_mask", 0.5, 5.0)},
}
"""What TRL is told for each recipe that it has."""

SCALE = {"luspo": float(MAX_TOKENS)}
"""Our loss times this is TRL's."""

TIS = {"kind": "tis", "cap": 1.3}
SEQUENCE_TIS = {"kind": "tis", "cap": 1.3, "level": "sequence"}
MASK = {"kind": "sequence_mask", "level": "sequence", "args": {"high": 1.3}}
TOKEN_MEAN = {"aggregation": {"kind": "token_mean"}}
GSPO = {"objective": {"kind": "gspo", "clip_low": 0.03, "clip_high": 0.04}}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04}
CASES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "kl": ({"beta": 0.04}, {"objective": {"kl": 0.04}}),
    "unbiased kl": (
        {"beta": 0.04, "use_bias_correction_kl": True},
        {"objective": {"kl": 0.04, "kl_estimator": "unbiased"}},
    ),
    "bnpo": ({"loss_type": "bnpo"}, TOKEN_MEAN),
    "two-sided clip": ({"delta": 1.3}, {"objective": {"args": {"dual_clip": 1.3}}}),
    "entropy bonus": (
        {"loss_type": "bnpo", "entropy_coef": 0.01},
        {**TOKEN_MEAN, "objective": {"entropy": 0.01}},
    ),
    "top entropy under a sequence mean": (
        {"top_entropy_quantile": 0.5},
        {"credit": {"kind": "top_entropy", "args": {"share": 0.5}}},
    ),
    "token truncation": ({"sampling": ("token_truncate", None, 1.3)}, {"correction": TIS}),
    "sequence truncation": (
        {"sampling": ("sequence_truncate", None, 1.3)},
        {"correction": SEQUENCE_TIS},
    ),
    "sequence mask": ({"sampling": ("sequence_mask", None, 1.3)}, {"correction": MASK}),
    "gspo with a sequence mask": (
        {**SEQUENCE, "sampling": ("sequence_mask", None, 1.3)},
        {**GSPO, "correction": MASK},
    ),
    "gspo with token truncation": (
        {**SEQUENCE, "sampling": ("token_truncate", None, 1.3)},
        {**GSPO, "correction": TIS},
    ),
    "gspo with kl": (
        {**SEQUENCE, "beta": 0.04},
        {"objective": {**GSPO["objective"], "kl": 0.04}},
    ),
    "gspo with an off-policy mask": (
        {**SEQUENCE, "off_policy_mask_threshold": 0.5},
        {**GSPO, "correction": {"kind": "off_policy_mask"}},
    ),
    "cispo with token truncation": (
        {"loss_type": "cispo", "epsilon_high": 1.2, "sampling": ("token_truncate", None, 1.3)},
        {
            **TOKEN_MEAN,
            "objective": {"kind": "cispo", "clip_low": 1.0, "clip_high": 0.2},
            "correction": TIS,
        },
    ),
    "sapo with an off-policy mask": (
        {"loss_type": "sapo", "off_policy_mask_threshold": 0.5},
        {"objective": {"kind": "sapo"}, "correction": {"kind": "off_policy_mask"}},
    ),
}
"""TRL's settings, and our axes."""


class Accelerator:
    """One process."""

    num_processes = 1

    def gather(self, values: Tensor) -> Tensor:
        return values

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values

    def pad_across_processes(self, values: Tensor, dim: int, pad_index: float) -> Tensor:
        return values


class Data:
    """A batch on TRL's rectangle, [B, T], and packed as ours."""

    def __init__(self, seed: int) -> None:
        generator = random(seed)
        self.lengths_B = torch.randint(1, WIDTH + 1, (ROWS,), generator=generator)
        self.mask_BT = torch.arange(WIDTH) < self.lengths_B[:, None]

        def noise(scale: float) -> Tensor:
            return normal(ROWS * WIDTH, generator, scale).view(ROWS, WIDTH)

        self.logprobs_BT = (-noise(1.0).abs() - 0.1).requires_grad_()
        self.old_BT = self.logprobs_BT.detach() + noise(0.2)
        self.reference_BT = self.old_BT + noise(0.2)
        # Whole completions are near the sampler or far from it, so that every mask is sure.
        far_B = torch.randint(0, 2, (ROWS, 1), generator=generator) * 2.0
        self.sampler_BT = self.old_BT + noise(0.1) + far_B
        # TRL takes its quantile in float32.
        self.entropy_BT = noise(1.0).abs().float().double().requires_grad_()
        self.group_B = torch.arange(GROUPS).repeat_interleave(GROUP_SIZE)
        self.rewards_B = torch.randint(0, 2, (ROWS,), generator=generator).double()
        self.rewards_B += noise(0.01)[:, 0]

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.logprobs_BT, self.entropy_BT


def recipe_config(name: str) -> AlgorithmConfig:
    """A recipe's choices, with ratios to the old policy: the anchor is no matter of the loss."""
    own = OmegaConf.load(RECIPES / f"{name}.yaml")["algorithm"]
    merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(AlgorithmConfig), own))
    assert isinstance(merged, AlgorithmConfig)
    return replace(merged, objective=replace(merged.objective, anchor="old"))


def our_loss(config: AlgorithmConfig, data: Data) -> tuple[Tensor, Tensor]:
    """Our loss, and the advantages that it was made with."""
    kind = "none" if config.correction.kind == "auto" else config.correction.kind
    recipe = Recipe(config, kind, MAX_TOKENS)
    earned = Rewarded(data.rewards_B, data.group_B, data.lengths_B, "oracle")
    prepared = recipe.prepare(earned)
    mask_BT = data.mask_BT
    given_BT = prepared.advantages_B[:, None].expand_as(mask_BT)
    columns = TokenColumns(
        data.logprobs_BT.detach()[mask_BT],
        data.old_BT[mask_BT],
        data.sampler_BT[mask_BT],
        data.entropy_BT.detach()[mask_BT],
        given_BT[mask_BT],
        prepared.token_weights_B[:, None].expand_as(mask_BT)[mask_BT],
    )
    chosen = {f"{axis}_chosen_N": choose(columns) for axis, choose in recipe.choosers().items()}
    batch = CompletionBatch(
        logprobs_N=data.logprobs_BT[mask_BT],
        old_logprobs_N=data.old_BT[mask_BT],
        behaviour_logprobs_N=data.sampler_BT[mask_BT],
        reference_logprobs_N=data.reference_BT[mask_BT],
        entropy_N=data.entropy_BT[mask_BT],
        loss_mask_N=torch.ones(int(data.lengths_B.sum()), dtype=torch.bool),
        lengths_B=data.lengths_B,
        advantages_B=prepared.advantages_B,
        token_weights_B=prepared.token_weights_B,
        prefix_counts_N=None,
        **chosen,
    )
    return recipe.loss(batch).loss, prepared.advantages_B


def trl_loss(trainer: Any, changes: dict[str, Any], data: Data, advantages_B: Tensor) -> Tensor:
    """The loss of TRL's method under its defaults and `changes`."""
    settings = {**SETTINGS, **changes}
    stand_in = SimpleNamespace(
        **settings,
        args=SimpleNamespace(**settings),
        _get_per_token_logps_and_entropies=lambda *_, **__: (*data.leaves(), None),
        model=SimpleNamespace(training=False),
        accelerator=Accelerator(),
        max_completion_length=MAX_TOKENS,
        use_vllm=settings["sampling"] is not None,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=settings["entropy_coef"] > 0,
        use_adaptive_entropy=False,
        get_off_policy_mask=trainer.get_off_policy_mask,
        get_gamma_weights=trainer.get_gamma_weights,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    stand_in.get_high_entropy_mask = functools.partial(trainer.get_high_entropy_mask, stand_in)
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1),
        "completion_ids": torch.zeros(ROWS, WIDTH, dtype=torch.long),
        "completion_mask": data.mask_BT.double(),
        "advantages": advantages_B,
        "old_per_token_logps": data.old_BT,
        "sampling_per_token_logps": data.sampler_BT,
        "ref_per_token_logps": data.reference_BT,
        "num_items_in_batch": data.lengths_B.sum(),
    }
    if settings["sampling"] is not None:
        inputs["importance_sampling_ratio"] = trl_ratio(trainer, settings["sampling"], data)
    loss: Tensor = trainer._compute_loss(stand_in, None, inputs)
    return loss


def _block(trainer: Any, first: str, after: str) -> str:
    """Lines of TRL's scoring method, from the one that begins with `first` to `after`."""
    lines = inspect.getsource(trainer._generate_and_score_completions).splitlines()
    starts = [line.strip() for line in lines]
    begin = next(i for i, line in enumerate(starts) if line.startswith(first))
    end = next(i for i, line in enumerate(starts) if i > begin and line.startswith(after))
    return textwrap.dedent("\n".join(lines[begin:end]))


def trl_ratio(trainer: Any, sampling: tuple[str, float | None, float], data: Data) -> Tensor:
    """TRL's weights for what vLLM sampled."""
    mode, lowest, highest = sampling
    names = {
        "self": SimpleNamespace(
            use_vllm=True,
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=lowest,
            vllm_importance_sampling_clip_max=highest,
        ),
        "torch": torch,
        "math": math,
        "completion_mask": data.mask_BT.double(),
        "tool_mask": None,
        "old_per_token_logps": data.old_BT,
        "sampling_per_token_logps": data.sampler_BT,
    }
    source = _block(
        trainer,
        "if self.use_vllm and self.vllm_importance_sampling_correction:",
        "# Compute the per-token log probabilities for the reference model",
    )
    exec(source, names)
    ratio: Tensor = names["vllm_importance_sampling_ratio"]
    return ratio


def trl_advantages(
    trainer: Any, rewards_BR: Tensor, weights_R: Tensor, scale: str, aggregation: str
) -> Tensor:
    """TRL's advantages of groups of GROUP_SIZE."""
    module = sys.modules[trainer.__module__]
    names = {
        "self": SimpleNamespace(
            multi_objective_aggregation=aggregation,
            scale_rewards=scale,
            reward_weights=weights_R,
            reward_funcs=[None] * len(weights_R),
        ),
        "torch": torch,
        "nanstd": module.nanstd,
        "rewards_per_func": rewards_BR,
        "unscorable_mask": torch.isnan(rewards_BR).all(dim=1),
        "num_generations": GROUP_SIZE,
        "device": "cpu",
    }
    source = _block(
        trainer,
        'if self.multi_objective_aggregation == "sum_then_normalize":',
        "# Slice to keep only the local part",
    )
    exec(source, names)
    advantages: Tensor = names["advantages"]
    return advantages


def differences(trainer: Any, name: str, seed: int) -> tuple[float, float]:
    """Largest differences of loss and gradients, those in the entropies included."""
    if name in OF_RECIPES:
        changes, config = OF_RECIPES[name], recipe_config(name)
    else:
        changes, axes = CASES[name]
        config = algorithm(**axes)
    data = Data(seed)
    ours, advantages_B = our_loss(config, data)
    ours = SCALE.get(name, 1.0) * ours
    theirs = trl_loss(trainer, changes, data, advantages_B)
    gradients = [torch.autograd.grad(x, data.leaves(), allow_unused=True) for x in (ours, theirs)]
    gaps = [
        float(((0.0 if a is None else a) - (0.0 if b is None else b)).abs().max())
        for a, b in zip(*gradients, strict=True)
        if a is not None or b is not None
    ]
    return abs(float((ours - theirs).detach())), max(gaps)


def record() -> None:
    from trl import GRPOTrainer

    found = {}
    for name in OF_RECIPES:
        pairs = [differences(GRPOTrainer, name, seed) for seed in SEEDS]
        found[name] = {
            "loss": max(loss for loss, _ in pairs),
            "gradient": max(gradient for _, gradient in pairs),
        }
    RECORD.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    record()
