"""Advantages of tokens and traces over turns: identities in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from maths_oracles import algorithm
from torch import Tensor

from common.config.algorithm import AdvantageConfig, AlgorithmConfig
from common.errors import UserError
from learner.algorithm.advantage_inputs import AdvantageInputs, TokenAdvantages
from learner.algorithm.loss import CompletionBatch, LossOutput, policy_loss
from learner.algorithm.prepared import Prepared
from learner.algorithm.recipe import Recipe
from learner.algorithm.recipe_checks import check_recipe
from learner.algorithm.rewarded import Rewarded, StepTokens, Turns
from learner.algorithm.traces import LambdaTrace, PackedAxis

# Two groups of three episodes: tokens of each turn, with two given tokens between turns.
EPISODES = [[3, 2, 4], [2, 5, 1], [4, 3, 2], [2], [1, 2], [3, 3]]
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
REWARDS = torch.tensor([1.0, 0.0, 0.25, 0.0, 1.0, 0.5], dtype=torch.float64)
GIVEN = 2


def turn_numbers(episode: list[int], given: int = GIVEN) -> list[int]:
    numbers: list[int] = []
    for number, length in enumerate(episode):
        numbers += [-1] * (given if number else 0) + [number] * length
    return numbers


def step_tokens(
    episodes: list[list[int]] = EPISODES,
    rewards: list[float] | None = None,
    states: list[int] | None = None,
    given: int = GIVEN,
) -> StepTokens:
    turn_N = torch.tensor([n for episode in episodes for n in turn_numbers(episode, given)])
    lengths_B = torch.tensor([len(turn_numbers(episode, given)) for episode in episodes])
    completion = [i for i, episode in enumerate(episodes) for _ in episode]
    turns = Turns(
        torch.tensor(completion),
        torch.tensor([n for episode in episodes for n in range(len(episode))]),
        turn_N,
        torch.tensor(rewards or [0.0] * len(completion), dtype=torch.float64),
        torch.tensor(states or [-1] * len(completion)),
    )
    logprobs_N = torch.full(turn_N.shape, -1.0).masked_fill(turn_N < 0, math.nan)
    return StepTokens(PackedAxis(lengths_B), turn_N.clone(), turn_N >= 0, logprobs_N, turns)


def prepared(config: AlgorithmConfig, tokens: StepTokens, rewards_B: Tensor = REWARDS) -> Prepared:
    lengths_B = tokens.axis.sum(tokens.loss_mask_N).long()
    rewarded = Rewarded(rewards_B, GROUPS, lengths_B, tokens=tokens)
    return Recipe(config, "none", 40).prepare(rewarded)


def by_turn(found: Prepared, tokens: StepTokens) -> list[list[float]]:
    """The advantage of every turn, which all of its tokens must have."""
    assert found.advantages_N is not None
    assert tokens.turns is not None
    advantages: list[list[float]] = []
    completion_N = tokens.axis.completion_N
    for i, episode in enumerate(EPISODES):
        own = []
        for number in range(len(episode)):
            here_N = (completion_N == i) & (tokens.turns.turn_N == number)
            values = found.advantages_N[here_N].unique()
            assert len(values) == 1
            own.append(values.item())
        advantages.append(own)
    return advantages


def test_without_rewards_of_turns_returns_are_the_advantage_while_all_siblings_last() -> None:
    tokens = step_tokens()
    config = algorithm(advantage={"kind": "turn_return"})
    found = by_turn(prepared(config, tokens), tokens)
    plain = prepared(algorithm(), tokens).advantages_B
    for episode in range(3):  # all of the first group have three turns
        assert found[episode] == [plain[episode].item()] * 3
    assert found[3] == [plain[3].item()]
    # In the second turn only the last two of the second group are left: their own mean counts.
    gap = (1.0 - 0.5) / math.sqrt(2) / (0.5 / math.sqrt(2) + 1e-6) * math.sqrt(2) / 2
    assert found[4][1] == pytest.approx(gap, rel=1e-5)
    assert found[5][1] == pytest.approx(-gap, rel=1e-5)


def test_a_turn_that_one_episode_alone_reached_has_no_advantage() -> None:
    episodes = [[1, 1], [1], [1], [1], [1], [1]]
    tokens = step_tokens(episodes)
    found = prepared(algorithm(advantage={"kind": "turn_return"}), tokens)
    assert found.advantages_N is not None
    assert found.advantages_N.tolist()[3] == 0.0
    assert found.advantages_N.tolist()[0] == found.advantages_B[0].item()


def test_a_discounted_return_counts_every_reward_from_the_turn_on() -> None:
    """Against sums written out, under REINFORCE's baseline."""
    rewards = [0.5, -1.0, 2.0, 0.0, 1.0, 0.25, 1.0, 1.0, 1.0, 3.0, 0.5, 0.75, -0.5, 0.125]
    tokens = step_tokens(rewards=rewards)
    config = algorithm(
        advantage={"kind": "turn_return", "args": {"gamma": 0.5}}, baseline={"kind": "none"}
    )
    found = by_turn(prepared(config, tokens), tokens)
    first = 0
    for i, episode in enumerate(EPISODES):
        own = rewards[first : first + len(episode)]
        own[-1] += REWARDS[i].item() - sum(own)  # what the verdict adds to the turns' rewards
        first += len(episode)
        for number in range(len(episode)):
            alone = sum(len(other) > number for other, g in zip(EPISODES, GROUPS, strict=True)
                        if g == GROUPS[i]) < 2  # fmt: skip
            total = sum(0.5 ** (k - number) * own[k] for k in range(number, len(episode)))
            assert found[i][number] == pytest.approx(0.0 if alone else total, abs=1e-12)


