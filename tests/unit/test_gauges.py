"""What Prometheus is told, and that the Grafana dashboard asks for nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util.metrics import Gauge

from raytrain_brats import books
from raytrain_brats.errors import UserError
from raytrain_brats.monitoring import cost, run_gauges
from raytrain_brats.run import gauges
from tests.support.dashboard import DASHBOARD, GRAFANA, asked, expressions

Told = dict[tuple[str, ...], float]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """{(name, tag values ...): value} as set last."""
    found: Told = {}

    def note(gauge: Gauge, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(gauge.info["tag_keys"])
        found[(gauge.info["name"].removeprefix("raytrain_brats_"), *tags.values())] = value

    monkeypatch.setattr(Gauge, "set", note)
    return found


def test_steps_are_told_as_means_of_the_last_ones(told: Told) -> None:
    """A loss that is not finite leaves the one before."""
    rank = gauges.StepGauges("run")
    rank.set_step(8, 8, 2, 9.0, 100.0, 200.0)
    for number in range(gauges._STEPS):
        rank.set_step(8, 16 + 8 * number, 2, 0.5 if number < 5 else None, 0.5, 2.0)
    assert told == {
        ("samples_per_s", "run"): 4.0,
        ("data_wait_share", "run"): 0.25,
        ("step_s", "run"): 2.0,
        ("loss", "run"): 0.5,
        ("world_size", "run"): 2,
        ("samples_seen", "run"): 168,
    }


@pytest.mark.parametrize("folder", ["/data/Lauf ü/训练", "/data/r\udcfcn", "/data/100% (a&b)"])
def test_any_run_folder_can_be_a_tag(folder: str) -> None:
    """Ray's own gauge takes it; it takes ASCII alone. Different folders stay different."""
    made = gauges.Gauges(folder)
    made.set("loss", 1.0)
    assert made._tags["run"].isascii() and made._tags != gauges.Gauges(folder + "ä")._tags
    assert gauges.Gauges("/data/100% (a&b)")._tags["run"] == "/data/100% (a&b)"


def test_the_books_are_told_as_they_stand(told: Told) -> None:
    """Counts over all launches; the last recovery and the last scores; a case is counted once."""
    events: list[dict[str, Any]] = [
        {"event": "launch", "time": 1.0},
        {"event": "recovered", "time": 9.0, "generation": 1, "world_size": 1, "total_s": 8.0},
        {"event": "quarantine", "time": 10.0, "case": "a"},
        {"event": "quarantine", "time": 10.0, "case": "a"},
        {"event": "validation", "time": 11.0, "dice": {"WT": 0.1, "TC": 0.1, "ET": 0.1}},
        {"event": "resize", "time": 12.0},
        {"event": "checkpoint", "time": 12.5, "stall": {"data_wait": 0.25}},
        {"event": "recovered", "time": 15.0, "generation": 2, "world_size": 2, "total_s": 3.0},
        {"event": "validation", "time": 16.0, "dice": {"WT": 0.9, "TC": 0.8, "ET": None}},
    ]
    run_gauges.set_run(gauges.Gauges("run"), [], [], 100)
    assert told == {("samples_total", "run"): 100, **{(n, "run"): 0 for n in ("resizes", "recoveries", "quarantined")}}
    run_gauges.set_run(gauges.Gauges("run"), events, [], 100)
    assert told[("resizes", "run")] == told[("quarantined", "run")] == 1
    assert (told[("recoveries", "run")], told[("recovery_s", "run")]) == (2, 3.0)
    assert {key[2]: value for key, value in told.items() if key[0] == "stall_share"} == {"data_wait": 0.25}
    assert {key[2]: value for key, value in told.items() if key[0] == "dice"} == {"WT": 0.9, "TC": 0.8}


@pytest.mark.parametrize(
    ("given", "dollars"),
    [("", None), ("12.5", 12.5), ("data=0.5,train=20", 41.0), ("3, train=20", 43.0), ("gpu=4", 0.0)],
)
def test_what_the_nodes_cost(monkeypatch: pytest.MonkeyPatch, given: str, dollars: float | None) -> None:
    """By role, each node that is up; or the cluster as a whole."""
    monkeypatch.setenv(cost.PRICES, given)
    nodes = [{"Labels": {"role": role} if role else None} for role in ("head", "data", "data", "train", "train", "")]
    assert cost.dollars_per_hour(cost.prices(), nodes) == dollars


@pytest.mark.parametrize("given", ["cheap", "train=", "train=-1", "inf", "data=1;train=2"])
def test_prices_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(cost.PRICES, given)
    with pytest.raises(UserError, match=re.escape(f"{cost.PRICES}={given}")):
        cost.prices()


def test_the_dashboard_shows_all_we_export_and_asks_for_nothing_else() -> None:
    """Query by query; the variable that chooses the run as well."""
    assert asked() == {f"ray_raytrain_brats_{name}" for name in gauges.NAMES}
    (chosen,) = DASHBOARD["templating"]["list"][1:]
    assert re.findall(r"ray_\w+", chosen["query"]) == ["ray_raytrain_brats_samples_total"]
    for text in expressions():
        for selector in re.findall(r"\bray_\w+(\{[^}]*\})?", text):
            assert selector == '{run=~"$run"}', text
        assert text.count("(") == text.count(")")


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    """Panels have names and places of their own; every one asks the data source that the page chooses."""
    assert DASHBOARD["uid"] and DASHBOARD["title"]
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(taken)) == len(taken) and max(x for x, _ in taken) < 24
    assert all(panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for panel in panels)


def test_provisioning_names_the_dashboards_beside_rays_own() -> None:
    """Grafana reads one folder: it names both sets of dashboards, and Prometheus as Ray's own file does."""
    provided = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "dashboards.yaml").read_text())["providers"]
    assert [p["options"]["path"] for p in provided] == [
        "/tmp/ray/session_latest/metrics/grafana/dashboards",
        "$RAYTRAIN_BRATS_GRAFANA/dashboards",
    ]
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["name"], source["isDefault"]) == ("prometheus", "Prometheus", True)


def test_what_a_run_has_cost_so_far_is_kept_over_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each second at the rate found before it; the sum stands in the events, once a minute and at the end."""
    now = [1000.0]
    monkeypatch.setattr(cost.time, "monotonic", lambda: now[0])
    run_dir, nodes = str(tmp_path), [{"Labels": {"role": "train"}}]
    for launch in range(2):
        spent = cost.Cost(run_dir, {"train": 36.0})
        for up in (nodes, nodes * 2, nodes * 2):  # a minute with one node, a minute with two
            spent.update(up, books.read_events(run_dir))
            now[0] += 61
        assert spent.rate == 72.0
        assert spent.total == pytest.approx((launch + 1) * (0.61 + 1.22) + launch * 1.22)
        spent.update(nodes * 2, books.read_events(run_dir))
        spent.record()
    noted = [e["dollars"] for e in books.read_events(run_dir) if e["event"] == "cost"]
    assert sum(noted) == pytest.approx(2 * (0.61 + 2 * 1.22), abs=1e-4)
    assert len(noted) == 6
