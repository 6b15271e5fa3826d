"""Which cores each part gets."""

from __future__ import annotations

import pytest

from common.config.load import load_config
from common.errors import UserError
from deploy.placement.options import CorePlan, actor_options, cpus_needed, plan_cores


def plan(cores: int, *overrides: str) -> CorePlan:
    return plan_cores(load_config([], ["model.path=x", *overrides]), list(range(cores)), [])


@pytest.mark.parametrize("cores", [4, 7, 16, 64])
def test_asynchronous_parts_get_disjoint_cores_and_all_are_used(cores: int) -> None:
    found = plan(cores, "generator.count=2", "learner.ranks=2")
    parts = [*found.generator_cores, *found.learner_cores]
    dealt = [core for part in parts for core in part or []]
    assert sorted(dealt) == list(range(cores))
    assert all(parts)


def test_no_part_of_an_uneven_deal_has_more_threads_than_cores() -> None:
    found = plan(7, "generator.count=2", "learner.ranks=3")
    assert sorted(len(part or []) for part in found.generator_cores) == [1, 2]
    assert (found.generator_threads, found.learner_threads) == (1, 1)


def test_small_machines_share_every_core_and_turns_need_no_division() -> None:
    for found in (plan(2), plan(8, "generator.max_staleness=0")):
        assert found.generator_cores == found.learner_cores
        assert found.generator_threads == found.learner_threads == len(found.learner_cores[0] or [])


def test_a_split_can_be_forced_and_is_refused_where_it_cannot_be() -> None:
    found = plan(2, "placement.cores=split")
    assert (found.generator_cores, found.learner_cores) == ([[0]], [[1]])
    assert plan(8, "placement.cores=shared").learner_threads == 8
    with pytest.raises(UserError, match="1 generator.s. and 2 learner"):
        plan(2, "placement.cores=split", "learner.ranks=2")


def test_no_part_of_a_split_is_left_without_a_core() -> None:
    found = plan(6, "generator.count=1", "learner.ranks=4")
    assert [len(cores or []) for cores in found.generator_cores] == [2]
    assert all(found.learner_cores)


def test_ranks_that_share_cores_share_their_threads_too() -> None:
    found = plan(2, "learner.ranks=2", "generator.max_staleness=0")
    assert found.learner_threads == 1
    assert found.generator_threads == 2
    assert plan(1, "learner.ranks=3").learner_threads == 1


def test_a_cluster_of_our_own_has_room_for_every_actor() -> None:
    config = load_config([], ["model.path=x", "generator.count=3", "learner.ranks=4"])
    cores = plan_cores(config, [0, 1], [])
    options = actor_options(config, cores, cuda=False)
    asked = 3 * float(str(options.generator["num_cpus"])) + 4 * float(
        str(options.learner["num_cpus"])
    )
    assert cpus_needed(config, cores) >= asked + 1
    assert options.generator["num_gpus"] == 0


def test_threads_of_a_cluster_do_not_follow_from_the_cores_of_the_driver() -> None:
    keys = ["model.path=x", "ray.address=auto", "generator.count=2", "learner.threads=7"]
    plan = plan_cores(load_config([], keys), list(range(64)), [])
    assert plan.generator_cores == [None, None]
    assert (plan.generator_threads, plan.learner_threads) == (4, 7)
