"""`plan`: the closed form against hand-made figures, its limits, its search, its files, and bad input."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrain_brats import config, plan
from raytrain_brats.data import stream, turns
from raytrain_brats.errors import UserError
from raytrain_brats.planning import closed_form, demand, prices, rates, search
from raytrain_brats.planning.closed_form import Plan
from raytrain_brats.planning.demand import Demand, Fleet
from raytrain_brats.run import cadence, feed
from tests.support import ROOT


def fleet(train: str = "p4d.24xlarge", nodes: int = 2, data_nodes: int = 4, spot: bool = False) -> Fleet:
    m = prices.machine
    return Fleet(m(train), nodes, m("m6i.4xlarge"), data_nodes, m("m6i.2xlarge"), spot)


def asked(cases: int, machines: Fleet, route: str = "store", *changes: str, own: tuple[str, ...] = ()) -> Demand:
    return demand.demand(config.load("segresnet", changes), "segresnet", cases, machines, rates.load(own), route)


def planned(cases: int, machines: Fleet, route: str = "store", *changes: str) -> Plan:
    return closed_form.plan(asked(cases, machines, route, *changes), machines)


def test_the_numbers_are_those_of_the_code_that_runs() -> None:
    """This room imports none of it, so what it repeats is compared here."""
    assert (demand.GROUP_RANKS, demand.SEGMENT_TASKS, demand.ROW_CASES) == (
        stream.GROUP_RANKS, turns.SEGMENT_TASKS, turns.ROW_CASES,
    )  # fmt: skip
    assert turns.TASK_CASES[0] == demand.TASK_CASES
    assert (demand.DEVICE_SHARE, 2 * demand.HOST_SHARE, demand.RARER) == (
        feed.DEVICE_SHARE, feed.HOST_SHARE, cadence.RARER,
    )  # fmt: skip


def test_each_rate_says_where_it_is_from() -> None:
    """Value, unit, kind, source, machine and date; a source of this repository is there."""
    for name, rate in rates.load().items():
        assert rate.kind in rates.KINDS and rate.unit and rate.machine and rate.date.startswith("20"), name
        for word in rate.source.replace(":", " ").replace(")", " ").replace("(", " ").split():
            assert not word.startswith("docs/") or (ROOT / word).exists(), f"{name}: {word}"


def test_a_run_that_gpus_limit() -> None:
    """Sixteen A100, one sample each: the step's rate by hand; no waiting; the time is that of the steps and stalls."""
    found = planned(48_884, fleet())
    step = 1 / 22.7 / 0.979 + 0.002 + 2 * 0.5 * 75.2 / (0.5 * 125 * 400)
    assert found.samples_per_s == pytest.approx(16 / step)
    assert (found.bottleneck, found.data_wait) == ("GPU step", 0)
    steps = 39_108 * 4 * 75 / found.samples_per_s
    assert found.on_demand_s == pytest.approx(steps, rel=0.05) and found.on_demand_s > steps
    hourly = 2 * 21.957642 + 4 * 0.768 + 0.384
    assert found.on_demand_usd == pytest.approx(hourly * found.on_demand_s / 3600)


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"cpus": 4.0}, "data tasks"),
        ({"gets_per_s": 10.0}, "S3 requests"),
        ({"deal_s": 0.1}, "coordinator"),
        ({"train_node_mb_s": 100.0}, "network of a training node"),
        ({"task_node_mb_s": 100.0}, "network of the data tasks"),
        ({"reduce_s": 1.0}, "all-reduce"),
        ({"step_cpu_s": 1.0}, "processors"),
    ],
)
def test_what_is_scarce_is_named(change: dict[str, Any], limit: str) -> None:
    """Each resource, made scarce, is the bottleneck, has a remedy, and makes steps wait unless it is part of them."""
    machines = fleet()
    scarce = dataclasses.replace(asked(48_884, machines), **change)
    found = closed_form.plan(scarce, machines)
    assert found.bottleneck == limit and closed_form.REMEDIES[limit]
    assert (found.data_wait > 0.1) == (limit != "all-reduce")
    assert found.samples_per_s == pytest.approx(min(found.limits.values()))


