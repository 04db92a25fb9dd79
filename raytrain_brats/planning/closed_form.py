"""How long a run takes, what it costs and what limits it, by arithmetic. Runs in the driver.

In: a `Demand`, its `Fleet`. Out: a `Plan`.

Everything is a pipeline whose slowest part sets the pace. Failures: Daly's expected time of a run that saves every tau
seconds (J. T. Daly 2006, doi 10.1016/j.future.2004.11.016, equation 20); beside it Young's best interval
(J. W. Young 1974, doi 10.1145/361147.361115).
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from raytrain_brats.planning.demand import PREFETCH, RARER, ROW_CASES, SEGMENT_TASKS, TASK_CASES, Demand, Fleet

GPU = "GPU step"
REMEDIES = {
    GPU: "more or faster GPUs, up to one for each sample of train.global_batch",
    "all-reduce": "a larger train.global_batch, or nodes with a faster network",
    "data tasks": "more data nodes, run.cpus_per_task=0.5 where cases come from S3, a store instead of raw files, or a "
    "larger data.patches_per_case",
    "reading ranks": "a store instead of raw files; it is over once cases stay",
    "processors": "a GPU, or more CPUs",
    "S3 requests": "cases under more than one prefix, or a larger data.patches_per_case",
    "network of the data tasks": "more data nodes, or a larger data.patches_per_case",
    "network of a training node": "a larger data.patches_per_case, or more memory, so that cases stay",
    "coordinator": "a larger data.patches_per_case, or more memory, so that cases stay",
}


@dataclass(frozen=True)
class Plan:
    """Rates in samples (patches) a second, times in seconds, money in USD."""

    fleet: Fleet
    demand: Demand
    limits: dict[str, float]
    """Of the first epoch; of later ones too, where cases do not stay."""
    bottleneck: str
    """Of the phase that takes most of the run."""
    then: str
    """What limits next, and from which rate on."""
    samples_per_s: float
    """Of later epochs."""
    first_samples_per_s: float
    data_wait: float
    """Share of the steps' time, of the whole run."""
    epoch_s: float
    first_epoch_s: float
    validations: float
    on_demand_s: float
    spot_s: float
    goodput: float
    """On spot: time in steps that were kept, as a share of the time with all nodes."""
    nodes_there: float
    """On spot: share of the time that a training node is there."""
    interruptions: float
    """On spot: how many are to be expected."""
    best_interval_s: float
    """Between checkpoints, by Young."""
    on_demand_usd: float | None
    spot_usd: tuple[float, float] | None

    @property
    def seconds(self) -> float:
        return self.spot_s if self.fleet.spot else self.on_demand_s

    @property
    def usd(self) -> float | None:
        """The most it may cost, by the prices seen; None where there is no price."""
        return (self.spot_usd[1] if self.spot_usd else None) if self.fleet.spot else self.on_demand_usd

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"remedy": REMEDIES[self.bottleneck], "seconds": self.seconds, "usd": self.usd}


def limits(d: Demand, cold: bool = True) -> dict[str, float]:
    """Samples a second that each part could do alone; `cold`: while cases must be read."""
    k, found = d.patches_per_case, {GPU: d.global_batch / d.step_s}
    if d.reduce_s > d.compute_s:
        found = {"all-reduce": d.global_batch / d.step_s}
    if not cold:
        return found
    if d.residency != "stream":
        found["reading ranks"] = _read_by_ranks(d)
        found["S3 requests"] = k * d.gets_per_s / d.case_gets
        found["network of a training node"] = d.nodes * d.train_node_mb_s * k / d.case_read_mb
        return found
    # Between two executions of a dataset nothing is streamed, nor before the next one's first row is complete. Where
    # data limit, no rank has rows in reserve.
    pause_s = d.pause_s + row_cases(d.ranks) * (d.case_wait_s + d.case_cpu_s)
    segment = SEGMENT_TASKS * task_rows(d.ranks) * row_cases(d.ranks) * k * d.coordinators
    parts = {
        "S3 requests": k * d.gets_per_s / d.case_gets,
        "network of the data tasks": k * d.task_node_mb_s / max(d.case_read_mb, d.case_sent_mb),
        "coordinator": d.coordinators / d.deal_s if d.deal_s else math.inf,
        "network of a training node": d.nodes * d.train_node_mb_s * k / _arriving_mb(d),
    }
    parts["data tasks"] = k * min(d.cpus / d.case_cpu_s, d.cpus / d.cpus_per_task / (d.case_cpu_s + d.case_wait_s))
    if d.step_cpu_s:
        parts["processors"] = (d.cpus - d.other_cpus) / (d.case_cpu_s / k + d.step_cpu_s)
    return found | {name: rate / (1 + rate * pause_s / segment) for name, rate in parts.items() if rate < math.inf}


def _arriving_mb(d: Demand) -> float:
    """Of a case, at training nodes: its row, unless it was made there, and what data tasks read there."""
    return max(1e-9, d.case_sent_mb * (1 - d.on_train / d.nodes) + d.case_read_mb * d.on_train)


