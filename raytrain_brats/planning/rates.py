"""What everything takes: the figures of `rates.yaml`, and the user's own in their place. Runs in the driver.

In: `rates.yaml`; files of the same form, or what `scripts/bench data` and `scripts/bench step` write by --json.
Out: `Rates` by name, each with its unit, kind, source, machine and date; UserError for a file that is none.
"""

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from raytrain_brats.errors import UserError
from raytrain_brats.planning.prices import near

KINDS = ("measured", "derived", "quoted", "assumed")
FULL_EDGE = 128
"""Of the patches that rates are for; steps of other patches are scaled by their voxels."""


@dataclass(frozen=True)
class Rate:
    value: float
    unit: str
    kind: str
    source: str
    machine: str
    date: str


class Rates(dict[str, Rate]):
    """By name; what a plan has asked for is noted, to be shown beside it."""

    def __init__(self, given: Mapping[str, Rate]) -> None:
        super().__init__(given)
        self.used: dict[str, Rate] = {}

    def of(self, name: str) -> float:
        """Raises UserError when nobody has given it."""
        if name not in self:
            raise UserError(
                f"no rate {name}; {near(name, list(self))} Measure it with scripts/bench and give --rates FILE"
            )
        self.used[name] = self[name]
        return self[name].value

    def between(self, name: str, at: float) -> float:
        """Of `name.1`, `name.4` ...: the value at a number between them, or at the nearest end."""
        points = sorted((int(key.rpartition(".")[2]), key) for key in self if key.rpartition(".")[0] == name)
        low = max((p for p in points if p[0] <= at), default=points[0])
        high = min((p for p in points if p[0] >= at), default=points[-1])
        if low == high:
            return self.of(low[1])
        share = (at - low[0]) / (high[0] - low[0])
        return (1 - share) * self.of(low[1]) + share * self.of(high[1])

    def steps(self) -> dict[str, list[str]]:
        """{GPU: networks} of which a step's rate is known."""
        found: dict[str, list[str]] = {}
        for name in self:
            if name.startswith("step.") and name.count(".") == 2:
                found.setdefault(name.split(".")[1], []).append(name.split(".")[2])
        return found


def load(files: Iterable[str] = ()) -> Rates:
    """The project's, with those of the files in their place. Raises UserError."""
    rates = dict(_ours())
    for path in files:
        try:
            content = yaml.safe_load(Path(path).read_bytes())  # JSON is YAML
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"--rates {path}: cannot be read ({' '.join(str(error).split())})") from error
        if not isinstance(content, dict):
            raise UserError(
                f"--rates {path}: write lines such as `step.A100.segresnet: 30`, or give a file of scripts/bench"
            )
        rates |= _of_bench(path, content) if "made_by" in content else _of_yaml(path, content, rates)
    return Rates(rates)


@lru_cache
def _ours() -> dict[str, Rate]:
    content = yaml.safe_load((resources.files("raytrain_brats.planning") / "rates.yaml").read_bytes())
    return {name: Rate(**about | {"date": str(about["date"])}) for name, about in content.items()}


def _of_yaml(path: str, content: dict[str, Any], before: Mapping[str, Rate]) -> dict[str, Rate]:
    found = {}
    for name, given in content.items():
        about = given if isinstance(given, dict) else {"value": given}
        own = re.fullmatch(r"step\.\w+\.\w[\w-]*|gradient\.\w[\w-]*", str(name))
        if name not in before and not own:
            raise UserError(f"--rates {path}: {name} is not known; {near(str(name), list(before))}")
        unit = "MB" if str(name).startswith("gradient") else "patches/s"
        base = before.get(name, Rate(0, unit, "measured", "", "", ""))
        base = replace(base, kind="measured", source=path, machine="yours", date="")
        try:
            rate = replace(base, **about)
            value = float(rate.value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"--rates {path}: {name}: give a number, or value, unit, kind, source ... ({error})"
            ) from error
        if rate.kind not in KINDS or not 0 <= value < float("inf"):
            raise UserError(f"--rates {path}: {name}: value is a number from 0, kind one of {', '.join(KINDS)}")
        found[name] = replace(rate, value=value, date=str(rate.date))
    return found


def _of_bench(path: str, content: dict[str, Any]) -> dict[str, Rate]:
    """Of `scripts/bench data` or `step`; the CPU is then the user's own, and not scaled."""
    about = {"source": f"{path} ({content['made_by']})", "kind": "measured", "date": str(content.get("date", ""))}
    machine = str(content.get("card") or (content.get("machine") or {}).get("cpu", ""))
    found: dict[str, Rate] = {}
    try:
        if content["made_by"].endswith(" data"):
            settings = content["settings"]
            if settings["patch"] != FULL_EDGE or settings["grid"] != 240:
                raise UserError(
                    f"--rates {path}: of cases or patches that are not of full size; measure with the defaults"
                )
            for route in {"raw", "store"} & content["pipelines"].keys():
                runs = content["pipelines"][route]["runs"]
                tasks = ("ReadCases", "IDLE", "raylet")
                ms = statistics.mean(
                    1e3 * sum(run["cpu_s"].get(task, 0.0) for task in tasks) / run["patches"] for run in runs
                )
                per_case = round(ms * settings["patches_per_case"], 2)
                found[f"data.{route}"] = Rate(per_case, "CPU ms a case", machine=machine, **about)
            found["data.vcpu"] = Rate(1.0, "of that CPU", machine=machine, **about)
        elif content["made_by"].endswith(" step"):
            for recipe, rows in _rows_of_steps(path, content).items():
                best = max(rows, key=lambda row: row["fed"]["img_per_s"])
                rate = best["fed"]["img_per_s"] * content["asked"]["edge"] ** 3 / FULL_EDGE**3
                name = f"step.{_gpu(machine)}.{recipe}"
                found[name] = Rate(round(rate, 3), "patches/s", machine=machine, **about)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, statistics.StatisticsError) as error:
        raise UserError(f"--rates {path}: not as {content['made_by']} writes it ({error!r})") from error
    if not found:
        raise UserError(
            f"--rates {path}: {content['made_by']} measures nothing that a plan needs; give one of data or step"
        )
    return found


def _rows_of_steps(path: str, content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    if content["asked"]["edge"] < FULL_EDGE // 2:
        raise UserError(
            f"--rates {path}: patches of {content['asked']['edge']}^3 are of a small network; measure with 128"
        )
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        if row["loop"] == "ours" and "fed" in row:
            rows.setdefault(row["recipe"], []).append(row)
    return rows


def _gpu(card: str) -> str:
    """`A100` of `NVIDIA A100-SXM4-40GB`."""
    words = card.replace("-", " ").split()
    return next((w for w in words if w[:1].isalpha() and any(c.isdigit() for c in w)), "CPU" if "CPU" in card else card)
