"""A run's numbers for Prometheus, through Ray: every node exports what its processes set (docs/monitoring.md).

In: steps, from rank 0; what the driver's `monitoring/` finds every ten seconds.
Out: gauges `ray_raytrain_brats_<name>`, tagged with the run folder. A gauge disappears 20 s after its process ended.
Runs in a worker (rank 0: `StepGauges`) and in the driver (`Gauges`).
"""

import math
from collections import deque
from urllib.parse import quote

from ray.util.metrics import Gauge

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
    "stall_share": "share of the time between the last two checkpoints for which training stood still, by cause",
    "dice": "Dice of held-out cases at the last validation, by region",
    "goodput": "time in steps that were kept / time the run was up",
    "resizes": "times that the number of workers was changed, so far",
    "recoveries": "starts of a worker group that came to a step, so far",
    "recovery_s": "seconds from the last failure, resize or launch to the next step",
    "quarantined": "cases that cannot be read, so far",
    "dollars_per_hour": "price of the nodes that are up (by RAYTRAIN_BRATS_DOLLARS_PER_HOUR)",
}
_STEPS = 20


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
