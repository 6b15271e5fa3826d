"""The whole algorithm in one process. Read this file first, then run it.

    .venv/bin/python deploy/examples/loop.py

A small language model learns to add and subtract three digits. A step has six parts:

    sample     the model answers P questions, G times each
    reward     rules give every answer a reward
    as_batch   answers and rewards become one batch
    backward   rewards become advantages, advantages become credit for each token, and credit
               becomes a gradient
    main       the optimiser takes one step
    reload     the sampler gets the new weights

A real run (`grpo-lambda train`) computes the same gradient; a test compares the two. There the
sampler, the judge and the learner are processes of their own. They work at the same time, on as
many devices as there are, and any of them may die.

Shapes: B = P * G completions of the step, N completion tokens of one micro-batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.data.prompts import Prompt, build_prompt_source
from actors.verifiers.judge import Judge
from common.config.sections import Config
from deploy.command.presets import load
from deploy.models.resolve import resolve_model
from learner.algorithm.loss import CompletionBatch
from learner.algorithm.recipe import Recipe
from learner.policy.model import Policy, load_policy
from learner.policy.packing import pack_microbatch, plan_packing
from learner.policy.step_batch import StepBatch

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
# Staleness 0: the answers come from exactly the policy that learns from them.
OVERRIDES = ["recipe=grpo_lambda_recent", "generator.max_staleness=0"]


def sample(llm: Any, prompts: Sequence[Prompt], config: Config) -> list[list[Any]]:
    """G completions for each prompt, with the log-probability of every token that was drawn."""
    from vllm import SamplingParams

    wanted = SamplingParams(
        n=config.batch.group_size,
        max_tokens=config.generator.max_completion_tokens,
        temperature=config.generator.temperature,
        logprobs=0,  # those of the drawn token alone
    )
    questions = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
    return [answer.outputs for answer in llm.generate(questions, wanted, use_tqdm=False)]


def reward(judge: Judge, prompts: Sequence[Prompt], groups: Sequence[Sequence[Any]]) -> list[float]:
    """The reward of every completion; NaN for one that the rule could not judge."""
    of_each = zip(prompts, groups, strict=True)
    references = [prompt.reference for prompt, group in of_each for _ in group]
    judged = judge.judge([answer.text for group in groups for answer in group], references)
    return [math.nan if each.reward is None else each.reward for each in judged]


def as_batch(
    prompts: Sequence[Prompt], groups: Sequence[Sequence[Any]], rewards: Sequence[float]
) -> StepBatch:
    """The completions one behind the other, in flat arrays over all their tokens."""
    completions = list(chain.from_iterable(groups))
    drawn = [
        scores[token].logprob
        for completion in completions
        for token, scores in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    return StepBatch(
        prompts=tuple(np.asarray(prompt.token_ids, np.int64) for prompt in prompts),
        group_B=np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
        offsets=np.cumsum([0, *(len(completion.token_ids) for completion in completions)]),
        token_ids=np.concatenate([np.asarray(c.token_ids, np.int64) for c in completions]),
        behaviour_logprobs=np.asarray(drawn, np.float32),
        weight_versions=np.zeros(len(drawn), np.int32),
        loss_mask=np.ones(len(drawn), np.bool_),
        rewards_B=np.asarray(rewards, np.float64),
        accuracy_B=np.asarray(rewards, np.float64),
        truncated_B=np.array([c.finish_reason == "length" for c in completions], np.bool_),
    )


def backward(policy: Policy, recipe: Recipe, batch: StepBatch, config: Config) -> float:
    """Add the gradient of the step's loss to the parameters; returns the loss.

    The recipe compares rewards within each group and knows the whole batch. After that the loss
    is a sum over completions, so the batch may be cut into micro-batches that fit into memory.
    """
    prepared = recipe.prepare(batch.rewarded("the rule"))
    plan = plan_packing(
        batch,
        prepared.trained_B.numpy(),
        ranks=1,
        budget=config.batch.tokens_per_microbatch,
        share_prefix=True,  # a prompt is computed once for its completions
        pairs_per_token=6.0 * policy.hidden_size,
    )
    loss = 0.0
    for segments in plan.microbatches[0]:
        row = pack_microbatch(batch, segments, "cpu")
        logprobs_N, entropy_N = policy.logprobs(
            row,
            temperature=config.generator.temperature,
            with_entropy=recipe.needs_entropy,
            entropy_learns=recipe.entropy_bonus,
        )
        chosen = list(row.completions)
        tokens_N = np.concatenate([np.r_[batch.tokens_of(c)] for c in chosen])
        output = recipe.loss(
            CompletionBatch(
                logprobs_N=logprobs_N,
                old_logprobs_N=logprobs_N.detach(),  # one optimiser step a batch
                behaviour_logprobs_N=torch.from_numpy(batch.behaviour_logprobs[tokens_N]),
                reference_logprobs_N=None,
                entropy_N=entropy_N if recipe.needs_entropy else None,
                loss_mask_N=torch.from_numpy(batch.loss_mask[tokens_N]),
                lengths_B=torch.tensor(row.lengths),
                advantages_B=prepared.advantages_B[chosen],
                token_weights_B=prepared.token_weights_B[chosen],
                prefix_counts_N=None,
            )
        )
        output.loss.backward()
        loss += output.loss.item()
    return loss


def reload(llm: Any, policy: Policy) -> None:
    """Load the policy's weights into vLLM, which keeps them in a layout of its own."""
    from vllm.model_executor.model_loader import reload as layerwise

    from actors.generation.weight_engine import refresh_tied_heads

    def load_into(model: Any) -> None:
        layerwise.initialize_layerwise_reload(model)
        model.load_weights((n, p.detach()) for n, p in policy.model.named_parameters())
        layerwise.finalize_layerwise_reload(model, llm.llm_engine.model_config)
        refresh_tied_heads(model)

    llm.apply_model(load_into)
    llm.reset_prefix_cache()  # it holds what the old weights computed


