"""What was planned for a run, beside what happens. Runs in the driver and in `report`.

In: `plan.json` in the run folder, as `raytrain-brats plan --json RUN/plan.json` puts it there. Out: words, or none.
"""

import json
from dataclasses import dataclass

from raytrain_brats import storage
from raytrain_brats.errors import UserError

FILE = "plan.json"


@dataclass(frozen=True)
class Planned:
    samples_per_s: float
    data_wait: float
    seconds: float
    usd: float | None

    def __str__(self) -> str:
        usd = "" if self.usd is None else f", ${self.usd:,.2f}"
        hours = f"{self.seconds / 3600:,.1f} h" if self.seconds >= 3600 else f"{self.seconds / 60:,.0f} min"
        return f"{self.samples_per_s:,.1f} samples/s, {self.data_wait:.0%} waiting for data, {hours} in all{usd}"


def read(run_dir: str) -> Planned | None:
    """None where there is no plan, or a file that is none: it is for people, and nothing fails for it."""
    try:
        plan = json.loads(storage.read_bytes(storage.join(run_dir, FILE)))["plan"]
        usd = None if plan["usd"] is None else float(plan["usd"])
        return Planned(float(plan["samples_per_s"]), float(plan["data_wait"]), float(plan["seconds"]), usd)
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return None
