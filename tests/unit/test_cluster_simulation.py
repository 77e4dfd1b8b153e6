from dataclasses import replace

import pytest

from benchmarks.cluster_simulation import Cluster, Plan, knee, simulate

PLAN = Plan(num_segments=8, num_parameters=1e8, forward_flops=1e11, num_steps=100_000, checkpoint_every=10_000)
CLUSTER = Cluster(num_gpus=64)


def test_on_one_training_slot_the_time_is_the_work() -> None:
    cluster = replace(CLUSTER, num_gpus=8, seconds_per_job=0.0, stream_rate=1e30, store_rate=1e30, link_rate=1e30)
    found = simulate(PLAN, cluster)
    # Eight copies and a control of eight times their steps; four forward passes a step.
    flops = 16 * PLAN.num_steps * PLAN.batch_size * 4 * PLAN.forward_flops
    assert found.training_sec == pytest.approx(flops / (8 * cluster.rate))
    assert found.busy == pytest.approx(1.0)


def test_beyond_the_knee_more_gpus_train_no_faster() -> None:
    assert knee(PLAN) == 16
    at_8, at_16, at_64 = (simulate(PLAN, replace(CLUSTER, num_gpus=count)).training_sec for count in (8, 16, 64))
    assert at_8 == pytest.approx(2 * at_16, rel=0.01)
    assert at_64 == pytest.approx(at_16, rel=0.01)


def test_without_the_control_every_copy_has_gpus_of_its_own_until_there_are_none_left() -> None:
    plan = replace(PLAN, has_control=False)
    assert knee(plan) == 64
    at_32, at_64, at_128 = (simulate(plan, replace(CLUSTER, num_gpus=count)).training_sec for count in (32, 64, 128))
    assert at_32 == pytest.approx(2 * at_64, rel=0.01)
    assert at_128 == pytest.approx(at_64)


def test_what_does_not_fit_is_said() -> None:
    assert simulate(PLAN, CLUSTER).limits == ()
    limits = simulate(replace(PLAN, num_parameters=12e9, num_segments=128), CLUSTER).limits
    assert [word for word in ("288 GB of memory", "6.2 TB") if any(word in limit for limit in limits)] == [
        "288 GB of memory",
        "6.2 TB",
    ]
    assert "several machines" in simulate(replace(PLAN, num_processes=16), CLUSTER).limits[0]


def test_checkpoints_cost_a_share_of_the_time_that_grows_with_the_model() -> None:
    small, large = (simulate(replace(PLAN, num_parameters=p), CLUSTER).checkpoint_share for p in (1e8, 1e10))
    assert 0 < small < large < 1