def test_undiscounted_the_first_turn_is_worth_what_the_episode_is() -> None:
    rewards = [0.5, -1.0, 2.0, 0.0, 1.0, 0.25, 1.0, 1.0, 1.0, 3.0, 0.5, 0.75, -0.5, 0.125]
    tokens = step_tokens(rewards=rewards)
    config = algorithm(advantage={"kind": "turn_return"}, baseline={"kind": "none"})
    found = by_turn(prepared(config, tokens), tokens)
    assert [first for first, *_ in found] == pytest.approx(REWARDS.tolist(), abs=1e-12)


def test_without_weight_or_with_states_that_occur_once_anchors_are_the_plain_advantage() -> None:
    plain = prepared(algorithm(), step_tokens()).advantages_B
    for args, states in (
        ({"weight": 0.0}, [1] * 14),
        ({}, list(range(14))),
        ({}, None),
    ):
        tokens = step_tokens(states=states)
        config = algorithm(advantage={"kind": "turn_anchor", "args": args})
        found = prepared(config, tokens).advantages_N
        assert found is not None
        assert torch.equal(found, tokens.axis.spread(plain))


def test_turns_in_one_state_are_compared_by_what_came_after() -> None:
    """GiGPO's second term, written out for one state that three turns share."""
    states = [-1, 7, -1, -1, -1, -1, -1, -1, 7, 3, 7, -1, -1, -1]  # the third is of another group
    tokens = step_tokens(states=states)
    config = algorithm(
        advantage={"kind": "turn_anchor", "args": {"gamma": 0.5, "weight": 2.0}},
        baseline={"kind": "dr_grpo"},
    )
    found = by_turn(prepared(config, tokens), tokens)
    plain = REWARDS - torch.tensor([1.25 / 3] * 3 + [0.5] * 3, dtype=torch.float64)
    # Turn 1 of episode 0 comes one turn before its end's reward; turn 2 of episode 2 has its own.
    here, there = 0.5 * 1.0, 0.25
    assert found[0][1] == pytest.approx(plain[0].item() + 2 * (here - there) / 2)
    assert found[2][2] == pytest.approx(plain[2].item() + 2 * (there - here) / 2)
    assert found[4][0] == pytest.approx(plain[4].item())  # alone with that state in its group
    assert found[0][0] == pytest.approx(plain[0].item())


def test_outcome_and_turn_rewards_are_added_before_the_last_turn() -> None:
    rewards = [1.0, 0.0, 9.0, 0.0, 0.0, 9.0, 0.0, 1.0, 9.0, 9.0, 1.0, 9.0, 0.0, 9.0]
    tokens = step_tokens(rewards=rewards)
    config = algorithm(
        advantage={"kind": "turn_outcome", "args": {"weight": 0.5}}, baseline={"kind": "dr_grpo"}
    )
    found = by_turn(prepared(config, tokens), tokens)
    outcome = (REWARDS - torch.tensor([1.25 / 3] * 3 + [0.5] * 3, dtype=torch.float64)).tolist()
    assert found[0] == pytest.approx(
        [0.5 * outcome[0] + 2 / 3, 0.5 * outcome[0] - 1 / 3, outcome[0]]
    )
    assert found[3] == pytest.approx([outcome[3]])


