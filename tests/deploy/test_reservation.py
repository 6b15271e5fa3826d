"""What a run asks of a cluster, and how a cluster that lacks it is described."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from common.config.load import load_config
from common.errors import UserError
from deploy.eval.settings import Options, evaluation_config
from deploy.placement import reservation
from deploy.placement.options import actor_options, plan_cores
from deploy.placement.reservation import Wish, fewest_generators, missing, wishes


def config(*overrides: str):
    return load_config([], ["model.path=x", "ray.address=auto", *overrides])


def asked(*overrides: str) -> dict[str, Wish]:
    made = config(*overrides)
    options = actor_options(made, plan_cores(made, [0, 1, 2, 3], []), cuda=True)
    return {wish.name: wish for wish in wishes(made, options)}


def test_every_generator_has_a_place_of_its_own_and_the_learner_one_for_all_ranks() -> None:
    found = asked(
        "generator.count=3",
        "generator.tensor_parallel=2",
        "generator.resources={A100: 2}",
        "learner.ranks=4",
        "learner.labels={gpu: h100}",
        "verifier.workers=5",
        "generator.threads=1",
        "learner.threads=2",
    )
    assert set(found) == {"learner", "verifiers", "generator-0", "generator-1", "generator-2"}
    assert found["generator-1"].bundle == {"CPU": 1, "GPU": 2, "A100": 2}
    assert found["learner"].bundle == {"CPU": 2, "GPU": 1}
    assert (found["learner"].count, found["learner"].strategy) == (4, "PACK")
    assert found["learner"].labels == {"gpu": "h100"}
    assert (found["verifiers"].count, found["verifiers"].strategy) == (5, "SPREAD")
    assert found["verifiers"].bundle == {"CPU": 0.5}


def test_environments_have_places_on_the_nodes_that_their_labels_name() -> None:
    pool = ("environment.name=guess", "environment.placement=actors", "environment.workers=3")
    found = asked(*pool, "environment.num_cpus=2", "environment.labels={kind: cpu}")
    place = found["environments"]
    assert (place.count, place.strategy, place.bundle) == (3, "SPREAD", {"CPU": 2})
    assert place.labels == {"kind": "cpu"}
    assert "environments" not in asked("environment.name=guess", "environment.workers=3")
    shared = asked(*pool, "weights.transport=ipc", "generator.max_staleness=0")
    assert set(shared) == {"learner", "verifiers", "environments"}


def test_on_shared_devices_a_rank_and_a_generator_have_one_place() -> None:
    keys = ("weights.transport=ipc", "generator.max_staleness=0")
    found = asked(*keys, "generator.count=4", "learner.ranks=4", "learner.resources={H100: 1}")
    assert set(found) == {"learner", "verifiers"}
    assert found["learner"].count == 4
    assert found["learner"].bundle["GPU"] == 1
    assert found["learner"].bundle["H100"] == 1
    with pytest.raises(UserError, match="generator.max_staleness=1 must be 0"):
        config("weights.transport=ipc")
    with pytest.raises(UserError, match="generator.count=1 must be learner.ranks=2"):
        config(*keys, "learner.ranks=2")


class Place:
    def wait(self, seconds: float) -> bool:
        return True


def test_an_evaluation_has_no_learner_to_keep_a_place_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reservation, "placement_group", lambda *_, **__: Place())
    overrides = ["generator.count=2", "ray.address=auto"]
    made = evaluation_config(Options(model="x", suites=[], overrides=overrides))
    options = actor_options(made, plan_cores(made, [0, 1], []), cuda=False)
    wanted = wishes(made, options)
    assert "learner" not in {wish.name for wish in wanted}
    places = reservation.Reservation(wanted)
    names = asyncio.run(places.wait(made, 1.0, print))
    assert names == ["generator-0", "generator-1"]


def test_what_is_missing_is_named() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8, "GPU": 4}, "Labels": {"gpu": "a100"}},
        {"Alive": False, "Resources": {"CPU": 8, "GPU": 8}, "Labels": {"gpu": "h100"}},
    ]
    wish = Wish("learner", {"CPU": 1, "GPU": 1}, 6, {"gpu": "h100"}, "PACK")
    text = missing([wish], nodes, {"CPU": 8.0, "GPU": 3.0}, 30)
    assert "the cluster of 1 node(s) has no room, after 30 s, for" in text
    assert "learner: 6 x (CPU 1, GPU 1) on nodes with gpu=h100" in text
    assert "GPU: 6 wanted, 3 free of 4" in text
    assert "CPU:" not in text
    assert "no node has the label gpu=h100" in text
    big = Wish("generator-0", {"GPU": 3}, 1, {}, "PACK")
    scattered = [{"Alive": True, "Resources": {"GPU": 2}}, {"Alive": True, "Resources": {"GPU": 2}}]
    assert "no node holds one of them at once" in missing([big], scattered, {"GPU": 4.0}, 1)


def test_a_run_may_start_with_fewer_generators_only_where_weights_can_follow() -> None:
    assert fewest_generators(config("generator.count=3")) == 3
    assert fewest_generators(config("generator.count=3", "generator.min_count=1")) == 1
    with pytest.raises(UserError, match="must be at most generator.count=2"):
        config("generator.count=2", "generator.min_count=3")
    with pytest.raises(UserError, match="are one collective"):
        config("generator.count=2", "generator.min_count=1", "weights.transport=nccl")


def test_names_of_resources_and_labels_are_free(tmp_path: Path) -> None:
    file = tmp_path / "pools.yaml"
    file.write_text("generator: {resources: {TPU-v9: 1}, labels: {zone: b}}\n")
    made = load_config([file], ["model.path=x"])
    assert made.generator.resources == {"TPU-v9": 1.0}
    assert made.generator.labels == {"zone": "b"}
