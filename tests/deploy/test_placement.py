"""Which cores each part gets."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest

from common.config.load import load_config
from common.errors import UserError
from deploy.placement.options import (
    CorePlan,
    actor_options,
    cpus_needed,
    environment_actors,
    plan_cores,
)


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
    pool = ("environment.name=guess", "environment.workers=3", "environment.num_cpus=1.5")
    beside = load_config([], ["model.path=x", *pool])
    apart = load_config([], ["model.path=x", *pool, "environment.placement=actors"])
    assert environment_actors(beside) == 0
    assert environment_actors(apart) == 3
    few = CorePlan([[0]], 1, [[0]], 1, "")
    many = replace(few, generator_threads=500)  # more than this machine has
    assert cpus_needed(apart, many) - cpus_needed(beside, many) == 5


def test_threads_of_a_cluster_do_not_follow_from_the_cores_of_the_driver() -> None:
    keys = ["model.path=x", "ray.address=auto", "generator.count=2", "learner.threads=7"]
    plan = plan_cores(load_config([], keys), list(range(64)), [])
    assert plan.generator_cores == [None, None]
    assert (plan.generator_threads, plan.learner_threads) == (4, 7)


def environments(*overrides: str, cuda: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Environment variables of a generator and of a learner rank."""
    config = load_config([], ["model.path=x", *overrides])
    options = actor_options(config, plan_cores(config, [0, 1], []), cuda)
    of_generator, of_learner = (
        cast("dict[str, dict[str, str]]", each["runtime_env"])["env_vars"]
        for each in (options.generator, options.learner)
    )
    return of_generator, of_learner


def test_a_run_on_the_cpu_sees_no_device_that_ray_does_not_count() -> None:
    for found in environments("learner.device=cpu", cuda=False):
        assert found["CUDA_VISIBLE_DEVICES"] == ""
    for found in environments(cuda=True):
        assert "CUDA_VISIBLE_DEVICES" not in found  # Ray sets it


SHARED = ("weights.transport=ipc", "generator.max_staleness=0")


def test_pickle_is_let_into_vllms_engine_for_ipc_alone() -> None:
    name = "VLLM_ALLOW_INSECURE_SERIALIZATION"
    assert environments(*SHARED, cuda=True)[0][name] == "1"
    for transport in ("nccl", "object_store"):
        assert name not in environments(f"weights.transport={transport}", cuda=True)[0]


def test_the_learners_memory_grows_in_segments_unless_it_is_shared_by_handles() -> None:
    assert environments(cuda=True)[1]["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in environments(*SHARED, cuda=True)[1]


def test_a_named_interface_is_that_of_gloo_and_nccl_on_both_sides() -> None:
    for found in environments("ray.interface=ib0", cuda=True):
        assert (found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"]) == ("ib0", "ib0")
    for found in environments(cuda=True):
        assert "NCCL_SOCKET_IFNAME" not in found  # else NCCL would not look for InfiniBand


def test_what_tunes_a_cpu_is_set_on_a_cpu_alone() -> None:
    names = {"OMP_WAIT_POLICY", "VLLM_CPU_OMP_THREADS_BIND", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"}
    of_cpu, of_cuda = environments(cuda=False), environments(cuda=True)
    assert names <= of_cpu[0].keys() | of_cpu[1].keys()
    assert not names & (of_cuda[0].keys() | of_cuda[1].keys())
