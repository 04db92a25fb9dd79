"""The simulated run against the closed form; seeded; with kills and joins."""

import dataclasses
from statistics import mean

import pytest

from raytrain_brats import config
from raytrain_brats.planning import closed_form, demand, prices, rates, simulation
from raytrain_brats.planning.demand import Demand, Fleet


def asked(
    train: str, nodes: int, data_nodes: int, cases: int, route: str, k: int = 4, batch: int = 0, spot: bool = False
) -> tuple[Demand, Fleet]:
    m = prices.machine
    fleet = Fleet(m(train), nodes, m("m6i.4xlarge"), data_nodes, m("m6i.2xlarge"), spot)
    changes = (f"train.global_batch={batch or max(16, fleet.gpus)}", f"data.patches_per_case={k}")
    return demand.demand(config.load("segresnet", changes), "segresnet", cases, fleet, rates.load(), route), fleet


@pytest.mark.parametrize(
    "run",
    [
        ("p5.4xlarge", 1, 0, 48_884, "raw", 1),  # data tasks limit
        ("p5.4xlarge", 1, 0, 48_884, "store", 4),
        ("p4d.24xlarge", 1, 0, 48_884, "raw", 1),  # data tasks and GPUs are level
        ("p4d.24xlarge", 2, 4, 48_884, "store", 4),
        ("p4d.24xlarge", 4, 0, 48_884, "store", 1),  # the coordinator limits
        ("p3dn.24xlarge", 1, 0, 484, "raw", 4),  # cases stay
        ("p4d.24xlarge", 64, 0, 484, "raw", 8),
    ],
)
def test_it_agrees_with_the_closed_form(run: tuple[str, int, int, int, str, int]) -> None:
    """Pace and time within a tenth, from 1 to 512 GPUs, whatever limits."""
    d, fleet = asked(*run)
    plan = closed_form.plan(d, fleet)
    first, wait = simulation.pace(d, True, 0, rows=4096)
    assert first == pytest.approx(plan.first_samples_per_s, rel=0.1)
    assert wait == pytest.approx(1 - plan.first_samples_per_s * d.step_s / d.global_batch, abs=0.1)
    assert simulation.run(d, first, plan.samples_per_s, 0)[0] == pytest.approx(plan.on_demand_s, rel=0.1)


def test_scarce_room_holds_tasks_back_and_loses_nothing() -> None:
    """With an object store of two rows a rank, tasks wait for the ranks: slower, and every row arrives all the same."""
    d, _ = asked("p4d.24xlarge", 1, 0, 48_884, "raw", 1)
    scarce = dataclasses.replace(d, store_mb=1.0)
    assert simulation.pace(scarce, True, 0, 2_000)[0] < 0.9 * simulation.pace(d, True, 0, 2_000)[0]


def test_a_seed_is_a_run() -> None:
    """The same seed, the same figures; another, others: of tasks as of kills."""
    d, _ = asked("p5.4xlarge", 1, 0, 48_884, "raw", 1, spot=True)
    assert (
        simulation.pace(d, True, 3, 1_000) == simulation.pace(d, True, 3, 1_000) != simulation.pace(d, True, 4, 1_000)
    )
    assert simulation.run(d, 30, 30, 3) == simulation.run(d, 30, 30, 3) != simulation.run(d, 30, 30, 4)


def test_kills_cost_what_the_closed_form_says() -> None:
    """A rough spot market, one interruption a node and hour: the mean of many runs within 3 % of Daly's time."""
    d, fleet = asked("p4d.24xlarge", 4, 0, 48_884, "store", spot=True)
    d = dataclasses.replace(d, interruptions_per_s=1 / 3600)
    plan = closed_form.plan(d, fleet)
    runs = [simulation.run(d, plan.samples_per_s, plan.samples_per_s, seed) for seed in range(60)]
    assert mean(seconds for seconds, _ in runs) == pytest.approx(plan.spot_s, rel=0.03)
    assert mean(kills for _, kills in runs) == pytest.approx(plan.interruptions, rel=0.2)


def test_a_lone_node_that_is_killed_stops_the_run_until_another_comes() -> None:
    d, _ = asked("p4d.24xlarge", 1, 0, 484, "store", spot=True)
    calm, _ = simulation.run(dataclasses.replace(d, interruptions_per_s=0.0), 170, 170, 0)
    rough = dataclasses.replace(d, interruptions_per_s=1 / 600)
    seconds, kills = next(found for seed in range(50) if (found := simulation.run(rough, 170, 170, seed))[1] == 1)
    assert kills == 1 and seconds >= calm + d.replacement_s


def test_kills_that_are_given_come_then() -> None:
    """Each costs its recovery and the steps since the last checkpoint, and nothing is drawn beside them."""
    d, _ = asked("p4d.24xlarge", 1, 0, 484, "store")
    d = dataclasses.replace(
        d, samples=10_000, epoch_samples=10_000, start_s=0.0, prepare_s=0.0, validation_s=0.0, join_s=0.0,
        recover_s=7.0, checkpoint_s=10.0, checkpoint_stall_s=0.0, replacement_s=0.0,
    )  # fmt: skip
    assert simulation.run(d, 100, 100, 0)[0] == pytest.approx(100)
    seconds, kills = simulation.run(d, 100, 100, 0, (43.0, 12.0))
    assert kills == 2 and seconds == pytest.approx(100 + 2 * 7 + 2 + 4)  # 12 - 10; saved at 29 and 39, so 43 - 39


def test_processes_that_are_always_there_slow_steps_on_cpus_down() -> None:
    """A fifth of one of two CPUs: up to a tenth of the pace where steps and cases need both."""
    d, _ = asked("p5.4xlarge", 1, 0, 48_884, "store")
    d = dataclasses.replace(d, ranks=2, global_batch=4, cpus=2.0, compute_s=0.2, step_cpu_s=0.1, case_cpu_s=0.05)
    calm, busy = (simulation.pace(dataclasses.replace(d, other_cpus=o), True, 0, 2_000)[0] for o in (0.0, 0.2))
    assert 0.88 * calm < busy < 0.97 * calm
    assert closed_form.limits(dataclasses.replace(d, other_cpus=0.2))["processors"] == pytest.approx(
        0.9 * closed_form.limits(d)["processors"], rel=0.02
    )