def test_cases_stay_where_there_is_room() -> None:
    """484 cases stay in a p4d's memory and on an H100; 48,884 do not; then only the first epoch is limited by data."""
    assert asked(484, fleet()).residency == "host"
    assert asked(484, fleet("p5.4xlarge")).residency == "device"
    assert asked(48_884, fleet()).residency == "stream"
    assert asked(484, fleet(), "raw", "data.residency=stream").residency == "stream"
    found = planned(484, fleet("p5.48xlarge", 1), "raw", "train.global_batch=8")
    assert found.first_samples_per_s < found.samples_per_s and found.bottleneck == "GPU step"


def test_gpus_beyond_the_batch_idle() -> None:
    """A step has no more ranks than samples; an uneven batch takes as long as its fullest rank."""
    assert asked(484, fleet(nodes=4)).ranks == 16
    even, uneven = (asked(484, fleet(nodes=1), "store", f"train.global_batch={n}").compute_s for n in (16, 17))
    assert uneven == pytest.approx(1.5 * even, rel=0.05)


def test_spot_costs_time_by_daly() -> None:
    """Interruptions, half a checkpoint interval each, recovery: near one minus these; none on demand."""
    machines = fleet(nodes=8, spot=True)
    found = planned(48_884, machines, "store", "train.global_batch=64")
    d, rate = found.demand, 8 * 0.1 / 3600
    first_order = 1 - rate * (d.checkpoint_s / 2 + d.recover_s + d.join_s)
    assert found.goodput == pytest.approx(first_order, abs=0.001) and found.goodput < 1
    assert found.best_interval_s == pytest.approx(math.sqrt(2 * 0.003 / rate))
    assert found.spot_s > found.on_demand_s
    assert found.spot_usd and found.spot_usd[0] < found.spot_usd[1] < (found.on_demand_usd or 0)
    assert planned(48_884, fleet()).goodput == 1


def test_a_deadline_takes_the_cheapest_and_a_budget_the_fastest() -> None:
    """Of all that are looked at, by brute force; the runner-up has other training nodes; none: how near one comes."""
    kinds = [prices.machine(name) for name in ("p3dn.24xlarge", "p4d.24xlarge")]
    every = search.fleets(kinds, prices.machine("m6i.4xlarge"), prices.machine("m6i.2xlarge"), False, 16)
    plans = [planned(48_884, each) for each in every]

    def plan_of(each: Fleet) -> Plan:
        return plans[every.index(each)]

    best, second = search.best(every, plan_of, 25, None)
    assert best.usd == min(p.usd or 0 for p in plans if p.seconds <= 25 * 3600) and best.seconds <= 25 * 3600
    assert second and (second.fleet.train, second.fleet.nodes) != (best.fleet.train, best.fleet.nodes)
    best, _ = search.best(every, plan_of, None, 450)
    assert best.seconds == min(p.seconds for p in plans if (p.usd or 0) <= 450)
    with pytest.raises(UserError, match=r"no plan meets --deadline 1; the fastest takes 10\.\d hours: 2 x p4d"):
        search.best(every, plan_of, 1, None)


@pytest.fixture(autouse=True)
def _no_recipe_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYTRAIN_BRATS_RECIPE", raising=False)


def command(*words: str) -> int:
    return plan.main(list(words))


