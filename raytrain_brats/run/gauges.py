"""A run's numbers for Prometheus, through Ray: every node exports what its processes set (docs/monitoring.md).

In: steps, from rank 0; every ten seconds rows and events of the run folder, and the nodes that are up.
Out: gauges `ray_raytrain_brats_<name>`, tagged with the run folder. A gauge disappears 20 s after its process ended.
Runs in a worker (rank 0: `StepGauges`) and in the driver (the rest).
"""

import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from ray.util.metrics import Gauge

from raytrain_brats.errors import UserError
from raytrain_brats.reporting.goodput import recoveries, time_breakdown
from raytrain_brats.run.journal import event

PRICES = "RAYTRAIN_BRATS_DOLLARS_PER_HOUR"
NAMES = {
    # from rank 0, with each step
    "samples_per_s": "samples applied a second, over the last steps",
    "data_wait_share": "share of the last steps' time that was spent waiting for data",
    "step_s": "seconds of a step, mean of the last ones",
    "loss": "loss of the last step",
    "world_size": "training workers",
    "samples_seen": "samples applied so far",
    # from the driver, every ten seconds
    "samples_total": "samples of the whole run",
    "dice": "Dice of held-out cases at the last validation, by region",
    "goodput": "time in steps that were kept / time the run was up",
    "resizes": "times that the number of workers was changed, so far",
    "recoveries": "starts of a worker group that came to a step, so far",
    "recovery_s": "seconds from the last failure, resize or launch to the next step",
    "quarantined": "cases that cannot be read, so far",
    "dollars_per_hour": f"price of the nodes that are up (by {PRICES})",
}
_STEPS, _NOTE_S = 20, 60.0


def ascii_only(text: str) -> str:
    """Percent-encode other characters: Ray's metrics end the process that sets them."""
    return "".join(c if c.isascii() else quote(c, errors="surrogateescape") for c in text)


class Gauges:
    """The gauges that one process sets for one run."""

    def __init__(self, run_dir: str) -> None:
        self._tags, self._made = {"run": ascii_only(run_dir)}, dict[str, Gauge]()

    def set(self, name: str, value: float | None, **tags: str) -> None:
        if value is None or not math.isfinite(value):
            return  # an unknown value is not exported; the one before stays
        if name not in self._made:
            self._made[name] = Gauge(f"raytrain_brats_{name}", NAMES[name], ("run", *tags))
        self._made[name].set(value, self._tags | tags)


class StepGauges(Gauges):
    """The gauges that rank 0 sets at each step of its worker group."""

    def __init__(self, run_dir: str) -> None:
        super().__init__(run_dir)
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=_STEPS)

    def set_step(
        self, samples: int, seen: int, world_size: int, loss: float | None, wait_s: float, step_s: float
    ) -> None:
        """Set all after a step of `samples` that took `step_s`, of which it waited `wait_s` for its batch."""
        self._recent.append((samples, wait_s, step_s))
        applied, waited, seconds = (sum(column) for column in zip(*self._recent, strict=True))
        self.set("samples_per_s", applied / max(seconds, 1e-9))
        self.set("data_wait_share", waited / max(seconds, 1e-9))
        self.set("step_s", seconds / len(self._recent))
        self.set("loss", loss)
        self.set("world_size", world_size)
        self.set("samples_seen", seen)


def set_run(gauges: Gauges, events: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], total: int) -> None:
    """Set what follows from all `events` of the run and its last `rows`."""
    recovered = recoveries(events)
    gauges.set("samples_total", total)
    gauges.set("goodput", time_breakdown(events, rows).goodput)
    gauges.set("resizes", sum(e.get("event") == "resize" for e in events))
    gauges.set("recoveries", len(recovered))
    gauges.set("recovery_s", recovered[-1].total_s if recovered else None)
    gauges.set("quarantined", len({e.get("case") for e in events if e.get("event") == "quarantine"}))
    scored = [e["dice"] for e in events if e.get("event") == "validation" and "dice" in e]
    for region, dice in (scored[-1] if scored else {}).items():
        gauges.set("dice", dice, region=region)


def prices() -> dict[str, float]:
    """{role: dollars an hour of each such node}, the whole cluster's under "". From the environment variable, which is
    `12.5` or `head=0.4,data=0.77,train=21.96`. Raises UserError."""
    given = os.environ.get(PRICES, "")
    found = {}
    try:
        for part in given.split(",") if given else ():
            role, price = part.split("=") if "=" in part else ("", part)
            found[role.strip()] = float(price)
    except ValueError:
        found[""] = math.nan
    if not all(0 <= price < math.inf for price in found.values()):
        raise UserError(
            f"{PRICES}={given}: write 12.5 for the cluster, or a node's price by role: data=0.77,train=21.96"
        )
    return found


class Cost:
    """The cost of the nodes that are up: a rate, and a sum which `cost` events carry from launch to launch.

    Time without a driver is not counted, as nothing measures it.
    """

    def __init__(self, run_dir: str, prices: Mapping[str, float]) -> None:
        self._run_dir, self._prices = run_dir, prices
        self._since = self._noted = time.monotonic()
        self._unnoted = 0.0
        self.rate: float | None = None
        self.total = 0.0

    def update(self, nodes: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> None:
        """Add the time since the last update at its rate; write an event once a minute."""
        now = time.monotonic()
        self._unnoted += (self.rate or 0.0) * (now - self._since) / 3600
        self._since, self.rate = now, dollars_per_hour(self._prices, nodes)
        self.total = sum(e["dollars"] for e in events if e.get("event") == "cost") + self._unnoted
        if now > self._noted + _NOTE_S:
            self.record()

    def record(self) -> None:
        """Write what no event holds yet to the run folder's events."""
        if self._unnoted:
            event(self._run_dir, "cost", dollars=round(self._unnoted, 6), dollars_per_hour=self.rate)
            self._unnoted, self._noted = 0.0, time.monotonic()


def dollars_per_hour(prices: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> float | None:
    """The price of these nodes together; None when no price is known."""
    if not prices:
        return None
    return prices.get("", 0.0) + sum(prices.get((node["Labels"] or {}).get("role", "-"), 0.0) for node in nodes)