def _read_by_ranks(d: Demand) -> float:
    """A rank reads few rows ahead, and has all of a step before it computes: the rest is not hidden."""
    case_s, cases = d.alone_case_s + d.case_wait_s, d.global_batch / d.ranks / d.patches_per_case
    return d.global_batch / max(cases * case_s, d.step_s + max(0.0, cases - PREFETCH) * case_s)


def row_cases(ranks: int) -> int:
    return min(ROW_CASES, -(-ranks // 4))


def task_rows(ranks: int) -> int:
    cases = row_cases(ranks)
    return TASK_CASES if cases == 1 else max(2, TASK_CASES // cases)


def plan(d: Demand, fleet: Fleet) -> Plan:
    first, later = limits(d), limits(d, cold=d.residency == "stream")
    cold_rate, warm_rate = min(first.values()), min(later.values())
    cold = d.cold_epochs * d.epoch_samples
    times = cold / cold_rate, (d.samples - cold) / warm_rate
    steps_s = sum(times)
    if d.checkpoint_samples:
        d = replace(d, checkpoint_s=d.checkpoint_samples / warm_rate)
    stalls = steps_s / d.checkpoint_s * d.checkpoint_stall_s
    validations = _validations(d, steps_s)
    trained_s = steps_s + stalls + validations * d.validation_s
    longest = first if times[0] >= times[1] else later
    ranked = sorted(longest, key=lambda name: longest[name])
    lost = _lost(d)
    on_demand_s = d.start_s + d.prepare_s + trained_s
    spot_s = d.start_s + d.prepare_s + trained_s / lost["goodput"] / lost["nodes_there"]
    return Plan(
        fleet=fleet,
        demand=d,
        limits=first,
        bottleneck=ranked[0],
        then=f"{ranked[1]}, {longest[ranked[1]]:,.0f} samples/s" if len(ranked) > 1 else "nothing of the data path",
        samples_per_s=warm_rate,
        first_samples_per_s=cold_rate,
        data_wait=max(0.0, 1 - d.samples * d.step_s / d.global_batch / steps_s),
        epoch_s=d.epoch_samples / warm_rate,
        first_epoch_s=d.epoch_samples / cold_rate,
        validations=validations,
        on_demand_s=on_demand_s,
        spot_s=spot_s,
        interruptions=d.nodes * d.interruptions_per_s * (spot_s - d.start_s - d.prepare_s),
        on_demand_usd=_usd(fleet, d, on_demand_s, None),
        spot_usd=_spot_usd(fleet, d, spot_s),
        **lost,
    )


def _validations(d: Demand, steps_s: float) -> float:
    """After each epoch, rarer where that took over 5 % of the time, or by samples; and at the end."""
    if not d.validation_s:
        return 0.0
    if d.validate_samples:
        return float(-(-d.samples // d.validate_samples))
    apart = max(1, math.ceil(RARER * d.validation_s / (steps_s / d.epochs)))
    further = max(0, math.ceil(d.epochs) - 1)
    return 1.0 + further // apart + (further % apart > 0)


def _lost(d: Demand) -> dict[str, float]:
    """Daly: without notice, as if every interruption threw away what was not saved. Each costs a join, too."""
    if not d.interruptions_per_s:
        return {"goodput": 1.0, "nodes_there": 1.0, "best_interval_s": math.inf}
    between = 1 / (d.nodes * d.interruptions_per_s)
    tau, save = d.checkpoint_s, d.checkpoint_stall_s
    taken = between * math.exp(d.recover_s / between) * math.expm1((tau + save) / between)
    return {
        "goodput": (tau + save) / taken / (1 + d.join_s / between),
        "nodes_there": 1 / (1 + d.interruptions_per_s * d.replacement_s),
        "best_interval_s": math.sqrt(2 * save * between),
    }


def _usd(fleet: Fleet, d: Demand, seconds: float, spot: int | None) -> float | None:
    """`spot`: 0 the lowest price seen, 1 the highest; None: on demand."""
    prices = [
        m.on_demand if spot is None else (m.spot or (m.on_demand, m.on_demand))[spot] for m in (fleet.train, fleet.data)
    ]
    if spot is not None and not fleet.train.spot:
        return None
    if fleet.head.on_demand is None or any(price is None for price in prices):
        return None
    # Data nodes go when they idle: with cases that stay they only prepare.
    data_s = seconds if d.residency == "stream" else d.start_s + d.prepare_s
    hourly = fleet.nodes * (prices[0] or 0.0) + fleet.head.on_demand
    return (hourly * seconds + fleet.data_nodes * (prices[1] or 0.0) * data_s) / 3600


def _spot_usd(fleet: Fleet, d: Demand, seconds: float) -> tuple[float, float] | None:
    low, high = (_usd(fleet, d, seconds, end) for end in (0, 1))
    return None if low is None or high is None else (low, high)
