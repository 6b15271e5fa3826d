"""A teacher is compared with the policy before anything starts, and counted in the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizers import byte_tokenizer

from common.config.load import Loaded, load_config
from common.config.sections import Config
from common.errors import UserError
from deploy.models.teacher import find_teacher
from deploy.placement.memory import estimate
from deploy.predict.cluster_plan import ClusterPlan
from deploy.predict.notes import notes
from deploy.predict.plan import describe
from learner.training.memory import OtherModels

CONFIGS = Path(__file__).resolve().parents[2] / "deploy" / "configs"


def config(*keys: str) -> Config:
    given = ["recipe=opd", "data.template=chat", "model.max_length=64"]
    given += ["generator.max_completion_tokens=32", *keys]
    return load_config([CONFIGS / "tiny.yaml"], given, CONFIGS / "recipes")


def model(folder: Path, tokenizer: Any, longest: int = 64) -> Path:
    """A folder as far as it is looked into before a run."""
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": longest}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return model(tmp_path / "policy", byte_tokenizer())


def test_a_teacher_that_reads_what_the_policy_writes_is_found(policy: Path, tmp_path: Path) -> None:
    teacher = model(tmp_path / "teacher", byte_tokenizer())
    found = find_teacher(config(f"teacher.path={teacher}"), policy)
    assert found.path == str(teacher)


def test_one_must_be_named(policy: Path) -> None:
    with pytest.raises(UserError, match=r"set teacher\.path"):
        find_teacher(config(), policy)
    assert find_teacher(config("recipe=grpo"), policy).path is None


def test_another_vocabulary_is_refused(policy: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    teacher = model(tmp_path / "teacher", tokenizer)
    with pytest.raises(UserError, match=r"another vocabulary.* 1 tokens .*'<extra>'"):
        find_teacher(config(f"teacher.path={teacher}"), policy)


def test_another_end_of_text_is_refused(policy: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<s>"
    teacher = model(tmp_path / "teacher", tokenizer)
    with pytest.raises(UserError, match="ends a text with token 0"):
        find_teacher(config(f"teacher.path={teacher}"), policy)


def test_another_chat_template_is_refused_where_it_is_used(policy: Path, tmp_path: Path) -> None:
    teacher = model(tmp_path / "teacher", byte_tokenizer("{{ messages[0].content }}!"))
    with pytest.raises(UserError, match=r"data\.chat_template"):
        find_teacher(config(f"teacher.path={teacher}"), policy)
    find_teacher(config(f"teacher.path={teacher}", "data.template=plain"), policy)
    shared = tmp_path / "shared.jinja"
    shared.write_text("{{ messages[0].content }}")
    find_teacher(config(f"teacher.path={teacher}", f"data.chat_template={shared}"), policy)


def test_a_context_that_is_too_short_is_refused(policy: Path, tmp_path: Path) -> None:
    teacher = model(tmp_path / "teacher", byte_tokenizer(), longest=63)
    with pytest.raises(UserError, match="reads 63 tokens at most"):
        find_teacher(config(f"teacher.path={teacher}"), policy)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["algorithm.advantage.scorer=null"], r"set algorithm\.advantage\.scorer to teacher"),
        (["recipe=grpo_care", "algorithm.advantage.scorer=null"], r"consistency\.weight=0\.5 goes"),
        (["algorithm.advantage.scorer=policy"], "says what it said"),
        (["teacher.count=1"], r"that of teacher\.path"),
        (["teacher.path=x", "teacher.count=1", "generator.temperature=0.7"], "at temperature 1"),
        (["teacher.path=x", "teacher.count=1", "teacher.offload=true"], "processes of its own"),
        (
            ["teacher.path=x", "teacher.count=1", "algorithm.advantage.context=answer"],
            "their own prompt alone",
        ),
        (["teacher.offload=true"], r"that of teacher\.path"),
        (["algorithm.advantage.context_template=x"], r"that of algorithm\.advantage\.context"),
        (["recipe=rlsd", "algorithm.advantage.context_template='{prompt}'"], r"\{answer\} 0 times"),
        (["recipe=grpo", "algorithm.advantage.context=answer"], "read by no rule"),
        (["recipe=opd", "algorithm.advantage.context=feedback"], r"set environment\.name"),
        (["recipe=sdpo", "environment.name=calculator"], "use feedback"),
        (["recipe=grpo_care", "environment.name=calculator"], "plays episodes"),
        (["recipe=grpo_care", "algorithm.rollout.dynamic_sampling=true"], "dynamic_sampling"),
        (["recipe=grpo_care", "algorithm.rollout.consistency.pattern='('"], "no regular"),
        (["recipe=grpo", "algorithm.advantage.scorer=reference"], "reads no scores"),
        (["recipe=grpo", "teacher.path=x"], "nobody asks the teacher"),
        (["learner.credit_log_every=2"], "could not be replayed"),
    ],
)
def test_keys_that_cannot_work_together_are_refused(keys: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        config(*keys)


def test_rules_that_give_uniform_groups_a_signal_are_not_for_dynamic_sampling() -> None:
    from learner.algorithm.recipe import check_recipe

    for recipe in ("opd", "flowrl", "sdpo", "opsd", "spro"):
        made = config(f"recipe={recipe}", "algorithm.rollout.dynamic_sampling=true")
        with pytest.raises(UserError, match="dynamic_sampling"):
            check_recipe(made.algorithm, made.correction_kind)


def test_the_plan_counts_a_teacher() -> None:
    cluster = ["placement.generator_device=H100-80GB", "model.path=Qwen/Qwen2.5-1.5B"]
    alone = ClusterPlan.of(config("recipe=grpo", *cluster))
    taught = ClusterPlan.of(config(*cluster, "teacher.path=Qwen/Qwen2.5-7B"))
    ranks, parameters = taught.config.learner.ranks, 7.6e9
    more = taught.memory.learner.kept - alone.memory.learner.kept
    assert more == pytest.approx(2 * parameters / ranks, rel=0.01)
    assert taught.costs().learner_token_s > 1.5 * alone.costs().learner_token_s
    assert not any("scorer" in note for note in notes(alone.config))
    assert any(
        "Qwen/Qwen2.5-7B" in note and "forward pass" in note for note in notes(taught.config)
    )


def test_the_plan_counts_an_average_and_the_second_pass() -> None:
    cluster = ["placement.generator_device=H100-80GB", "model.path=Qwen/Qwen2.5-1.5B"]
    alone = ClusterPlan.of(config("recipe=grpo", *cluster))
    made = ClusterPlan.of(config("recipe=sdpo", *cluster))
    more = made.memory.learner.kept - alone.memory.learner.kept
    parameters = made.model.parameters
    assert more == pytest.approx(4 * parameters / made.config.learner.ranks, rel=0.01)
    once = ClusterPlan.of(config("recipe=sdpo", *cluster, "algorithm.advantage.against=sampler"))
    passes = [plan.costs().learner_token_s for plan in (alone, once, made)]
    assert passes[1] - passes[0] == pytest.approx(passes[2] - passes[1], rel=1e-6)
    assert passes[2] > 1.3 * passes[0]
    assert any("float32" in note and "besides" in note for note in notes(made.config))


def test_a_teacher_that_waits_on_the_host_takes_no_memory_of_a_device() -> None:
    cluster = ["placement.generator_device=H100-80GB", "model.path=Qwen/Qwen2.5-1.5B"]
    cluster += ["teacher.path=Qwen/Qwen2.5-7B"]
    waiting = ClusterPlan.of(config(*cluster, "teacher.offload=true"))
    held = ClusterPlan.of(config(*cluster))
    ranks = held.config.learner.ranks
    less = held.memory.learner.kept - waiting.memory.learner.kept
    assert less == pytest.approx(2 * 7.6e9 / ranks, rel=0.01)
    assert waiting.costs().learner_token_s == held.costs().learner_token_s


def test_on_cpus_no_teacher_waits_and_a_plan_wants_one_named(policy: Path) -> None:
    with pytest.raises(UserError, match="in the host's memory anyway"):
        find_teacher(config(f"teacher.path={policy}", "teacher.offload=true"), policy)
    with pytest.raises(UserError, match=r"set teacher\.path"):
        describe(Loaded(config(), {}))


def test_on_cpus_too() -> None:
    made = config("model.dtype=bfloat16")
    more = estimate(made, 10**9, OtherModels(teacher=1e9)).total - estimate(made, 10**9).total
    assert more == pytest.approx(2 * 10**9)
    more = estimate(made, 10**9, OtherModels(average=True)).total - estimate(made, 10**9).total
    assert more == pytest.approx(2 * 4 * 10**9)  # and once more in a checkpoint's copy


def test_a_teacher_in_generators_of_its_own_is_no_part_of_the_learner() -> None:
    cluster = ["placement.generator_device=H100-80GB", "model.path=Qwen/Qwen2.5-1.5B"]
    alone = ClusterPlan.of(config("recipe=grpo", *cluster))
    pool = ["teacher.path=Qwen/Qwen2.5-7B", "teacher.count=2", "teacher.tensor_parallel=2"]
    made = ClusterPlan.of(config(*cluster, *pool))
    assert made.memory.learner.kept == alone.memory.learner.kept
    assert made.costs().learner_token_s == alone.costs().learner_token_s
    assert any("2 generator(s)" in note and "2 device(s)" in note for note in notes(made.config))
    plain = config("model.dtype=bfloat16")
    pooled = config("model.dtype=bfloat16", "teacher.path=x", "teacher.count=1")
    more = estimate(pooled, 0, taught=10**9).total - estimate(plain, 0).total
    assert more > 2 * 10**9  # its weights, its cache and its process
