"""A plan for people: tables, and a picture of time against GPUs. Runs in the driver.

In: plans, the rates that they are made of. Out: Rich tables; PNG bytes, which say who made them.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from raytrain_brats.planning import prices
from raytrain_brats.planning.closed_form import GPU, REMEDIES, Plan
from raytrain_brats.planning.rates import KINDS, Rate

COLOURS = ("#f2ae00", "#b292ea", "#e0603a", "#3064c8", "#80564d", "#9f2485", "#88dca7", "#decd73")
"""Of the limits, as in `reporting/figures.py`: told apart with every common colour blindness."""
ROWS = (
    "nodes", "cases", "samples/s, first epoch", "samples/s, later", "first epoch", "later epochs", "waiting for data",
    "validations", "in all, on demand", "in all, on spot", "goodput on spot", "USD on demand", "USD on spot",
    "limited by", "what lifts it", "next limit",
)  # fmt: skip


def table(request: str, plan: Plan, runner_up: Plan | None, simulated: dict[str, Any] | None = None) -> Table:
    title = f"{request}\nprices of {prices.table('ec2')['date']}, {prices.table('ec2')['region']}"
    columns = {"the plan": _column(plan)} | ({"simulated": _simulated(plan, simulated)} if simulated else {})
    columns |= {"the runner-up": _column(runner_up)} if runner_up else {}
    made = Table("", *columns, title=title, title_justify="left")
    for name in ROWS:
        made.add_row(name, *(column.get(name, "") for column in columns.values()))
    return made


def _simulated(plan: Plan, found: dict[str, Any]) -> dict[str, str]:
    """Beside the closed form's; what is more than a tenth apart says so."""

    def against(value: float, closed: float) -> str:
        apart = value / closed - 1
        return f"{apart:+.1%}{', MORE THAN A TENTH APART' if abs(apart) > 0.1 else ''}"

    first, later, seconds = (found[name] for name in ("first_samples_per_s", "samples_per_s", "seconds"))
    market = "spot" if plan.fleet.spot else "demand"
    spread = f", {_time(found['low_s'])} to {_time(found['high_s'])}" if plan.fleet.spot else ""
    return {
        "samples/s, first epoch": f"{first:,.0f} ({against(first, plan.first_samples_per_s)})",
        "samples/s, later": f"{later:,.0f} ({against(later, plan.samples_per_s)})",
        "waiting for data": f"{found['data_wait']:.1%} of the first epoch",
        f"in all, on {market}": f"{_time(seconds)} ({against(seconds, plan.seconds)}){spread}",
        "goodput on spot": f"{found['interruptions']:,.1f} interruptions" if plan.fleet.spot else "",
    }


def _column(plan: Plan) -> dict[str, str]:
    d, fleet = plan.demand, plan.fleet
    stay = {"stream": "read anew each epoch", "host": "stay in memory", "device": "stay on the GPU"}[d.residency]
    idle = f", {fleet.gpus - d.ranks} GPUs idle: train.global_batch is {d.global_batch}" if fleet.gpus > d.ranks else ""
    spot = (
        f"{plan.goodput:.1%}; {plan.interruptions:,.1f} interruptions, nodes there {plan.nodes_there:.1%} of the time"
    )
    best = f"; best interval of checkpoints {plan.best_interval_s:,.0f} s, now {d.checkpoint_s:,.0f}"
    return {
        "nodes": f"{fleet}, head {fleet.head.kind}{idle}",
        "cases": stay,
        "samples/s, first epoch": f"{plan.first_samples_per_s:,.0f}",
        "samples/s, later": f"{plan.samples_per_s:,.0f}",
        "first epoch": _time(plan.first_epoch_s),
        "later epochs": _time(plan.epoch_s),
        "waiting for data": f"{plan.data_wait:.1%}",
        "validations": f"{plan.validations:,.0f} of {d.validation_s:,.0f} s",
        "in all, on demand": f"{_time(plan.on_demand_s)} (start {_time(d.start_s)}, prepare {_time(d.prepare_s)})",
        "in all, on spot": _time(plan.spot_s) if fleet.spot else "not asked for: --spot",
        "goodput on spot": spot + best if fleet.spot else "-",
        "USD on demand": _usd(plan.on_demand_usd),
        "USD on spot": "no spot price in the file" if plan.spot_usd is None else " to ".join(map(_usd, plan.spot_usd)),
        "limited by": plan.bottleneck,
        "what lifts it": REMEDIES[plan.bottleneck],
        "next limit": plan.then,
    }


def used(rates: Mapping[str, Rate]) -> Table:
    """What the plan stands on; the weakest first."""
    made = Table("rate", "value", "kind", "source", "machine, date", title="rates", title_justify="left")
    for name, rate in sorted(rates.items(), key=lambda item: (-KINDS.index(item[1].kind), item[0])):
        made.add_row(name, f"{rate.value:g} {rate.unit}", rate.kind, rate.source, f"{rate.machine}, {rate.date}")
    return made


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _usd(usd: float | None) -> str:
    return "no price" if usd is None else f"{usd:,.2f}" if usd < 10 else f"{usd:,.0f}"


def picture(request: str, drawn: Sequence[Plan], chosen: Plan, made_by: str) -> bytes:
    """PNG: hours against GPUs of one kind, `drawn` by their number; each limit as if it were the only one."""
    gpus = [plan.fleet.gpus for plan in drawn]
    look: dict[Any, Any] = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(8.6, 4.2), layout="constrained", facecolor="white")
        axes = figure.add_subplot(xlabel=f"GPUs ({chosen.fleet.train.gpu})", ylabel="hours", xscale="log", yscale="log")
        figure.suptitle(request, x=0.01, ha="left", size=9)
        limits = list(dict.fromkeys(name for plan in drawn for name in plan.limits))
        colours = dict(zip([name for name in limits if name != GPU], COLOURS, strict=False))
        axes.plot(gpus, [plan.seconds / 3600 for plan in drawn], "-", lw=2.4, color="#3d4650", label="in all")
        for name in limits:
            hours = [_hours(plan, name) for plan in drawn]
            axes.plot(gpus, hours, "--", lw=1.2, color=colours.get(name, "#159183"), label=f"{name} alone")
        axes.plot(chosen.fleet.gpus, chosen.seconds / 3600, "o", ms=8, color="#3d4650")
        cost = "" if chosen.usd is None else f", {_usd(chosen.usd)} USD{' at most' if chosen.fleet.spot else ''}"
        axes.annotate(
            f"{_time(chosen.seconds)}{cost}",
            (chosen.fleet.gpus, chosen.seconds / 3600),
            (8, 6),
            textcoords="offset points",
        )
        axes.set_xticks(gpus, [str(n) if n & (n - 1) == 0 or len(gpus) < 6 else "" for n in gpus])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=150, metadata={"Software": made_by})
    return target.getvalue()


def _hours(plan: Plan, name: str) -> float:
    """Of the steps alone, if only this limited; where cases stay, data limit only the epochs in which they are read."""
    d = plan.demand
    samples = d.samples if d.residency == "stream" or name in (GPU, "all-reduce") else d.cold_epochs * d.epoch_samples
    return samples / plan.limits[name] / 3600 if name in plan.limits else math.nan
