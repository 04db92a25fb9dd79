"""The last words of `train`: what came of it, and what to type next. Runs in the driver.

In: the run folder; where its cases are.
Out: last and best Dice by region, time, cost where prices are known, three commands with the run's own places.
"""

import shlex
from typing import Any

from rich.table import Table

from raytrain_brats import books
from raytrain_brats.cli import show as show_table
from raytrain_brats.cli import span
from raytrain_brats.errors import UserError
from raytrain_brats.labels import REGIONS
from raytrain_brats.reporting import goodput
from raytrain_brats.run import gains
from raytrain_brats.run.gains import Scored
from raytrain_brats.run.spec import RunSpec


def show(spec: RunSpec, data: str = "", store: str = "") -> None:
    """Print them. What cannot be read just now is left out: the run is done all the same."""
    try:
        validations = gains.history(spec.run_dir)
        rows, events = books.read_rows(spec.run_dir, torn=[]), books.read_events(spec.run_dir)
    except (OSError, ValueError, UserError) as error:
        print(f"done: {spec.run_dir} (its scores cannot be read just now: {error})")
        return
    if validations:
        show_table(table(validations, len(spec.held_out_cases[: spec.config.validate_.max_cases])))
    if spec.manifest.synthetic:
        print("these are phantoms: their scores say nothing about patients")
    print(f"done: {spec.run_dir}: {summary(rows, events)}")
    print("next:")
    for line in commands(spec.run_dir, data, store, kept_best(spec, validations)):
        print(f"  {line}")


def table(validations: list[Scored], cases: int) -> Table:
    """The last validation beside the best."""
    last, top = validations[-1], gains.best(validations)
    assert top is not None, "there is one"
    title = f"Dice of {cases} held-out cases while training"
    lines = Table("", "at sample", *REGIONS, "mean", title=title)
    for name, each in (("last", last), ("best", top)):
        values = [f"{value:.3f}" for _, value in each.dice]
        lines.add_row(name, f"{each.samples_seen:,}", *values, f"{each.mean:.3f}")
    return lines


def kept_best(spec: RunSpec, validations: list[Scored]) -> bool:
    """Whether an earlier checkpoint than the newest scored best, and was kept."""
    top = gains.best(validations)
    return bool(top and spec.config.checkpoint.best and top != validations[-1])


def summary(rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> str:
    """Samples, time, goodput, cost, in a line."""
    if not rows:
        return "no step was applied"
    split = goodput.time_breakdown(events, rows)
    up_s = split.wall_s - split.stopped_s
    parts = [f"{rows[-1]['samples_seen']:,} samples in {span(up_s)}"]
    if split.goodput == split.goodput:
        parts.append(f"goodput {split.goodput:.0%}")
    if restarts := len({row["generation"] for row in rows}) - 1:
        parts.append(f"{restarts} restart{'s' * (restarts > 1)}")
    dollars = [event["dollars"] for event in events if event["event"] == "cost"]
    if dollars:
        parts.append(f"${sum(dollars):,.2f}")
    return ", ".join(parts)


def commands(run_dir: str, data: str, store: str, best: bool) -> list[str]:
    """What a person types next, as it is typed."""
    run = shlex.quote(run_dir)
    cases = f"--store {shlex.quote(store)}" if store else f"--data {shlex.quote(data)}"
    also = " --best" if best else ""
    return [
        f"raytrain-brats evaluate {cases} --run-dir {run}{also}",
        f"raytrain-brats predict --run-dir {run}{also} --images SCANS --out PREDICTIONS",
        f"raytrain-brats report --run-dir {run}",
    ]
