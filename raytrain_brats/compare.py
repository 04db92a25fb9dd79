"""Runs side by side: `raytrain-brats compare RUN RUN ... [--picture FILE.png]`.

In: run folders (local or s3://), finished or not; folders with the runs of folds.
Out: a table of scores, time and cost; the settings in which they differ; on request a picture of loss and Dice.
"""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import tyro
from rich.table import Table

from raytrain_brats import books, config, outputs, storage
from raytrain_brats.cli import entry, show, span
from raytrain_brats.errors import UserError
from raytrain_brats.labels import REGIONS
from raytrain_brats.reporting import comparison, goodput
from raytrain_brats.reporting.comparison import Curve
from raytrain_brats.run import gains, members, spec
from raytrain_brats.run.gains import Scored
from raytrain_brats.run.run_dir import RunDir


@dataclass(frozen=True)
class Args:
    """Compare runs: last and best validation Dice, evaluation, time, cost, and the settings in which they differ."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, two or more (local or s3://)."""
    picture: str = ""
    """Also draw loss and Dice over samples into this file; its name ends in .png."""
    overwrite: bool = False
    """Also replace a file at --picture of another program; never an image or a label."""


@dataclass(frozen=True)
class Compared:
    """What is known of a run."""

    name: str
    run_dir: str
    run: spec.StoredRun
    validations: list[Scored]
    evaluation: dict[str, Any]
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]


def work(args: Args) -> None:
    folders = members.runs_of(args.runs)
    if len(folders) < 2:
        raise UserError(f"{' '.join(('compare', *args.runs))}: give two runs or more")
    made_by = outputs.picture_of("compare", [outputs.place(folder) for folder in folders])
    if args.picture:
        outputs.claim_picture(args.picture, made_by, args.overwrite)
    names = _names(folders)
    runs = [_read(name, folder) for name, folder in zip(names, folders, strict=True)]
    for table in (_scores(runs), _work(runs), _settings(runs)):
        show(table)
    for line in _caveats(runs):
        print(line)
    if args.picture:
        storage.write_bytes(args.picture, comparison.picture([_curve(run) for run in runs], made_by))
        print(f"picture in {args.picture}")


def _names(folders: list[str]) -> list[str]:
    """As short as tells them apart: the last names of each path."""
    parts = [folder.rstrip("/").split("/") for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return folders


def _read(name: str, run_dir: str) -> Compared:
    run = spec.open_run(run_dir)
    try:
        evaluation = dict(json.loads(storage.read_bytes(storage.join(RunDir(run_dir).evaluation, "summary.json"))))
    except (FileNotFoundError, ValueError, TypeError):
        evaluation = {}
    rows, events = books.read_rows(run_dir, torn=[]), books.read_events(run_dir)
    return Compared(name, run_dir, run, gains.history(run_dir), evaluation, rows, events)


def _scores(runs: list[Compared]) -> Table:
    table = Table("run", "validation", "at sample", *REGIONS, "mean", title="Dice")
    for run in runs:
        top = gains.best(run.validations)
        for what, each in (("last", run.validations[-1] if run.validations else None), ("best", top)):
            values = [f"{value:.3f}" for _, value in each.dice] if each else ["-"] * len(REGIONS)
            at, mean = (f"{each.samples_seen:,}", f"{each.mean:.3f}") if each else ("-", "-")
            table.add_row(run.name, what, at, *values, mean)
        if dice := run.evaluation.get("dice"):
            values = [f"{dice.get(region, float('nan')):.3f}" for region in REGIONS]
            at = str(run.evaluation.get("checkpoint", "")).partition("-")[0].lstrip("0")
            mean = f"{sum(dice.get(region, float('nan')) for region in REGIONS) / len(REGIONS):.3f}"
            what = f"evaluated, {run.evaluation.get('cases', '?')} cases"
            table.add_row(run.name, what, f"{int(at):,}" if at.isdigit() else at, *values, mean)
        table.add_section()
    return table


def _work(runs: list[Compared]) -> Table:
    table = Table("run", "samples", "loss", "time", "samples/s", "goodput", "workers", "restarts", "cost", title="work")
    for run in runs:
        if not run.rows:
            table.add_row(run.name, "0", *["-"] * 7)
            continue
        split = goodput.time_breakdown(run.events, run.rows)
        up_s, seen = split.wall_s - split.stopped_s, run.rows[-1]["samples_seen"]
        losses = [row["loss"] for row in run.rows[-20:] if row["loss"] is not None]
        sizes = sorted({row["world_size"] for row in run.rows})
        dollars = [event["dollars"] for event in run.events if event["event"] == "cost"]
        table.add_row(
            run.name,
            f"{seen:,}",
            f"{sum(losses) / len(losses):.4f}" if losses else "-",
            span(up_s),
            f"{seen / up_s:.2f}" if up_s else "-",
            "-" if split.goodput != split.goodput else f"{split.goodput:.0%}",
            "-".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1]))),
            str(len({row["generation"] for row in run.rows}) - 1),
            f"${sum(dollars):,.2f}" if dollars else "-",
        )
    return table


def _settings(runs: list[Compared]) -> Table:
    settings = {
        run.name: config.flat(run.run.config.model_dump(mode="json", by_alias=True)) | _initial(run) for run in runs
    }
    table = Table("setting", *settings, title="settings that differ")
    for key, values in comparison.differing(settings):
        table.add_row(key, *values)
    if not table.rows:
        table.title = "no setting differs"
    return table


def _initial(run: Compared) -> dict[str, Any]:
    """What the weights were that it began with, if they were another run's."""
    begun = asdict(run.run.initial) if run.run.initial else {}
    return {f"initial.{key}": value for key, value in begun.items() if value and key != "sha256"}


def _caveats(runs: list[Compared]) -> list[str]:
    """What makes scores of these runs hard to compare."""
    lines = []
    if len({run.run.dataset_identity for run in runs}) > 1:
        lines.append("these runs are of other data, preprocessing or labels: their scores are of other cases")
    elif len({run.run.config.data.fold for run in runs}) > 1:
        lines.append("these runs hold out other folds: their scores are of other cases")
    elif len({run.run.config.validate_.max_cases for run in runs}) > 1:
        lines.append("these runs validate on other numbers of cases (validate.max_cases)")
    names = {outputs.place(run.run_dir): run.name for run in runs}
    for run in runs:
        if begun := run.run.initial:
            whose = f"{names.get(begun.run, begun.run)}, checkpoint {begun.checkpoint}"
            lines.append(f"{run.name} began with the weights of {whose}: its samples are not all that it learned from")
    return lines


def _curve(run: Compared) -> Curve:
    samples, loss = [row["samples_seen"] for row in run.rows], [row["loss"] for row in run.rows]
    return Curve(run.name, samples, loss, [(each.samples_seen, each.mean) for each in run.validations])


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "compare", argv)


if __name__ == "__main__":
    sys.exit(main())