def test_the_command_tells_the_plan_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table with rates and their kinds, JSON, picture; the same again replaces its own files, another request none."""
    out, chart = str(tmp_path / "plan.json"), str(tmp_path / "plan.png")
    words = ["--cases", "484", "--gpus", "p4d.24xlarge:1", "--spot", "--json", out, "--picture", chart]
    assert command(*words) == command(*words) == 0
    told = capsys.readouterr().out
    assert "limited by" in told and "GPU step" in told and "quoted" in told and "2026-01" in told
    found = json.loads(Path(out).read_text())
    assert found["plan"]["bottleneck"] == "GPU step" and found["rates"]["step.A100.segresnet"]["kind"] == "derived"
    assert Path(chart).read_bytes().startswith(b"\x89PNG")
    assert command("--cases", "100", "--json", out) == 2
    Path(chart).write_bytes(b"\x89PNG of another")
    assert command(*words) == 2
    assert "plan.png" in capsys.readouterr().err


def test_the_cluster_files_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--cases", "484", "--cluster", str(ROOT / "cluster/p3.yaml")) == 0
    assert "2 x p3dn.24xlarge (16 x V100), 4 x m6i.4xlarge, head m6i.2xlarge" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpus p4.24xlarge:2", "did you mean p4d.24xlarge or"),
        ("--gpus p4d.24xlarge:two", "KIND:NODES, such as p4d.24xlarge:2"),
        ("--gpus m6i.4xlarge:2", "m6i.4xlarge has no GPU"),
        ("--gpus g5.xlarge:2", "no rate of segresnet's step on A10G; did you mean A100"),
        ("--recipe demo", "of none of the recipes that rates are known of (dynunet, segresnet)"),
        ("--gpus p5.48xlarge --spot --deadline 9", "none of these machines has a price"),
        ("--budget 1", "no plan meets --budget 1; the cheapest is"),
        ("--deadline 1 --budget 1", "two questions"),
        ("--cluster none.yaml", "none.yaml"),
        ("--cluster docs/ec2.md", "docs/ec2.md"),
        ("--cases 1", "2 at least"),
        ("--picture plan.jpg", "ends in .png"),
        ("--set train.global_batch=none", "train.global_batch"),
    ],
)
def test_bad_input_is_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, what was wrong and the nearest names; nothing is written."""
    assert command("--cases", "484", *words.split()) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""


def bench_data(**changes: Any) -> dict[str, Any]:
    run = {"patches": 100, "cpu_s": {"ReadCases": 1.0, "IDLE": 0.5, "raylet": 0.5, "RayTrainWorker": 9.0}}
    settings = {"patch": 128, "grid": 240, "patches_per_case": 4} | changes
    about = {"made_by": "scripts/bench data", "date": "2026-12-01", "machine": {"cpu": "Mine"}, "settings": settings}
    return about | {"pipelines": {"store": {"runs": [run]}, "monai_dataset": {"runs": [run]}}}


def bench_step(recipe: str = "segresnet", edge: int = 128) -> dict[str, Any]:
    row = {"recipe": recipe, "batch": 1, "loop": "ours", "fed": {"img_per_s": 40.0}}
    about = {"made_by": "scripts/bench step", "date": "2026-12-01", "card": "NVIDIA A100-SXM4-40GB"}
    return about | {
        "asked": {"edge": edge},
        "rows": [row, {"recipe": recipe, "batch": 2, "loop": "ours", "failed": "x"}],
    }


def test_own_rates_replace_ours(tmp_path: Path) -> None:
    """A YAML of numbers, and what scripts/bench data and step wrote: with the file as their source."""
    own, data, step = tmp_path / "own.yaml", tmp_path / "data.json", tmp_path / "step.json"
    own.write_text(yaml.safe_dump({"spot.interruptions": 0.5, "step.A10G.segresnet": {"value": 9, "kind": "quoted"}}))
    data.write_text(json.dumps(bench_data()))
    step.write_text(json.dumps(bench_step()))
    found = rates.load([str(own), str(data), str(step)])
    assert (found["spot.interruptions"].value, found["step.A10G.segresnet"].kind) == (0.5, "quoted")
    assert (found["data.store"].value, found["data.vcpu"].value) == (80.0, 1.0)
    assert found["step.A100.segresnet"].value == 40.0 and str(step) in found["step.A100.segresnet"].source
    assert found["data.raw"] == rates.load()["data.raw"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("spot.interuptions: 1", "spot.interuptions is not known; did you mean spot.interruptions"),
        ("spot.interruptions: often", "give a number"),
        ("spot.interruptions: -1", "a number from 0"),
        ("- 1", "write lines such as"),
        ("a: [", "cannot be read"),
        (json.dumps(bench_data(grid=60)), "not of full size"),
        (json.dumps(bench_step(edge=16)), "small network"),
        (json.dumps({"made_by": "scripts/bench stream"}), "nothing that a plan needs"),
        (json.dumps({"made_by": "scripts/bench data"}), "not as scripts/bench data writes it"),
    ],
)
def test_rates_that_are_none_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        rates.load([str(path)])


