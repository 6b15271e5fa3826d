"""The composed loss: against a slow oracle, the identities between recipes, sums over any split."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maths_oracles import (
    algorithm,
    decays,
    lengths,
    normal,
    random,
    random_batch,
    seeds,
    slow_loss,
    slow_sum,
    take,
)

from common.config.algorithm import AlgorithmConfig
from common.config.load import load_config
from common.errors import UserError, VerifierError
from learner.algorithm.loss import CompletionBatch, policy_loss
from learner.algorithm.prepared import Prepared
from learner.algorithm.recipe import Recipe
from learner.algorithm.rewarded import Rewarded
from learner.algorithm.traces import LambdaTrace, PackedAxis

CONFIGS = Path(__file__).resolve().parents[2] / "deploy" / "configs"
CREDITS = [
    {"kind": "broadcast"},
    {"kind": "prefix_sets"},
    {"kind": "lambda_trace", "trace": "recent"},
    {"kind": "lambda_trace", "trace": "both", "normalize": "mean"},
    {"kind": "lambda_trace", "trace": "terminal", "lambda_": 0.9},
    {"kind": "lambda_trace", "trace": "recent", "application": "weight", "lambda_": 0.8},
    {"kind": "lambda_trace", "trace": "both", "application": "weight", "normalize": "mean"},
    {"kind": "lambda_trace", "trace": "terminal", "application": "weight"},
    {"kind": "lambda_trace", "trace": "recent", "cut": True, "entropy_quantile": 0.5},
    {"kind": "lambda_trace", "trace": "both", "cut": True, "args": {"cut_by_factor": True}},
    {"kind": "lambda_trace", "entropy_quantile": 0.5, "args": {"weighted_mean": True}},
    {
        "kind": "lambda_trace",
        "trace": "both",
        "application": "weight",
        "args": {"weighted_mean": True},
    },
    {
        "kind": "lambda_trace",
        "trace": "terminal",
        "normalize": "mean",
        "cut": True,
        "args": {"weighted_mean": True},
    },
    {"kind": "top_entropy"},
    {"kind": "probability", "args": {"alpha": 0.3}},
    {"kind": "probability_sigmoid"},
]
OBJECTIVES = [
    {"kind": "ppo", "clip_high": 0.28, "kl": 0.05},
    {"kind": "gspo", "clip_low": 0.03, "clip_high": 0.04},
    {"kind": "gmpo", "clip_low": 0.4, "clip_high": 0.3, "kl": 0.1},
    {"kind": "cispo"},
    {"kind": "gpg"},
    {"kind": "ppo", "args": {"dual_clip": 1.3}},
    {"kind": "sapo"},
    {"kind": "dppo", "clip_low": 0.05, "clip_high": 0.03},
    {"kind": "dppo", "clip_low": 0.01, "clip_high": 0.02, "args": {"divergence": "kl"}},
    {"kind": "vespo"},
    {"kind": "dro", "kl": 0.1, "kl_estimator": "k2"},
    {"kind": "clip_cov", "entropy": 0.01},
    {"kind": "kl_cov", "kl": 0.1, "kl_estimator": "unbiased"},
]
CORRECTIONS = [
    ("none", {}),
    ("tis", {"cap": 1.2}),
    ("icepop", {"args": {"low": 0.8, "high": 1.2}}),
    ("sequence_mask", {"args": {"high": 1.5}}),
    ("off_policy_mask", {"args": {"gap": 0.05}}),
    ("topr", {}),
    ("m2po", {}),
    ("tis", {"level": "sequence"}),
]


PAIRS = [
    pytest.param(credit, objective, id=f"credit{i}-objective{j}")
    for i, credit in enumerate(CREDITS)
    for j, objective in enumerate(OBJECTIVES)
    if i == 0 or j == 0 or (i + j) % 3 == 0
]
"""Every choice beside the plain one of the other axis, and a third of all other pairs."""


def gradient(loss: torch.Tensor, batch: CompletionBatch) -> torch.Tensor:
    return torch.autograd.grad(loss, batch.logprobs_N, retain_graph=True)[0]


@pytest.mark.parametrize(("credit", "objective"), PAIRS)
def test_loss_is_the_slow_loss(credit: dict, objective: dict) -> None:
    """Value, gradient and surrogate sums; the corrections take turns."""
    turn = (CREDITS.index(credit) + OBJECTIVES.index(objective)) // 3 % 3
    for seed, (kind, correction) in list(enumerate(CORRECTIONS))[turn::3]:
        batch = random_batch(seed, [1, 0, 13, 5, 29])
        config = algorithm(credit=credit, objective=objective, correction=correction)
        output = policy_loss(batch, config, kind)
        expected = slow_loss(batch, config, kind)
        torch.testing.assert_close(output.loss, expected)
        torch.testing.assert_close(gradient(output.loss, batch), gradient(expected, batch))
        sums = [slow_sum(take(batch, [i]), config, kind).item() for i in range(5)]
        assert output.surrogate_sums_B.tolist() == pytest.approx(sums)
        parts = [value for name, (value, _) in output.metrics.items() if name[:5] == "loss/"]
        assert sum(parts) == pytest.approx(expected.item())


@given(lengths, seeds, st.sampled_from(CREDITS), st.sampled_from(OBJECTIVES))
@settings(max_examples=40, deadline=None)
def test_any_split_sums_to_the_whole(
    sizes: list[int], seed: int, credit: dict, objective: dict
) -> None:
    """Microbatches, ranks and packing order: loss, gradient and metrics add up."""
    batch = random_batch(seed, sizes)
    config = algorithm(credit=credit, objective=objective)
    whole = policy_loss(batch, config, "tis")
    order = torch.randperm(len(sizes), generator=random(seed)).tolist()
    cut = seed % (len(sizes) + 1)
    parts = [policy_loss(take(batch, index), config, "tis") for index in (order[:cut], order[cut:])]
    loss = parts[0].loss + parts[1].loss
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(gradient(loss, batch), gradient(whole.loss, batch))
    for name, (total, weight) in whole.metrics.items():
        pairs = [part.metrics[name] for part in parts]
        assert sum(pair[0] for pair in pairs) == pytest.approx(total, abs=1e-9), name
        assert sum(pair[1] for pair in pairs) == weight


@given(lengths, seeds, st.sampled_from(CREDITS), st.sampled_from(OBJECTIVES))
@settings(max_examples=30, deadline=None)
def test_masked_tokens_do_not_exist(
    sizes: list[int], seed: int, credit: dict, objective: dict
) -> None:
    batch = random_batch(seed, sizes)
    config = algorithm(credit=credit, objective=objective)
    mask = batch.loss_mask_N
    short = dataclasses.replace(
        batch,
        **{
            name: value[mask]
            for name, value in vars(batch).items()
            if name.endswith("_N") and value is not None
        },
        lengths_B=PackedAxis(batch.lengths_B).sum(mask).long(),
    )
    poisoned = dataclasses.replace(
        batch, old_logprobs_N=batch.old_logprobs_N.masked_fill(~mask, float("nan"))
    )
    expected = policy_loss(short, config, "tis").loss
    found = policy_loss(poisoned, config, "tis").loss
    torch.testing.assert_close(found, expected)
    grad_N = gradient(found, batch)
    assert grad_N.isfinite().all()
    assert (grad_N[~mask] == 0).all()


@given(lengths, seeds, decays, st.sampled_from(["recent", "both", "terminal"]))
@settings(max_examples=40, deadline=None)
def test_gradient_at_the_old_policy(sizes: list[int], seed: int, decay: float, kind: str) -> None:
    """A sum_k c_k grad log pi(o_k), the same through the trace and through the weight."""
    batch = random_batch(seed, sizes, on_policy=True)
    batch.loss_mask_N[:] = True
    batch.behaviour_logprobs_N = batch.old_logprobs_N
    axis = PackedAxis(batch.lengths_B)
    c_N = LambdaTrace(axis, kind, decay).weights(batch.logprobs_N.detach())
    expected_N = -axis.spread(batch.token_weights_B * batch.advantages_B) * c_N
    for application, cut, correction in itertools.product(
        ("trace", "weight"), (False, True), ("none", "tis", "icepop")
    ):
        credit = {
            "kind": "lambda_trace",
            "trace": kind,
            "lambda_": decay,
            "application": application,
            "cut": cut,
        }
        output = policy_loss(batch, algorithm(credit=credit), correction)
        torch.testing.assert_close(gradient(output.loss, batch), expected_N)
        total, weight = output.metrics["credit/mean_weight"]
        assert total == pytest.approx(float(c_N.sum()))
        assert weight == c_N.numel()


@given(lengths, seeds, st.sampled_from(OBJECTIVES), st.sampled_from(["trace", "weight"]))
@settings(max_examples=30, deadline=None)
def test_decay_zero_is_grpo(sizes: list[int], seed: int, objective: dict, application: str) -> None:
    batch = random_batch(seed, sizes)
    credit = {"kind": "lambda_trace", "lambda_": 0.0, "application": application}
    traced = policy_loss(batch, algorithm(credit=credit, objective=objective), "tis")
    plain = policy_loss(batch, algorithm(objective=objective), "tis")
    assert torch.equal(traced.loss, plain.loss)
    # Autograd adds a token's terms in the order of the graph: the last bit may differ.
    torch.testing.assert_close(
        gradient(traced.loss, batch), gradient(plain.loss, batch), rtol=1e-13, atol=1e-15
    )


@given(lengths, seeds, st.sampled_from(["recent", "both", "terminal"]))
@settings(max_examples=20, deadline=None)
def test_cut_traces_on_policy_are_grpo_lambda(sizes: list[int], seed: int, kind: str) -> None:
    batch = random_batch(seed, sizes)
    batch.behaviour_logprobs_N = batch.old_logprobs_N.clone()
    losses = [
        policy_loss(
            batch, algorithm(credit={"kind": "lambda_trace", "trace": kind, "cut": cut}), "none"
        ).loss
        for cut in (False, True)
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_four_tokens_by_hand() -> None:
    """A = 2, x = ln(1.5, 1, 0.5, 1.25), clip 0.2, weight 1/4; ratios by hand."""
    x_N = torch.tensor([1.5, 1.0, 0.5, 1.25], dtype=torch.float64).log()
    batch = random_batch(0, [4])
    batch.loss_mask_N[:] = True
    batch.old_logprobs_N = batch.logprobs_N.detach() - x_N
    batch.behaviour_logprobs_N = batch.old_logprobs_N
    batch.advantages_B = torch.tensor([2.0])
    batch.token_weights_B = torch.tensor([0.25])
    table = [
        # min(r, 1.2): 1.2 1 0.5 1.2
        ({}, {}, -2 * 3.9 / 4, 0.5),
        # products 1.5 1.5 0.75 0.9375, clipped to 1.2 1.2 0.75 0.9375
        ({"kind": "lambda_trace", "lambda_": 1.0}, {}, -2 * 4.0875 / 4, 0.5),
        # GMPO, e^high = 1.2: (1.2 * 1 * 0.5 * 1.2)^(1/4) a token
        ({}, {"kind": "gmpo", "clip_high": 0.1823215567939546}, -2 * 0.72**0.25, 0.5),
        # GSPO: (1.5 * 0.5 * 1.25)^(1/4)
        ({}, {"kind": "gspo"}, -2 * 0.9375**0.25, 0.0),
    ]
    for credit, objective, loss, clipped in table:
        output = policy_loss(batch, algorithm(credit=credit, objective=objective), "none")
        assert output.loss.item() == pytest.approx(loss)
        assert output.metrics["clip_fraction"] == (4 * clipped, 4.0)


@pytest.mark.parametrize(("credit", "objective"), PAIRS)
@pytest.mark.parametrize("shift", [80.0, -80.0, 3000.0])
def test_extreme_log_ratios_stay_finite(credit: dict, objective: dict, shift: float) -> None:
    for dtype, sign in itertools.product((torch.float32, torch.float64), (1.0, -1.0)):
        batch = random_batch(0, [1, 30, 12])
        for name, value in vars(batch).items():
            if value is not None and value.is_floating_point():
                setattr(batch, name, value.detach().to(dtype))
        batch.logprobs_N.requires_grad_()
        batch.old_logprobs_N = batch.old_logprobs_N + shift
        batch.reference_logprobs_N = batch.reference_logprobs_N - shift
        batch.advantages_B = sign * batch.advantages_B.abs()
        output = policy_loss(batch, algorithm(credit=credit, objective=objective), "tis")
        assert output.loss.isfinite()
        assert gradient(output.loss, batch).isfinite().all()


@pytest.mark.parametrize("kind", ["ppo", "gspo", "gmpo"])
def test_a_ratio_far_too_high_is_still_pulled_down(kind: str) -> None:
    """A < 0 and no clip on that side: a zero gradient would leave the token where it is."""
    batch = random_batch(0, [3])
    batch.old_logprobs_N = batch.logprobs_N.detach() - 80.0
    batch.advantages_B = -torch.ones_like(batch.advantages_B)
    batch.loss_mask_N[:] = True
    loss = policy_loss(batch, algorithm(objective={"kind": kind}), "none").loss
    assert (gradient(loss, batch) > 0).all()  # descending lowers the log-probabilities


def test_cut_traces_inside_the_ratio_are_refused_under_a_correction() -> None:
    cut = {"kind": "lambda_trace", "cut": True}
    with pytest.raises(UserError, match=r"credit\.application=weight"):
        Recipe(algorithm(credit=cut), "tis", 8)


@given(lengths, seeds)
@settings(max_examples=20, deadline=None)
def test_gspo_is_a_mean_trace_under_uniform_credit(sizes: list[int], seed: int) -> None:
    """gamma lambda = 1, one TD error at the end: z is the mean of the log-ratios."""
    batch = random_batch(seed, sizes)
    uniform = {"kind": "lambda_trace", "trace": "terminal", "lambda_": 1.0, "normalize": "mean"}
    uniform["args"] = {"weighted_mean": True}
    clips = {"clip_low": 0.03, "clip_high": 0.04}
    traced = policy_loss(batch, algorithm(credit=uniform, objective=clips), "none")
    gspo = policy_loss(batch, algorithm(objective={"kind": "gspo", **clips}), "none")
    torch.testing.assert_close(traced.loss, gspo.loss)
    torch.testing.assert_close(gradient(traced.loss, batch), gradient(gspo.loss, batch))


@pytest.mark.parametrize(("credit", "objective"), PAIRS)
def test_nothing_to_train_on_still_runs_backward(credit: dict, objective: dict) -> None:
    for sizes in ([], [0], [3, 0]):
        batch = random_batch(0, sizes)
        batch.loss_mask_N[:] = False
        output = policy_loss(batch, algorithm(credit=credit, objective=objective), "tis")
        assert output.loss == 0
        assert (gradient(output.loss, batch) == 0).all()
        assert output.surrogate_sums_B.tolist() == [0.0] * len(sizes)


def test_a_bonus_for_entropy_reaches_the_entropy_and_trains_every_completion() -> None:
    batch = random_batch(0, [3, 5])
    batch.loss_mask_N[:] = True
    batch.entropy_N.requires_grad_()
    plain = policy_loss(batch, algorithm(), "none").loss
    config = algorithm(objective={"entropy": 0.2})
    output = policy_loss(batch, config, "none")
    (grad_N,) = torch.autograd.grad(output.loss, batch.entropy_N)
    weights_N = PackedAxis(batch.lengths_B).spread(batch.token_weights_B)
    torch.testing.assert_close(grad_N, -0.2 * weights_N)
    torch.testing.assert_close(output.loss - plain, -0.2 * (weights_N * batch.entropy_N).sum())
    assert recipe(config).needs_entropy and recipe(config).entropy_bonus
    prepared = recipe(config).prepare(Rewarded(REWARDS, GROUPS, LENGTHS, "math"))
    assert prepared.trained_B.tolist() == [True, True, False, True, True, True, False, True]


def test_the_recipe_with_grpos_credit_is_a_copy_that_checks_nothing_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced = recipe(algorithm(credit={"kind": "lambda_trace"}, objective={"kl": 0.1}), "tis")
    monkeypatch.setattr("learner.algorithm.recipe.check_recipe", lambda *_: pytest.fail("again"))
    batch = random_batch(0, [3, 5])
    expected = policy_loss(batch, algorithm(objective={"kl": 0.1}), "tis").loss
    assert torch.equal(traced.broadcast().loss(batch).loss, expected)
    assert not torch.equal(traced.loss(batch).loss, expected)


def test_kl_in_the_reward_is_not_in_the_loss() -> None:
    batch = random_batch(0, [5, 6])
    with_kl = algorithm(objective={"kl": 0.5, "kl_in": "reward"})
    with pytest.raises(UserError, match="kl_estimator=k2"):
        recipe(algorithm(objective={"kl": 0.5, "kl_in": "reward", "kl_estimator": "k2"}))
    assert torch.equal(
        policy_loss(batch, with_kl, "none").loss, policy_loss(batch, algorithm(), "none").loss
    )


def test_metrics_by_hand() -> None:
    batch = random_batch(0, [3])
    batch.loss_mask_N = torch.tensor([True, True, True])
    batch.old_logprobs_N = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    batch.behaviour_logprobs_N = torch.tensor([-1.5, float("nan"), -2.0], dtype=torch.float64)
    metrics = policy_loss(batch, algorithm(), "none").metrics
    assert metrics["logprob_gap/mean"] == (1.5, 2.0)
    ratio_sum = torch.tensor([0.5, -1.0]).exp().sum()
    assert metrics["is_ratio/mean"] == pytest.approx((float(ratio_sum), 2.0))
    assert metrics["entropy/mean"] == pytest.approx((float(batch.entropy_N.sum()), 3.0))
    batch.entropy_N = batch.reference_logprobs_N = None
    assert not {"entropy/mean", "kl/mean"} & set(policy_loss(batch, algorithm(), "none").metrics)


# ---------------------------------------------------------------------------------------------
# Recipe


def recipe(config: AlgorithmConfig, correction: str = "none") -> Recipe:
    return Recipe(config, correction, 40)


REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, float("nan"), 1.0], dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
LENGTHS = torch.tensor([3, 5, 0, 40, 7, 9, 11, 13])


def test_prepare_drops_what_has_no_reward_or_no_gradient() -> None:
    prepared = recipe(algorithm()).prepare(Rewarded(REWARDS, GROUPS, LENGTHS, "math"))
    assert prepared.trained_B.tolist() == [True, True, False, True] + [False] * 4
    assert prepared.advantages_B[4:].tolist() == [0, 0, 0, 0]
    assert prepared.token_weights_B[6] == 0
    counted = [1 / (7 * max(n, 1)) for n in LENGTHS.tolist()]
    counted[6] = 0
    assert prepared.token_weights_B.tolist() == pytest.approx(counted)


def test_prepare_keeps_zero_advantages_under_kl() -> None:
    prepared = recipe(algorithm(objective={"kl": 0.1})).prepare(
        Rewarded(REWARDS, GROUPS, LENGTHS, "math")
    )
    assert prepared.trained_B.tolist() == [True, True, False, True, True, True, False, True]


def test_gpg_rescales_for_samples_without_gradient() -> None:
    config = algorithm(
        objective={"kind": "gpg"},
        baseline={"kind": "dr_grpo"},
        aggregation={"kind": "token_mean"},
    )
    prepared = recipe(config).prepare(Rewarded(REWARDS, GROUPS, LENGTHS, "math"))
    total = float(LENGTHS.sum()) - 11
    assert prepared.token_weights_B[0] == pytest.approx(7 / 4 / total)


def test_infinite_reward_names_the_verifier() -> None:
    rewards = REWARDS.clone()
    rewards[3] = float("inf")
    with pytest.raises(VerifierError, match="'math_answer'.*inf"):
        recipe(algorithm()).prepare(Rewarded(rewards, GROUPS, LENGTHS, "math_answer"))


def test_needs() -> None:
    plain = recipe(algorithm())
    assert not (plain.needs_prefix_counts or plain.needs_entropy or plain.needs_reference)
    selective = algorithm(credit={"kind": "lambda_trace", "entropy_quantile": 0.5})
    assert recipe(selective).needs_entropy
    assert recipe(algorithm(credit={"kind": "prefix_sets"})).needs_prefix_counts
    assert recipe(algorithm(objective={"kl": 0.1})).needs_reference
    in_reward = recipe(algorithm(objective={"kl": 0.1, "kl_in": "reward"}))
    assert in_reward.kl_in_reward and in_reward.needs_reference and not in_reward.kl_in_loss


def test_the_rollout_axis_reaches_advantages_and_denominators() -> None:
    """PODS: baseline over the kept ones. CPPO: over all, then pruned. Masks leave denominators."""
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    group, lengths = torch.zeros(4, dtype=torch.long), torch.tensor([2, 4, 6, 8])

    def prepared(truncated: list[bool] | None = None, **rollout: object) -> Prepared:
        chosen = algorithm(rollout=rollout, baseline={"kind": "dr_grpo"})
        cut = None if truncated is None else torch.tensor(truncated)
        return recipe(chosen).prepare(Rewarded(rewards, group, lengths, "v", lengths, cut))

    pods = prepared(max_variance_share=0.5)
    assert sorted(pods.advantages_B.tolist()) == [-0.5, 0.0, 0.0, 0.5]
    assert pods.token_weights_B[pods.trained_B].tolist() == [
        1 / (2 * n) for n in lengths[pods.trained_B].tolist()
    ]
    cppo = prepared(prune_rate=0.75)
    assert cppo.advantages_B.tolist() == [0.0, 0.0, 0.0, 0.75]
    assert cppo.kept_B.tolist() == [False, False, False, True]  # the others are not "idle"
    assert cppo.token_weights_B.tolist() == [0.0, 0.0, 0.0, 1 / 8]
    masked = prepared([True, False, False, False], mask_truncated=True)
    assert masked.advantages_B.tolist() == [0.0, -0.25, -0.25, 0.75]
    assert masked.token_weights_B[0] == 0


def test_remax_compares_with_the_greedy_completion_and_never_trains_on_it() -> None:
    """In no denominator either; a group whose greedy completion has no reward is left out."""
    greedy = [True, False, False] * 3
    rewards = torch.tensor([0.25, 1.0, 0.0, float("nan"), 1.0, 0.0, 1.0, 1.0, 1.0]).double()
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    lengths = torch.tensor([0, 4, 2, 0, 3, 3, 0, 5, 1])
    rewarded = Rewarded(rewards, group, lengths, compared_B=torch.tensor(greedy))
    chosen = algorithm(rollout={"greedy": True}, baseline={"kind": "remax"})
    found = recipe(chosen).prepare(rewarded)
    assert found.advantages_B.tolist() == [0.0, 0.75, -0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert found.kept_B.nonzero()[:, 0].tolist() == [1, 2, 7, 8]
    assert found.token_weights_B[[1, 2]].tolist() == [1 / 16, 1 / 8]
    # What another recipe makes of the same step is what it makes of the step without them.
    others = ~torch.tensor(greedy)
    left = Rewarded(rewards[others], group[others], lengths[others])
    for kind in ("grpo", "rloo", "reinforce_pp"):
        plain = recipe(algorithm(baseline={"kind": kind}))
        assert torch.equal(
            plain.prepare(rewarded).advantages_B[others], plain.prepare(left).advantages_B
        )
    with pytest.raises(UserError, match=r"rollout\.greedy=true .*sample anew"):
        recipe(chosen).prepare(left)


@pytest.mark.parametrize(
    ("rollout", "kind"),
    [
        ({}, "remax"),
        ({"greedy": True}, "grpo"),
        ({"greedy": True, "max_variance_share": 0.5}, "remax"),
    ],
)
def test_a_greedy_completion_is_for_remax_alone(rollout: dict, kind: str) -> None:
    with pytest.raises(UserError, match=r"algorithm\.rollout\.greedy"):
        recipe(algorithm(rollout=rollout, baseline={"kind": kind}))


PENALISED = ["smollm2.yaml", "recipes/dapo.yaml", "recipes/top_entropy.yaml"]


@pytest.mark.parametrize("file", PENALISED)
def test_the_penalty_for_length_is_dapos(file: str) -> None:
    """DAPO takes up to 1 off rewards of +1 and -1; ours are 1 and 0, and the groups look alike."""
    config = load_config([CONFIGS / file], ["model.path=none"], CONFIGS / "recipes")
    rollout, limit = config.algorithm.rollout, 100
    short, middle, long = 1, round(limit * (1 - rollout.overlong_penalty_share / 2)), limit
    lengths = torch.tensor([short, middle, long, short, middle, long])
    right = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    group = torch.zeros(6, dtype=torch.long)
    prepared = Recipe(algorithm(rollout=asdict(rollout)), "none", limit).prepare(
        Rewarded(right, group, lengths)
    )
    theirs = 2 * right - 1 - torch.tensor([0.0, 0.5, 1.0] * 2, dtype=torch.float64)
    expected = (theirs - theirs.mean()) / theirs.std()
    assert torch.allclose(prepared.advantages_B, expected, atol=1e-5)
    assert prepared.advantages_B[2] > prepared.advantages_B[3]  # right at the limit, wrong at once


def test_no_other_preset_has_a_penalty_for_length() -> None:
    files = [f for f in CONFIGS.rglob("*.yaml") if "overlong_penalty_share" in f.read_text()]
    assert sorted(str(f.relative_to(CONFIGS)) for f in files) == sorted(PENALISED)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_lambda_learns_by_the_gradient_of_the_loss(seed: int) -> None:
    """end_step from surrogate sums = autograd through the loss with lambda as a leaf."""
    sizes = torch.randint(1, 40, (12,), generator=random(seed)).tolist()
    batch = random_batch(seed, sizes)
    batch.loss_mask_N[:] = True
    batch.behaviour_logprobs_N = batch.old_logprobs_N
    group = torch.arange(3).repeat_interleave(4)
    rewards = normal(12, random(seed))
    config = algorithm(
        aggregation={"kind": "lambda_grpo", "lambda_init": 0.7, "lambda_learning_rate": 0.5},
        objective={"kl": 0.02},
    )
    learned = recipe(config)
    prepared = learned.prepare(Rewarded(rewards, group, batch.lengths_B, "math"))
    batch.advantages_B = prepared.advantages_B
    batch.token_weights_B = prepared.token_weights_B
    output = learned.loss(batch)
    metrics = learned.end_step(output.surrogate_sums_B)

    lambda_ = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss = torch.zeros((), dtype=torch.float64)
    for members in torch.arange(12).split(4):
        size = batch.lengths_B[members].double()
        h = 1 + (size - size.mean()) / size.std(correction=0).clamp(min=1e-12) / 9
        f = 4 * (h**lambda_).softmax(0)
        loss = loss - (f * output.surrogate_sums_B[members]).sum() / sum(sizes)
    loss.backward()
    assert loss.item() == pytest.approx(output.loss.item())
    assert metrics["lambda_grpo/lambda"] == pytest.approx(0.7 - 0.5 * float(lambda_.grad))
    restored = recipe(config)
    restored.load_state_dict(learned.state_dict())
    assert restored.state_dict() == learned.state_dict()
    weights = restored.prepare(Rewarded(rewards, group, batch.lengths_B, "math")).token_weights_B
    again = learned.prepare(Rewarded(rewards, group, batch.lengths_B, "math")).token_weights_B
    assert torch.equal(weights, again)


def test_untrained_completions_change_nothing() -> None:
    """Leaving out what `trained_B` excludes gives the same loss."""
    batch = random_batch(0, LENGTHS.tolist())
    batch.loss_mask_N[:] = True
    for config in (algorithm(), algorithm(objective={"kl": 0.1}, credit=CREDITS[3])):
        composed = recipe(config, "tis")
        prepared = composed.prepare(Rewarded(REWARDS, GROUPS, LENGTHS, "math"))
        batch.advantages_B = prepared.advantages_B
        batch.token_weights_B = prepared.token_weights_B
        index = prepared.trained_B.nonzero().flatten().tolist()
        torch.testing.assert_close(
            composed.loss(take(batch, index)).loss, composed.loss(batch).loss
        )


@pytest.mark.parametrize(
    ("axes", "key"),
    [
        ({"credit": {"lambda_": 1.1}}, "credit.lambda_"),
        ({"credit": {"entropy_quantile": 1.0}}, "credit.entropy_quantile"),
        ({"correction": {"cap": 0.0}}, "correction.cap"),
        ({"objective": {"clip_low": -0.1}}, "objective.clip_low"),
        ({"objective": {"kl": -1.0}}, "objective.kl"),
        ({"baseline": {"min_advantage": 0.1}}, "baseline.min_advantage"),
    ],
)
def test_impossible_values_name_their_key(axes: dict, key: str) -> None:
    with pytest.raises(UserError, match=key):
        recipe(algorithm(**axes))


def test_end_step_needs_a_batch() -> None:
    with pytest.raises(RuntimeError, match="prepare"):
        recipe(algorithm()).end_step(torch.zeros(3))