def test_an_episode_without_a_reward_is_in_no_baseline_of_turns() -> None:
    rewards_B = REWARDS.clone()
    rewards_B[1] = math.nan
    tokens = step_tokens()
    config = algorithm(advantage={"kind": "turn_return"}, baseline={"kind": "dr_grpo"})
    found = by_turn(prepared(config, tokens, rewards_B), tokens)
    assert found[1] == [0.0, 0.0, 0.0]
    assert found[0] == pytest.approx([0.375] * 3)
    assert found[2] == pytest.approx([-0.375] * 3)


@pytest.mark.parametrize("kind", ["turn_return", "turn_anchor", "turn_outcome"])
def test_answers_of_one_turn_keep_their_advantage(kind: str) -> None:
    answers = step_tokens([[n] for n in (3, 2, 4, 2, 1, 3)])
    plain = prepared(algorithm(), answers).advantages_B
    for tokens in (answers, replace(answers, turns=None)):
        found = prepared(algorithm(advantage={"kind": kind}), tokens).advantages_N
        assert found is not None
        assert torch.equal(found, answers.axis.spread(plain))


def test_a_completion_trains_when_any_of_its_tokens_has_an_advantage() -> None:
    tokens = step_tokens(rewards=[1.0, *([0.0] * 13)])
    config = algorithm(advantage={"kind": "turn_outcome"}, baseline={"kind": "dr_grpo"})
    found = prepared(config, tokens, torch.zeros(6, dtype=torch.float64))
    assert found.advantages_B.tolist() == [0.0] * 6
    assert found.trained_B.tolist() == [True] * 3 + [False] * 3


# The loss.


def loss_batch(tokens: StepTokens, advantages_N: Tensor | None, spread: float = 0.2) -> LossBatch:
    random = torch.Generator().manual_seed(3)
    total = len(tokens.token_ids_N)
    old_N = -torch.rand(total, generator=random, dtype=torch.float64) - 0.1
    x_N = spread * (torch.rand(total, generator=random, dtype=torch.float64) - 0.5)
    logprobs_N = (old_N + x_N).requires_grad_()
    advantages_B = torch.tensor([0.9, -0.7, 0.2, -1.1, 0.4, 0.0], dtype=torch.float64)
    assert tokens.turns is not None
    behaviour_N = old_N.masked_fill(~tokens.loss_mask_N, math.nan)
    return CompletionBatch(
        logprobs_N=logprobs_N,
        old_logprobs_N=old_N,
        behaviour_logprobs_N=behaviour_N,
        reference_logprobs_N=None,
        entropy_N=None,
        loss_mask_N=tokens.loss_mask_N,
        lengths_B=tokens.axis.lengths_B,
        advantages_B=advantages_B,
        token_weights_B=torch.linspace(0.01, 0.06, 6, dtype=torch.float64),
        prefix_counts_N=None,
        advantages_N=advantages_N,
        turn_N=tokens.turns.turn_N,
    )


LossBatch = CompletionBatch


def gradient(batch: LossBatch, config: AlgorithmConfig) -> tuple[LossOutput, Tensor]:
    output = policy_loss(batch, config, "none")
    (found,) = torch.autograd.grad(output.loss, batch.logprobs_N)
    return output, found


TRACE = {"kind": "lambda_trace", "lambda_": 0.8}


@pytest.mark.parametrize("objective", ["ppo", "cispo", "gpg", "sapo", "dppo", "vespo", "dro"])
@pytest.mark.parametrize("credit", [{}, TRACE])
def test_equal_advantages_of_tokens_are_bitwise_those_of_their_completion(
    objective: str, credit: dict[str, object]
) -> None:
    tokens = step_tokens()
    config = algorithm(objective={"kind": objective}, credit=credit)
    plain = loss_batch(tokens, None)
    spread = replace(plain, advantages_N=tokens.axis.spread(plain.advantages_B))
    (one, g_one), (two, g_two) = gradient(plain, config), gradient(spread, config)
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(g_one, g_two)
    assert two.advantages_N is not None
    trained_N = tokens.axis.spread(plain.advantages_B)[tokens.loss_mask_N]
    assert two.advantages_N == pytest.approx(trained_N * one.credit_N, abs=1e-14)


