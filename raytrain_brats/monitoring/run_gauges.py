"""The gauges that tell of a run as a whole. Runs in the driver.

In: all events of a run and its last rows. Out: gauges, by `run.gauges`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from raytrain_brats.reporting.goodput import recoveries, time_breakdown
from raytrain_brats.run.gauges import Gauges


def set_run(gauges: Gauges, events: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], total: int) -> None:
    """Set what follows from all `events` of the run and its last `rows`."""
    recovered = recoveries(events)
    gauges.set("samples_total", total)
    gauges.set("goodput", time_breakdown(events, rows).goodput)
    gauges.set("resizes", sum(e.get("event") == "resize" for e in events))
    gauges.set("recoveries", len(recovered))
    gauges.set("recovery_s", recovered[-1].total_s if recovered else None)
    gauges.set("quarantined", len({e.get("case") for e in events if e.get("event") == "quarantine"}))
    stalls = [e["stall"] for e in events if e.get("event") == "checkpoint" and "stall" in e]
    for cause, share in (stalls[-1] if stalls else {}).items():
        gauges.set("stall_share", share, cause=cause)
    scored = [e["dice"] for e in events if e.get("event") == "validation" and "dice" in e]
    for region, dice in (scored[-1] if scored else {}).items():
        gauges.set("dice", dice, region=region)