def test_rates_of_another_recipe_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A card that only another recipe was measured on: refused, and who was measured is named."""
    path = tmp_path / "step.json"
    path.write_text(json.dumps(bench_step("dynunet") | {"card": "NVIDIA L4"}))
    assert command("--cases", "484", "--gpus", "g6.xlarge:1", "--rates", str(path)) == 2
    assert "no rate of segresnet's step on L4" in capsys.readouterr().err
    assert command("--cases", "484", "--gpus", "g6.xlarge:1", "--rates", str(path), "--recipe", "dynunet") == 0


def test_a_clusters_dollars_follow_from_its_machines() -> None:
    """By role, of the one price file; none rather than a sum without an unknown machine; the docs tell the same."""
    types = yaml.safe_load((ROOT / "cluster/p4d.yaml").read_text())["available_node_types"]
    assert prices.by_role(types) == "head=0.384,data=0.768,train=21.958"
    types["train"]["node_config"]["InstanceType"] = "p9.large"
    assert prices.by_role(types) == ""
    page = (ROOT / "docs/ec2.md").read_text()
    for kind in ("p4d.24xlarge", "p3dn.24xlarge"):
        (row,) = [line for line in page.splitlines() if line.startswith("| `cluster/") and kind in line]
        assert f"| {prices.machine(kind).on_demand:.2f} (" in row


def test_the_example_of_the_docs_is_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/plan.md: the command typed there, row by row; rates or prices that change must change the page."""
    page = (ROOT / "docs/plan.md").read_text()
    assert command("--cases", "10000", "--deadline", "12", "--spot") == 0
    told = {
        cells[1].strip(): cells[2:4] for line in capsys.readouterr().out.splitlines() if (cells := line.split("│"))[1:]
    }
    shown = {cells[1].strip(): cells[2:4] for line in page.splitlines() if len(cells := line.split("|")) == 5}
    for name in ("nodes", "waiting for data", "in all, on spot", "USD on demand", "USD on spot", "next limit"):
        assert [cell.strip() for cell in told[name]] == [cell.strip() for cell in shown[name]], name


def test_settings_that_take_time_are_in_the_plan() -> None:
    """Mirrored or denser validations, more of them, checkpoints by samples; what has no rate is refused."""
    machines = fleet()
    plain = asked(48_884, machines)
    mirrored, dense = (asked(48_884, machines, "raw", f"validate.{s}") for s in ("mirror=true", "overlap=0.75"))
    score = plain.validation_s - (mirrored.validation_s - plain.validation_s) / 7
    assert dense.validation_s - score == pytest.approx(mirrored.validation_s - score)  # 8 views; 2^3 times the windows
    often = asked(48_884, machines, "raw", "validate.every_samples=10000")
    assert closed_form.plan(often, machines).validations == -(-often.samples // 10_000)
    saved = closed_form.plan(asked(48_884, machines, "raw", "checkpoint.every_samples=5000"), machines)
    assert saved.demand.checkpoint_s == pytest.approx(5000 / saved.samples_per_s)
    with pytest.raises(UserError, match="exact"):
        asked(48_884, machines, "raw", "train.reduction=exact")