@pytest.mark.parametrize("objective", ["gspo", "ppo"])
def test_equal_advantages_under_a_sequence_ratio_and_under_weights(objective: str) -> None:
    """GSPO-token has GSPO's gradient; K^T A is A c for a constant A."""
    tokens = step_tokens()
    credit = {} if objective == "gspo" else {**TRACE, "application": "weight"}
    config = algorithm(objective={"kind": objective}, credit=credit)
    plain = loss_batch(tokens, None)
    spread = replace(plain, advantages_N=tokens.axis.spread(plain.advantages_B))
    (one, g_one), (two, g_two) = gradient(plain, config), gradient(spread, config)
    assert one.loss.item() == pytest.approx(two.loss.item(), abs=1e-14)
    assert (g_one - g_two).abs().max() < 1e-15


def dense(episode: list[int], decay: float, turn_decay: float, given: int = 0) -> Tensor:
    """The matrix K over the sampled tokens of an episode, from its definition."""
    turn = [number for number, length in enumerate(episode) for _ in range(length)]
    count = len(turn)
    matrix = torch.zeros(count, count, dtype=torch.float64)
    for t in range(count):
        for k in range(t + 1):
            borders = turn[t] - turn[k]
            matrix[t, k] = decay ** (t - k - borders) * turn_decay**borders
    return matrix


def trace_of(turn_decay: float | None, decay: float = 0.8, kind: str = "recent") -> LambdaTrace:
    turn_N = torch.tensor(
        [n for e in EPISODES for n, length in enumerate(e) for _ in range(length)]
    )
    lengths_B = torch.tensor([sum(episode) for episode in EPISODES])
    return LambdaTrace(PackedAxis(lengths_B, turn_N), kind, decay, turn_decay=turn_decay)


@pytest.mark.parametrize("turn_decay", [0.0, 0.3, 0.8, 1.0])
def test_a_trace_over_turns_is_its_matrix(turn_decay: float) -> None:
    x_N = torch.randn(sum(map(sum, EPISODES)), dtype=torch.float64)
    found = trace_of(turn_decay).apply(x_N).split([sum(episode) for episode in EPISODES])
    for z_T, x_T, episode in zip(
        found, x_N.split([sum(e) for e in EPISODES]), EPISODES, strict=True
    ):
        assert (z_T - dense(episode, 0.8, turn_decay) @ x_T).abs().max() < 1e-14


def test_a_turn_decay_that_is_the_decay_changes_nothing_and_null_knows_no_turns() -> None:
    x_N = torch.randn(sum(map(sum, EPISODES)), dtype=torch.float64)
    plain = trace_of(None).apply(x_N)
    blind = LambdaTrace(PackedAxis(torch.tensor([sum(e) for e in EPISODES])), "recent", 0.8)
    assert torch.equal(plain, blind.apply(x_N))
    assert torch.equal(trace_of(0.8).apply(x_N), plain)


def test_a_turn_decay_of_zero_is_a_trace_a_turn() -> None:
    x_N = torch.randn(sum(map(sum, EPISODES)), dtype=torch.float64)
    lengths = torch.tensor([length for episode in EPISODES for length in episode])
    alone = LambdaTrace(PackedAxis(lengths), "recent", 0.8)
    assert (trace_of(0.0).apply(x_N) - alone.apply(x_N)).abs().max() < 1e-15


def test_long_turns_take_the_same_trace_as_short_ones() -> None:
    """Where the uniform scan would be taken if there were no turns."""
    lengths = [200, 300]
    turn_N = torch.tensor([0] * 200 + [1] * 300)
    x_N = torch.randn(500, dtype=torch.float64)
    trace = LambdaTrace(PackedAxis(torch.tensor([500]), turn_N), "recent", 0.99, turn_decay=0.5)
    assert (trace.apply(x_N) - dense(lengths, 0.99, 0.5) @ x_N).abs().max() < 1e-12


