"""Show a run's progress and export its metrics. Runs in the driver.

In: the run folder, as it fills.
Out: a live line on a terminal; a plain line every few seconds elsewhere; metrics of rows and events through Ray.
"""

import re
import threading
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from raytrain_brats import books, storage
from raytrain_brats.errors import UserError
from raytrain_brats.labels import REGIONS
from raytrain_brats.monitoring import cost
from raytrain_brats.monitoring.run_gauges import set_run
from raytrain_brats.ray_ext import roles
from raytrain_brats.reporting import planned
from raytrain_brats.run.gauges import Gauges
from raytrain_brats.run.spec import RunSpec

_RECENT, _MEASURE_S, _LINE_S = 20, 10.0, 10.0


class Progress:
    """Follow a run from the driver, in a thread, for the time of a `with` block."""

    def __init__(self, spec: RunSpec, trouble: Callable[[], str] = lambda: "") -> None:
        """`trouble` returns why the run folder cannot be written now, for the time in which no event can report it."""
        self._spec, self._trouble = spec, trouble
        self._since, self._unsaved = time.time(), ""
        self._printed: set[str] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._console = Console(stderr=False)
        self._gauges, self._prices = Gauges(spec.run_dir), cost.prices()
        self._cost = cost.Cost(spec.run_dir, self._prices)
        self._next_measure = 0.0
        self._planned: str | None = None

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join(timeout=10)
        self._cost.record()

    def _follow(self) -> None:
        every_s = 1.0 if not storage.is_s3(self._spec.run_dir) else 5.0
        if self._console.is_terminal:
            with Bar(BarColumn(20), TextColumn("{task.description}", markup=False), console=self._console) as bar:
                run = bar.add_task("", total=self._spec.sampler.total)
                while not self._done.wait(every_s):
                    rows, line = self._update(lambda text: bar.console.print(text, markup=False, soft_wrap=True))
                    bar.update(run, description=line, completed=rows[-1]["samples_seen"] if rows else 0)
                bar.update(run, description=self._update()[1], completed=self._spec.sampler.total)
            return
        last, printed_s, over = "", time.monotonic(), False
        while not over:  # warnings at once, the line every ten seconds
            over = self._done.wait(every_s)
            line = self._update()[1]
            if line != last and (over or time.monotonic() > printed_s + _LINE_S):
                print(line, flush=True)
                last, printed_s = line, time.monotonic()

    def _update(self, show: Callable[[str], None] = lambda text: print(text, flush=True)) -> tuple[list[Any], str]:
        """(the last rows, the line); new messages are shown, metrics are set."""
        try:
            rows, events = books.recent(self._spec.run_dir)
            self._show_messages(events, show)
            self._measure(rows)
        except (OSError, ValueError, UserError, RayError) as error:  # the run goes on; the next update tries again
            return [], f"run folder cannot be read just now: {error}"
        if self._planned is None:
            plan = planned.read(self._spec.run_dir)
            self._planned = f" | planned: {plan}" if plan else ""
        price = f" | ${self._cost.rate:,.2f}/h, ${self._cost.total:,.2f} so far" if self._cost.rate is not None else ""
        return rows, describe(rows, events, self._spec.sampler.total, self._trouble()) + price + self._planned

    def _show_messages(self, events: list[dict[str, Any]], show: Callable[[str], None]) -> None:
        """Show each new message once; about saving, when it begins to fail and when it works again."""
        events = [e for e in events if e["time"] >= self._since]
        for line in map(message_of, events):
            if line and line not in self._printed:
                self._printed.add(line)
                show(line)
        failure = unsaved(events, self._trouble())
        why = failure[1] if failure else ""
        if why and why != self._unsaved:
            show(f"warning: not saved: {why}; training goes on and saves when it can: make room, or mend what is wrong")
        if self._unsaved and not why:
            show("saved again")
        self._unsaved = why

    def _measure(self, rows: list[dict[str, Any]]) -> None:
        """Set metrics from all events: every ten seconds, or less often where that takes more than 1 % of the time."""
        if (began := time.monotonic()) < self._next_measure:
            return
        self._next_measure = began + _MEASURE_S  # also when a line below raises
        events = books.read_events(self._spec.run_dir)
        set_run(self._gauges, events, rows, self._spec.sampler.total)
        if self._prices:
            self._cost.update(roles.alive(), events)
            self._gauges.set("dollars_per_hour", self._cost.rate)
        self._next_measure = began + max(_MEASURE_S, 100 * (time.monotonic() - began))


