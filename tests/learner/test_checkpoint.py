"""Checkpoints: exact, loadable by others, and by another number of ranks."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import save_model
from learner_models import save_tiny_model, tiny_model, trajectories
from learner_ranks import SHAPES, make_worker, on_ranks, untimed, weights, worker
from transformers import AutoModelForCausalLM

from actors.generation.texts import ending_tokens
from common.config.algorithm import AlgorithmConfig
from common.errors import RunError, UserError
from learner.training import checkpoint, fsdp
from learner.training.checkpoint import pinned_stager
from learner.training.rank import LearnerRank


def save(made: LearnerRank, folder: Path, extra: dict[str, Any]) -> None:
    made.take_checkpoint(extra)
    made.write_checkpoint(str(folder))


def _continue(made: LearnerRank) -> tuple[dict[str, float], dict[str, Any]]:
    metrics = made.step(trajectories(SHAPES, seed=7), 0, 0)
    return metrics, {name: tensor.numpy() for name, tensor in weights(made).items()}


def _save_target(rank: int, ranks: int, folder: Path, target: Path) -> tuple:
    return make_worker(folder, rank, ranks), _SaveWork(target)


class _SaveWork:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __call__(self, made: LearnerRank) -> Any:
        made.step(trajectories(SHAPES), 0, 0)
        save(made, self.target, {"version": 1})
        return _continue(made)


class _LoadWork(_SaveWork):
    def __call__(self, made: LearnerRank) -> Any:
        extra = made.load_checkpoint(str(self.target))
        assert extra == {"version": 1}
        return _continue(made)


def _load_target(rank: int, ranks: int, folder: Path, target: Path) -> tuple:
    return make_worker(folder, rank, ranks), _LoadWork(target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen2")


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    target = tmp_path_factory.mktemp("run") / "step-1"
    with worker(folder, schedule="linear") as made:
        return target, _SaveWork(target)(made)


def test_resumed_run_is_bitwise_the_unbroken_one(folder: Path, saved) -> None:
    target, unbroken = saved
    with worker(folder, schedule="linear") as made:
        torch.manual_seed(99)
        resumed = _LoadWork(target)(made)
        assert made.trainer.step == 2
    assert untimed(resumed[0]) == untimed(unbroken[0])
    for name, tensor in unbroken[1].items():
        assert (resumed[1][name] == tensor).all(), name


def test_after_a_resume_the_reference_is_still_the_first_model(
    folder: Path, tmp_path: Path
) -> None:
    with worker(folder, kl=0.1, learning_rate=1e-2) as made:
        unbroken, _ = _SaveWork(tmp_path / "step-1")(made)
    with worker(tmp_path / "step-1", kl=0.1, learning_rate=1e-2, reference=folder) as made:
        resumed, _ = _LoadWork(tmp_path / "step-1")(made)
    assert resumed["loss/kl"] == unbroken["loss/kl"] > 1e-5


class _StepOnWork(_SaveWork):
    """Steps in this thread while another writes, as the actor does."""

    def __call__(self, made: LearnerRank) -> Any:
        made.step(trajectories(SHAPES), 0, 0)
        made.take_checkpoint({"version": 1})
        with ThreadPoolExecutor(1) as threads:
            writing = threads.submit(made.write_checkpoint, str(self.target))
            unbroken = _continue(made)
            writing.result(timeout=60)
        return unbroken


def _step_on_target(rank: int, ranks: int, folder: Path, target: Path) -> tuple:
    return make_worker(folder, rank, ranks), _StepOnWork(target)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_is_of_the_moment_it_was_taken(
    folder: Path, tmp_path: Path, ranks: int
) -> None:
    unbroken = on_ranks(ranks, _step_on_target, folder, tmp_path / "step-1")
    resumed = on_ranks(ranks, _load_target, folder, tmp_path / "step-1")
    for mine, theirs in zip(unbroken, resumed, strict=True):
        assert untimed(mine[0]) == untimed(theirs[0])
        assert all((mine[1][name] == theirs[1][name]).all() for name in mine[1])
    of_step_1 = AutoModelForCausalLM.from_pretrained(tmp_path / "step-1")
    moved = [
        name
        for name, parameter in of_step_1.named_parameters()
        if not torch.equal(parameter, torch.from_numpy(unbroken[0][1][name]))
    ]
    assert len(moved) > 10  # the learner was a step further when the folder was complete


def test_nothing_is_written_that_was_not_taken(folder: Path, tmp_path: Path) -> None:
    with worker(folder) as made, pytest.raises(RunError, match="before take_checkpoint"):
        made.write_checkpoint(str(tmp_path / "step-1"))


def test_optimizer_state_comes_back_bitwise(folder: Path, saved) -> None:
    target, _ = saved
    states = []
    for _ in range(2):
        with worker(folder) as made:
            made.load_checkpoint(str(target))
            (optimizer,) = made.trainer.optimizers
            states.append(
                [
                    {k: v.to_local() if hasattr(v, "to_local") else v for k, v in s.items()}
                    for s in optimizer.state.values()
                ]
            )
    assert len(states[0]) > 10
    for mine, theirs in zip(*states, strict=True):
        assert float(mine["step"]) == 1.0
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
        assert mine["exp_avg"].abs().sum() > 0


def test_folder_loads_in_transformers(folder: Path, saved) -> None:
    target, _ = saved
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (target / "tokenizer.json").is_file()
    original = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.to_dict().keys() == original.config.to_dict().keys()
    assert model.config._attn_implementation == original.config._attn_implementation
    with worker(folder) as made:
        made.load_checkpoint(str(target))
        exported = weights(made)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, exported[name]), name


def test_a_checkpoint_ends_answers_where_its_model_did(folder: Path, tmp_path: Path) -> None:
    """Instruction-tuned models name several ends, some in generation_config.json alone."""
    source, target = tmp_path / "model", tmp_path / "step-1"
    shutil.copytree(folder, source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106, 7]}))
    with worker(source) as made:
        save(made, target, {})
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=None)
    ends = ending_tokens(tokenizer, str(source))
    assert {1, 106, 7} <= set(ends) == set(ending_tokens(tokenizer, str(target)))


def test_a_parameter_that_never_had_a_gradient_resumes_without_a_state(tmp_path: Path) -> None:
    """Such as the routing bias of Ernie's mixtures."""
    target = tmp_path / "step-1"
    folder = save_model(tmp_path / "model", "ernie4_5_moe")
    with worker(folder) as made:
        metrics, unbroken = _SaveWork(target)(made)
    with worker(folder) as made:
        resumed = _LoadWork(target)(made)
        (optimizer,) = made.trainer.optimizers
        named = dict(made.trainer.policy.model.named_parameters())
        idle = [name for name, parameter in named.items() if parameter not in optimizer.state]
    assert idle and all(name.endswith("e_score_correction_bias") for name in idle)
    assert untimed(resumed[0]) == untimed(metrics)
    assert all((resumed[1][name] == tensor).all() for name, tensor in unbroken.items())