@pytest.mark.parametrize("application", ["trace", "weight"])
@pytest.mark.parametrize("turn_decay", [None, 0.0, 0.4])
def test_the_gradient_at_the_old_policy_is_the_transposed_trace_of_the_advantages(
    application: str, turn_decay: float | None
) -> None:
    tokens = step_tokens()
    credit = {**TRACE, "application": application, "turn_decay": turn_decay}
    config = algorithm(credit=credit)
    advantages_N = torch.randn(len(tokens.token_ids_N), dtype=torch.float64)
    batch = loss_batch(tokens, advantages_N, spread=0.0)
    output, found_N = gradient(batch, config)
    weights_N = tokens.axis.spread(batch.token_weights_B)
    start = 0
    for i, episode in enumerate(EPISODES):
        own = slice(start, start + len(turn_numbers(episode)))
        start = own.stop
        mask = tokens.loss_mask_N[own]
        matrix = dense(episode, 0.8, 0.8 if turn_decay is None else turn_decay)
        reached = matrix.t() @ advantages_N[own][mask]
        expected = -batch.token_weights_B[i] * reached
        assert (found_N[own][mask] - expected).abs().max() < 1e-14
        assert found_N[own][~mask].abs().sum() == 0
    assert output.advantages_N is not None
    gradient_M = -weights_N[tokens.loss_mask_N] * output.advantages_N
    assert (found_N[tokens.loss_mask_N] - gradient_M).abs().max() < 1e-14


def test_given_tokens_change_nothing() -> None:
    """However many there are, and whatever they hold: bitwise."""
    config = algorithm(credit={**TRACE, "turn_decay": 0.5})
    found = []
    for given in (0, 1, 13):
        tokens = step_tokens(given=given)
        assert tokens.turns is not None
        batch = loss_batch(step_tokens(given=0), None)
        total = len(tokens.token_ids_N)
        old_N, logprobs_N = torch.randn(total).double(), torch.randn(total).double()
        old_N[tokens.loss_mask_N] = batch.old_logprobs_N
        logprobs_N[tokens.loss_mask_N] = batch.logprobs_N.detach()
        behaviour_N = old_N.masked_fill(~tokens.loss_mask_N, math.nan)
        wide = replace(
            batch,
            logprobs_N=logprobs_N.requires_grad_(),
            old_logprobs_N=old_N,
            behaviour_logprobs_N=behaviour_N,
            loss_mask_N=tokens.loss_mask_N,
            lengths_B=tokens.axis.lengths_B,
            turn_N=tokens.turns.turn_N,
        )
        output, gradient_N = gradient(wide, config)
        found.append((output.loss, gradient_N[tokens.loss_mask_N]))
    for loss, gradient_M in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient_M, found[0][1])


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"advantage": {"kind": "turn_return"}, "objective": {"kind": "gmpo"}}, "gmpo"),
        ({"advantage": {"kind": "turn_anchor"}, "rollout": {"dynamic_sampling": True}}, "dynamic"),
        ({"credit": {**TRACE, "trace": "both", "turn_decay": 0.5}}, "turn_decay"),
        ({"credit": {"turn_decay": 0.5}}, "turn_decay"),
        ({"advantage": {"kind": "turn_return", "args": {"gama": 0.5}}}, "gamma"),
        ({"advantage": {"kind": "turn_return", "args": {"gamma": 1.5}}}, "gamma"),
    ],
)
def test_what_has_no_meaning_is_refused(sections: dict[str, dict[str, object]], key: str) -> None:
    with pytest.raises(UserError, match=key):
        check_recipe(algorithm(**sections), "none")


def first_token_alone(
    inputs: AdvantageInputs, config: AdvantageConfig, scale: float = 1.0
) -> TokenAdvantages:
    """A rule of a user's own."""
    first_N = inputs.tokens.axis.position_N == 0
    return TokenAdvantages(scale * first_N * inputs.tokens.axis.spread(inputs.advantages_B))


def test_a_rule_of_ones_own_gives_tokens_their_advantage() -> None:
    tokens = step_tokens()
    own = {"kind": f"{__name__}:first_token_alone", "args": {"scale": 2.0}}
    found = prepared(algorithm(advantage=own), tokens)
    assert found.advantages_N is not None
    first_N = tokens.axis.position_N == 0
    assert torch.equal(found.advantages_N[first_N], 2 * found.advantages_B)
    assert found.advantages_N[~first_N].abs().sum() == 0