def message_of(event: dict[str, Any]) -> str:
    """The message of an event that a person must know of; "" for most events."""
    kind = event["event"]
    if kind == "failure":
        return f"worker group {event['generation']} failed and starts again: {event['error']}"
    if kind == "hang":
        return (
            f"warning: rank {event['rank']} hung for {event['for_s']:g} s in phase {event['phase']}, its group starts "
            f"again; stacks: {event['stacks']}"
        )
    if kind == "quarantine":
        detail = f" ({event['detail']})" if event.get("detail") else ""
        return f"warning: case {event['case']} is not used: {event['reason']}{detail}"
    return f"warning: {event['text']}" if kind == "warning" else ""


def unsaved(events: list[dict[str, Any]], trouble: str = "") -> tuple[int, str] | None:
    """(last sample that is saved, why no later one is) while checkpoints fail; None when they succeed."""
    at, why = 0, ""
    for e in events:
        if e["event"] == "group":
            at, why = e.get("samples_seen", at), ""
        elif e["event"] == "checkpoint":
            at, why = e["samples_seen"], ""
        elif e["event"] == "checkpoint_failed":
            why = e["error"]
    why = re.sub(r"\[Errno \d+\] |: '[^']*'$", "", why or trouble)  # without the path, which differs each time
    return (at, why) if why else None


def describe(rows: list[dict[str, Any]], events: list[dict[str, Any]], total: int, trouble: str = "") -> str:
    """One line: progress, loss and Dice, speed, time left; while checkpoints fail, since when and why."""
    failure = unsaved(events, trouble)
    warning = f" | not saved since sample {failure[0]:,}: {failure[1]}" if failure else ""
    groups = [e for e in events if e["event"] == "group"]
    if not rows:
        return (f"sample 0 of {total:,}: workers are starting" if groups else "starting") + warning
    recent = rows[-_RECENT:]
    if groups and groups[-1]["time"] > rows[-1]["time"]:
        number = groups[-1]["generation"]
        return f"sample {rows[-1]['samples_seen']:,} of {total:,}: worker group {number} is starting{warning}"
    losses = [row["loss"] for row in recent if row["loss"] is not None]
    seconds = sum(row["step_s"] for row in recent)
    speed = sum(row["positions"][1] - row["positions"][0] for row in recent) / max(seconds, 1e-9)
    waiting = sum(row["wait_s"] for row in recent) / max(seconds, 1e-9)
    left_s = (total - recent[-1]["samples_seen"]) / max(speed, 1e-9)
    if failure and recent[-1]["samples_seen"] >= total:
        return f"sample {total:,} of {total:,}: waiting for room to save the last checkpoint{warning}"
    parts = [
        f"sample {recent[-1]['samples_seen']:,} of {total:,}{warning}",
        f"loss {sum(losses) / len(losses):.3f}" if losses else "loss -",
        f"{speed:.1f} samples/s",
        f"{waiting:.0%} waiting for data{_standing_still(events)}",
        f"{recent[-1]['world_size']} worker{'s' if recent[-1]['world_size'] > 1 else ''}",
        f"{int(left_s // 60)}:{int(left_s % 60):02d} left",
    ]
    if scored := [e for e in events if e["event"] == "validation"]:
        dice = " ".join(f"{region} {scored[-1]['dice'][region]:.2f}" for region in REGIONS)
        parts.insert(2, f"Dice {dice}")
    if groups and (restarts := groups[-1]["generation"] - 1):
        parts.append(f"{restarts} restart{'s' if restarts > 1 else ''}")
    return " | ".join(parts)


def _standing_still(events: list[dict[str, Any]]) -> str:
    """For what else training stood still between the last two checkpoints, where it is a per cent or more."""
    last: dict[str, float] = next(
        (e["stall"] for e in reversed(events) if e["event"] == "checkpoint" and "stall" in e), {}
    )
    causes = {"saving": last.get("checkpoint", 0.0), "validating": last.get("validation", 0.0)}
    return "".join(f", {share:.0%} {cause}" for cause, share in causes.items() if share >= 0.01)
