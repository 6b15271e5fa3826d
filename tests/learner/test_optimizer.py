"""Optimisers by name or path: the steps they make, what they keep, and how they come back."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import SHAPES, make_worker, on_ranks, untimed, weights, worker
from torch import nn

from common.config.load import load_config
from common.config.names import names_in
from common.config.sections import LearnerConfig, OptimizerConfig
from common.errors import UserError
from learner.training.optimizer import check_optimizer, make_optimizers, state_bytes
from learner.training.rank import LearnerRank

NAMES = names_in(typing.get_type_hints(OptimizerConfig, include_extras=True)["kind"])
MOMENTUM = {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}
KINDS = {
    "AdamW": OptimizerConfig(),
    "SGD with momentum": OptimizerConfig("SGD", dict(MOMENTUM)),
    "SGD": OptimizerConfig("SGD"),
    "Muon": OptimizerConfig("Muon"),
}


class Halving(torch.optim.Optimizer):
    """Half of SGD; it counts its steps in a Python number."""

    def __init__(self, params: Any, lr: float, share: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "share": share})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * group["share"] * p.grad)
                    self.state[p]["steps"] = self.state[p].get("steps", 0) + 1


def config(kind: str = "AdamW", args: dict[str, Any] | None = None, **changes) -> LearnerConfig:
    optimizer = OptimizerConfig(kind, args or {}, changes.pop("matrices_only", False))
    return LearnerConfig(optimizer=optimizer, learning_rate=1e-2, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen2")


def after(made: LearnerRank, steps: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
    metrics = [made.step(trajectories(SHAPES, seed=s), s, s) for s in range(steps)]
    return [untimed(m) for m in metrics], {n: t.numpy() for n, t in weights(made).items()}


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_steps_on_bitwise_as_the_run_would_have(
    folder: Path, tmp_path: Path, kind: str, steps: int
) -> None:
    """Also from a checkpoint before the first step, when no optimiser has a state yet."""
    target = tmp_path / "step"
    with worker(folder, optimizer=KINDS[kind]) as made:
        for s in range(steps):
            made.step(trajectories(SHAPES, seed=9 - s), s, s)
        made.take_checkpoint({})
        made.write_checkpoint(str(target))
        unbroken = after(made, 1)
    with worker(folder, optimizer=KINDS[kind]) as made:
        made.load_checkpoint(str(target))
        resumed = after(made, 1)
    assert resumed[0] == unbroken[0]
    for name, weight in unbroken[1].items():
        assert (resumed[1][name] == weight).all(), name


def test_a_checkpoint_before_the_first_step_changes_none(folder: Path, tmp_path: Path) -> None:
    """Dampened momentum and weight decay show a step of torch's own, were there one."""
    with worker(folder, optimizer=KINDS["SGD with momentum"]) as made:
        unbroken = after(made, 2)
    with worker(folder, optimizer=KINDS["SGD with momentum"]) as made:
        made.take_checkpoint({})
        made.write_checkpoint(str(tmp_path / "step-0"))
        watched = after(made, 2)
    assert watched[0] == unbroken[0]


def test_another_optimiser_does_not_go_on_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    with worker(folder) as made:
        made.take_checkpoint({})
        made.write_checkpoint(str(tmp_path / "step"))
    with (
        worker(folder, optimizer=OptimizerConfig("Muon")) as made,
        pytest.raises(UserError, match=r"with AdamW, and .* with Muon and AdamW.*model.path="),
    ):
        made.load_checkpoint(str(tmp_path / "step"))


class _Train:
    def __call__(self, made: LearnerRank) -> Any:
        return after(made, 2)


def _target(rank: int, ranks: int, folder: Path, kind: str) -> tuple:
    return make_worker(folder, rank, ranks, optimizer=KINDS[kind]), _Train()


@pytest.mark.parametrize("kind", ["Muon", "SGD with momentum"])
def test_two_ranks_step_as_one_does(folder: Path, kind: str) -> None:
    """Muon needs whole matrices, of which a rank has a part."""
    with worker(folder, optimizer=KINDS[kind]) as made:
        alone = after(made, 2)
    two = on_ranks(2, _target, folder, kind)
    assert two[0][0][1]["grad_norm"] == pytest.approx(alone[0][1]["grad_norm"], rel=1e-3)
    for name, weight in alone[1].items():
        assert abs(two[0][1][name] - weight).max() < 1e-4, name


def test_every_name_is_one_of_torch_and_steps_on_sharded_parameters(folder: Path) -> None:
    with worker(folder) as made:
        trainer = made.trainer
        for kind in NAMES:
            check_optimizer(config(kind))
            trainer.optimizers = make_optimizers(
                config(kind), trainer.policy.model, trainer.policy.layers
            )
            start = {n: t.clone() for n, t in weights(made).items()}
            assert made.step(trajectories(SHAPES), 0, 0)["steps/skipped"] == 0
            moved = [n for n, t in weights(made).items() if not torch.equal(t, start[n])]
            assert len(moved) >= len(start) - 1, kind


