"""What a run costs, by the prices that a person gives. Runs in the driver.

In: prices from the environment, the nodes that are up. Out: dollars an hour, dollars so far; `cost` events.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from raytrain_brats.errors import UserError
from raytrain_brats.run.events import event

PRICES = "RAYTRAIN_BRATS_DOLLARS_PER_HOUR"
_NOTE_S = 60.0


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