def start_sampler(config: Config) -> Any:
    """vLLM inside this process, on the CPU."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",  # it warns of layers without weights at every reload
    }
    from vllm import LLM

    return LLM(
        config.model.path,
        dtype=config.model.dtype,
        max_model_len=config.model.max_length,
        kv_cache_memory_bytes=int(config.generator.kv_cache_gib * 2**30),
        enforce_eager=True,
        distributed_executor_backend="uni",
        logprobs_mode="processed_logprobs",  # of the distribution that is drawn from
        generation_config="vllm",  # the model's own sampling defaults are left out
    )


def main(overrides: Sequence[str] = OVERRIDES) -> list[float]:
    """Train, and print a line for each step; returns the mean rewards."""
    config = load(TINY, overrides)
    config.model.path = str(resolve_model(config.model.path))
    torch.set_num_threads(config.learner.threads or 1)
    llm = start_sampler(config)
    answer_tokens = config.generator.max_completion_tokens
    questions = build_prompt_source(
        config.data, 0, config.seed, llm.get_tokenizer(), config.model.max_length - answer_tokens
    )
    recipe = Recipe(config.algorithm, config.correction_kind, answer_tokens)
    policy, _ = load_policy(
        config.model,
        torch.float32,
        logits_mib=config.learner.logits_mib,
        temperature=config.generator.temperature,
        weights=True,
    )
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), config.learner.learning_rate, config.learner.betas
    )
    mean_rewards = []
    # It judges in a child process, where rules may fail.
    with closing(Judge(config.verifier)) as judge:
        for step in range(config.steps):
            prompts = [questions.next() for _ in range(config.batch.prompts_per_step)]
            groups = sample(llm, prompts, config)
            rewards = reward(judge, prompts, groups)
            loss = backward(policy, recipe, as_batch(prompts, groups, rewards), config)
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.learner.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            reload(llm, policy)
            mean_rewards.append(float(np.nanmean(rewards)))
            print(f"step {step + 1:3}  reward {mean_rewards[-1]:.3f}  loss {loss:+.3f}", flush=True)
    return mean_rewards


if __name__ == "__main__":
    main()