def test_sgd_makes_the_step_of_sgd() -> None:
    layer = nn.Linear(3, 2)
    (optimizer,) = make_optimizers(config("SGD"), layer, [])
    before = layer.weight.detach().clone()
    layer.weight.grad, layer.bias.grad = torch.ones(2, 3), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before - 1e-2)


def test_adamw_is_fused_with_the_settings_of_the_learner() -> None:
    changes = {"betas": (0.8, 0.9), "weight_decay": 0.3}
    (optimizer,) = make_optimizers(config(**changes), nn.Linear(2, 2), [])
    (group,) = optimizer.param_groups
    assert group["fused"] and (group["betas"], group["weight_decay"]) == ((0.8, 0.9), 0.3)
    (plain,) = make_optimizers(config("AdamW", {"fused": False}), nn.Linear(2, 2), [])
    assert not plain.param_groups[0]["fused"]


@pytest.mark.parametrize("chosen", [("Muon", False), ("SGD", True)])
def test_matrices_of_layers_and_the_rest_are_shared(chosen: tuple[str, bool]) -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "layer": layer})
    made = make_optimizers(
        config(chosen[0], matrices_only=chosen[1], betas=(0.5, 0.5)), model, [layer]
    )
    assert [type(each).__name__ for each in made] == [chosen[0], "AdamW"]
    (first,), (second,) = (each.param_groups for each in made)
    assert [p.shape for p in first["params"]] == [(4, 4)]
    assert len(second["params"]) == 4  # embeddings, a bias, a norm
    assert second["betas"] == (0.5, 0.5)


def test_what_an_optimiser_keeps_is_counted() -> None:
    """Bytes a parameter in float32: two moments, one, none; Adafactor's are rows and columns."""
    assert state_bytes(config()) == 8
    assert state_bytes(config("AdamW", {"amsgrad": True})) == 12
    assert state_bytes(config("SGD", {"momentum": 0.9})) == 4
    assert state_bytes(config("SGD")) == 0
    assert state_bytes(config("Muon")) == 8  # AdamW's share
    assert 0 < state_bytes(config("torch.optim:Adafactor")) < 0.1


def test_an_optimiser_of_ones_own(folder: Path, tmp_path: Path) -> None:
    mine = OptimizerConfig(f"{__name__}:Halving", {"share": 0.25})
    check_optimizer(LearnerConfig(optimizer=mine))
    assert state_bytes(LearnerConfig(optimizer=mine)) == 0
    with worker(folder, optimizer=OptimizerConfig("SGD"), learning_rate=1e-4) as made:
        expected = after(made, 1)
    with worker(folder, optimizer=mine, learning_rate=4e-4) as made:
        found = after(made, 1)
    for name, weight in expected[1].items():
        assert abs(found[1][name] - weight).max() < 1e-6, name


def none_at_all(params: Any, lr: float) -> object:
    return lr


class WithoutRate(Halving):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            del group["lr"]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        pass


class Exploding(Halving):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.fill_(float("inf"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (config("SGD", {"momentun": 0.9}), r"SGD with args=.* raised TypeError: .*momentun"),
        (config("SGD", {"momentum": -1}), "raised ValueError: Invalid momentum"),
        (config("SGD", {"lr": 0.1}), "args has an lr: set learner.learning_rate"),
        (config("AdamW", {"betas": [0.9, 0.99]}), "args has betas: set learner.betas"),
        (config("SGD", weight_decay=0.1), "learner.weight_decay is AdamW's: for .*kind=SGD put"),
        (config("Adam", betas=(0.5, 0.5)), "learner.betas is AdamW's"),
        (config("no_such_module:Lion"), "cannot be imported"),
        (config(f"{__name__}:none_at_all"), "made a float: name a torch.optim.Optimizer"),
        (config(f"{__name__}:WithoutRate"), "keeps no lr in its param_groups"),
        (config(f"{__name__}:Exploding"), "makes steps that are not finite"),
        (config("torch.optim:LBFGS"), "raised TypeError: .*closure"),
        (config("torch.optim:Muon"), "raised ValueError: .*2D"),
    ],
)
def test_what_cannot_step_is_refused(changed: LearnerConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_optimizer(changed)


def test_torch_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"learner.optimizer.kind=Muon: torch .* does not have it"):
        check_optimizer(config("Muon"))


def test_a_misspelt_optimiser_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"kind=adamw is not known .did you mean AdamW"):
        load_config([], ["model.path=x", "learner.optimizer.kind=adamw"])
