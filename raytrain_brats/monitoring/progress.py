"""Show a run's progress and export its metrics. Runs in the driver.

In: the run folder, as it fills.
Out: a live line on a terminal; a plain line every few seconds elsewhere; metrics of rows and events through Ray.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from raytrain_brats import books, storage
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.monitoring import cost
from raytrain_brats.monitoring.live_line import Standing, fitted, standing, unsaved, whole
from raytrain_brats.monitoring.run_gauges import set_run
from raytrain_brats.ray_ext import roles
from raytrain_brats.reporting import planned
from raytrain_brats.run import control
from raytrain_brats.run.gauges import Gauges
from raytrain_brats.run.spec import RunSpec

_MEASURE_S, _LINE_S = 10.0, 10.0


def bar_width(columns: int) -> int:
    """Of a terminal's columns; the numbers need the others."""
    return 10 if columns < 100 else 20


def _print(text: str) -> None:
    """Whether anybody reads it or not: a run does not end because `tee` did."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


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
        self._before = 0
        """The newest worker group of earlier launches."""

    def __enter__(self) -> "Progress":
        with contextlib.suppress(OSError, UserError, RunFailed):
            self._before = ((now := control.current(self._spec.run_dir)) and now.number) or 0
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join(timeout=10)
        self._cost.record()

    def _follow(self) -> None:
        every_s = 1.0 if not storage.is_s3(self._spec.run_dir) else 5.0
        if self._console.is_terminal:
            drawn = BarColumn(bar_width(self._console.width))
            with Bar(drawn, TextColumn("{task.description}", markup=False), console=self._console) as bar:
                run, over = bar.add_task("starting", total=self._spec.sampler.total), False
                while not over:
                    over = self._done.wait(every_s)
                    now = self._update(lambda text: bar.console.print(text, markup=False, soft_wrap=True))
                    drawn.bar_width = bar_width(width := self._console.width)  # the window may have changed
                    line = now if isinstance(now, str) else fitted(now, width - drawn.bar_width - 2)
                    seen = 0 if isinstance(now, str) else now.seen
                    bar.update(run, description=line[: width - drawn.bar_width - 2], completed=seen)
            return
        last, printed_s, over = "", time.monotonic(), False
        while not over:  # warnings at once, the line every ten seconds
            over = self._done.wait(every_s)
            now = self._update()
            line = now if isinstance(now, str) else whole(now)
            if line != last and (over or time.monotonic() > printed_s + _LINE_S):
                _print(line)
                last, printed_s = line, time.monotonic()

    def _update(self, show: Callable[[str], None] = _print) -> Standing | str:
        """How the run stands, or why that is not known just now; new messages are shown, metrics are set."""
        try:
            rows, events = books.recent(self._spec.run_dir)
            self._show_messages(events, show)
            self._measure(rows)
        except (OSError, ValueError, UserError, RayError) as error:  # the run goes on; the next update tries again
            return f"run folder cannot be read just now: {error}"
        if self._planned is None:
            plan = planned.read(self._spec.run_dir)
            self._planned = f"planned: {plan}" if plan else ""
        price = f"${self._cost.rate:,.2f}/h, ${self._cost.total:,.2f} so far" if self._cost.rate is not None else ""
        now = standing(rows, events, self._spec.sampler.total, self._trouble(), self._before)
        return replace(now, more=tuple(filter(None, (price, self._planned))))

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
    if kind == "damaged_checkpoint":
        return f"warning: checkpoint {event['name']} is damaged, and not used: {event['why']}"
    if kind == "early_stop":
        return f"ends early: {event['reason']}"
    return f"warning: {event['text']}" if kind == "warning" else ""