def test_another_number_of_ranks_goes_on(folder: Path, saved, tmp_path: Path) -> None:
    target, _ = saved
    with worker(folder) as made:
        alone = _LoadWork(target)(made)
    two = on_ranks(2, _load_target, folder, target)
    assert two[0][0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-4)
    for name, weight in alone[1].items():
        gap = np.abs(two[0][1][name] - weight)
        assert gap.max() < 2e-4 and gap.mean() < 1e-6, name  # see assert_same_training
    from_two = on_ranks(2, _save_target, folder, tmp_path / "step-1")
    with worker(folder) as made:
        back = _LoadWork(tmp_path / "step-1")(made)
    assert back[0]["grad_norm"] == pytest.approx(from_two[0][0]["grad_norm"], rel=1e-4)


class _HybridWork(_SaveWork):
    def __call__(self, made: LearnerRank) -> Any:
        metrics, after = super().__call__(made)
        held = sum(p.to_local().numel() for p in made.trainer.policy.model.parameters())
        return metrics, after, held


def _hybrid_target(rank: int, ranks: int, folder: Path, target: Path) -> tuple:
    made = make_worker(folder, rank, ranks, shard_ranks=2, schedule="linear")
    return made, _HybridWork(target)


def test_two_copies_of_two_shards_train_as_one_rank_does(
    folder: Path, saved, tmp_path: Path
) -> None:
    """Hybrid sharding; what it saves, one rank loads."""
    target = tmp_path / "step-1"
    four = on_ranks(4, _hybrid_target, folder, target)
    _, (alone, weights_alone) = saved
    assert all(untimed(found[0]) == untimed(four[0][0]) for found in four)
    assert four[0][0]["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    for name, weight in weights_alone.items():
        gap = np.abs(four[0][1][name] - weight)
        assert gap.max() < 2e-4 and gap.mean() < 1e-6, name  # see assert_same_training
    whole = sum(weight.size for weight in weights_alone.values())
    held = [found[2] for found in four]
    assert held[0] + held[1] == held[2] + held[3] == whole
    with worker(folder, schedule="linear") as made:
        back = _LoadWork(target)(made)
    assert back[0]["grad_norm"] == pytest.approx(four[0][0]["grad_norm"], rel=1e-4)


def test_saving_again_replaces_and_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    with worker(folder) as made:
        save(made, target, {"version": 1})
        save(made, target, {"version": 2})
        assert made.load_checkpoint(str(target)) == {"version": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_a_checkpoint_has_its_tokenizer_though_its_source_is_gone(
    folder: Path, tmp_path: Path
) -> None:
    """A resumed run starts from a checkpoint, which is pruned while it goes on."""
    source = Path(shutil.copytree(folder, tmp_path / "step-1"))
    with worker(source) as made:
        shutil.rmtree(source)
        save(made, tmp_path / "step-9", {"version": 9})
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "step-9" / name).read_bytes(), name
    assert (tmp_path / "step-9" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()


def test_interrupted_save_leaves_the_old_checkpoint(folder, tmp_path, monkeypatch) -> None:
    target = tmp_path / "step-1"
    with worker(folder) as made:
        save(made, target, {"version": 1})

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr("learner.training.checkpoint.save_hf_folder", fail)
        with pytest.raises(OSError, match="disk full"):
            save(made, target, {"version": 2})
        assert made.load_checkpoint(str(target)) == {"version": 1}


def test_folder_without_training_state_is_a_user_error(folder: Path) -> None:
    with worker(folder) as made, pytest.raises(UserError, match="holds no training state"):
        made.load_checkpoint(str(folder))


def test_the_learned_length_preference_comes_back(folder: Path, tmp_path: Path) -> None:
    algorithm = AlgorithmConfig()
    algorithm.aggregation.kind = "lambda_grpo"
    with worker(folder, algorithm=algorithm) as made:
        unbroken = _SaveWork(tmp_path / "step-1")(made)
    with worker(folder, algorithm=algorithm) as made:
        resumed = _LoadWork(tmp_path / "step-1")(made)
    assert resumed[0]["lambda_grpo/lambda"] == unbroken[0]["lambda_grpo/lambda"] != 0.0
    assert resumed[0]["loss/policy"] == unbroken[0]["loss/policy"]


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


class _BufferWork(_SaveWork):
    def __call__(self, made: LearnerRank) -> Any:
        save(made, self.target, {"version": 1})
        sent = weights(made)
        held = dict(fsdp.saved_buffers(made.trainer.policy.model))
        return {name: b.numpy() for name, b in held.items()}, BIAS in sent


def _buffer_target(rank: int, ranks: int, folder: Path, target: Path) -> tuple:
    return make_worker(folder, rank, ranks), _BufferWork(target)


def test_buffers_of_a_checkpoint_reach_every_rank_and_the_next_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("glm4_moe")
    bias = dict(model.named_buffers())[BIAS]
    bias.copy_(torch.linspace(-2.0, 2.0, len(bias)))
    folder, target = tmp_path / "moe", tmp_path / "step-1"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    held, sent = zip(*on_ranks(2, _buffer_target, folder, target), strict=True)
    for found in held:
        assert set(found) == {BIAS}
        np.testing.assert_array_equal(found[BIAS], bias)
    assert sent == (True, False)  # to the generators, by rank 0
    loaded = AutoModelForCausalLM.from_pretrained(target)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_resume_takes_the_optimiser_s_settings_from_the_configuration(
    folder: Path, saved
) -> None:
    target, _ = saved
    with worker(folder, weight_decay=0.1, betas=(0.8, 0.99)) as made:
        made.load_checkpoint(str(target))
        (optimizer,) = made.trainer.optimizers
        (group,) = optimizer.param_groups
        assert (group["weight_decay"], group["betas"]) == (0.1, (0.8, 0.99))
        assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}


def test_a_checkpoint_before_the_first_gradient_changes_no_step_after_it(
    folder: Path, tmp_path: Path
) -> None:
    """Neither for the run that goes on nor for one that is resumed from it."""
    with worker(folder) as made:
        unbroken = _continue(made)
    with worker(folder) as made:
        save(made, tmp_path / "step-0", {"version": 1})
        going_on = _continue(made)
    with worker(folder) as made:
        resumed = _LoadWork(tmp_path / "step-0")(made)
    for found in (going_on, resumed):
        for name, tensor in unbroken[1].items():
            assert (found[1][name] == tensor).all(), name


def test_only_the_rank_that_writes_the_model_brings_it_to_the_host(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others only take part in the gathering, tensor by tensor, on their devices."""
    brought: list[torch.Tensor] = []
    monkeypatch.setattr(checkpoint, "to_host", lambda t: brought.append(t) or t)
    with worker(folder) as made:
        for rank, copies in ((1, 0), (0, len(weights(made)))):
            monkeypatch.setattr(checkpoint.dist, "get_rank", lambda rank=rank: rank)
            made.take_checkpoint({})
            assert len(brought) == copies


def test_whole_tensors_stay_on_the_device_of_the_model() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(3, 5)
    policy: Any = SimpleNamespace(model=model, adapters=None)
    for _, tensor in fsdp.full_tensors(policy, torch.bfloat16):
        assert tensor.is_meta


def test_a_device_fills_pinned_memory_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pinned_stager(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waited.append(True))
    pinned: list[int] = []
    waited: list[bool] = []
    monkeypatch.setattr(
        "torch.cuda._pin_memory_utils.pin_memory", lambda _, nbytes: pinned.append(nbytes)
    )
    monkeypatch.setattr("torch.cuda._pin_memory_utils.unpin_memory", lambda _: None)
    stager = pinned_stager(torch.device("cuda", 0))
    assert stager is not None
    state = {"moments": torch.arange(64.0)}
    first = stager.stage(state)
    state["moments"] += 1
    second = stager.stage(state)
    assert pinned == [256]
    assert waited == [True, True]
    assert first["moments"].data_ptr() == second["moments"].data_ptr()  # type: ignore[index]
    assert torch.equal(second["moments"], state["moments"])  # type: ignore[index]
