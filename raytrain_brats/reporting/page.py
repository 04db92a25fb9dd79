"""One self-contained page about a run: scores, curves, workers, where the time went.

In: a run folder (local or s3://), of which only rows of steps must be there; perhaps an earlier run to stand beside it.
Out: `report.html` beside it. A page of the same run is replaced, by its own word (a meta tag); any other file is not.
"""

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jinja2
import yaml

from raytrain_brats import books, outputs, storage
from raytrain_brats.errors import UserError
from raytrain_brats.reporting import beside, evaluated, facts, figures, goodput, planned, provenance
from raytrain_brats.reporting.evaluated import Evaluated
from raytrain_brats.reporting.facts import duration, number, signed
from raytrain_brats.reporting.goodput import Recovery, TimeBreakdown

Row = dict[str, Any]
REGIONS = tuple(figures.REGION_COLOURS)
REPORT, GENERATOR, HEAD_BYTES = "report.html", f"{outputs.PROGRAM} report", 2000
MOST_CASES, MOST_OVERLAYS, MOST_LINES, MOST_RECOVERIES = 50, 12, 200, 20
OPEN_OVERLAYS = 3
"""Overlays that stand open on the page; the others are folded."""


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    run_dir: str
    files: Mapping[str, int]
    rows: list[Row]
    events: list[Row]
    """By time."""
    torn: int
    config: str
    """config.yaml, as it is."""
    evaluated: Evaluated
    split: TimeBreakdown
    recoveries: list[Recovery] = field(repr=False)

    @cached_property
    def about(self) -> Row:
        """What config.yaml holds; nothing where it is no YAML of ours."""
        try:
            found = yaml.safe_load(self.config)
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def settings(self) -> Row:
        found = self.about.get("config")
        return found if isinstance(found, dict) else {}

    @property
    def launch(self) -> Row:
        """The first."""
        return next((e for e in self.events if e["event"] == "launch"), {})

    @property
    def validations(self) -> list[Row]:
        return [event for event in self.events if event["event"] == "validation"]

    @property
    def identity(self) -> str:
        """Which run it is, wherever its folder is."""
        return hashlib.sha256(json.dumps((self.events or self.rows)[0]).encode()).hexdigest()[:16]


def _read(run_dir: str) -> Run:
    """Raises UserError when there is no run, or one without a step."""
    run_dir = storage.normal(run_dir)
    files = storage.list_files(run_dir)
    if not files:
        raise UserError(f"{run_dir}: no such run folder, or an empty one; name the folder that `train` wrote")
    torn: list[str] = []
    rows, events = books.read_rows(run_dir, torn=torn), books.read_events(run_dir, torn)
    if not rows:
        raise UserError(f"{run_dir}: metrics/ is missing or empty; report after the run's first step")
    rows = goodput.from_first_batch(events, rows)
    config = storage.read_bytes(storage.join(run_dir, "config.yaml")).decode() if "config.yaml" in files else ""
    split, recoveries = (
        goodput.time_breakdown(events, rows),
        goodput.recoveries(events),
    )  # the books' order is the true one
    known = sorted((e for e in events if "event" in e and "time" in e), key=lambda event: float(event["time"]))
    found = evaluated.read(run_dir, files)
    return Run(run_dir, files, rows, known, len(torn), config, found, split, list(recoveries))


def _groups(rows: Sequence[Row], events: Sequence[Row], origin: float) -> list[Row]:
    """One row per worker-group start. Matched by time, since two launches may number alike."""
    starts = [event for event in events if event["event"] == "group"]
    table = []
    for start, until in zip(starts, [*(e["time"] for e in starts[1:]), math.inf], strict=False):
        workers = [e for e in events if e["event"] == "worker" and start["time"] <= e["time"] < until]
        steps = [row for row in rows if start["time"] <= row["time"] < until]
        places = Counter(f"{w.get('node', '?')} {w.get('device', '')}".strip() for w in workers)
        where = ", ".join(f"{count} × {place}" if count > 1 else place for place, count in places.items())
        world = steps[0]["world_size"] if steps else len(workers)
        table.append({**start, "at": start["time"] - origin, "world": world, "where": where})
    return table


def _recoveries(found: Sequence[Recovery]) -> Row:
    """The slowest, and quantiles over all: of recoveries, not of launches."""
    slowest = sorted(found, key=lambda r: (math.isnan(r.total_s), -r.total_s))[:MOST_RECOVERIES]
    after = [r for r in found if r.cause != "launch"]
    table = {"total_s": [r.total_s for r in after]} | {name: [r.steps_s[name] for r in after] for name in goodput.STEPS}
    quantiles = {f"p{share}": {n: _quantile(column, share) for n, column in table.items()} for share in (50, 95)}
    return {"shown": slowest, "total": len(found), "quantiles": quantiles if after else {}}


def _quantile(values: Sequence[float], percent: int) -> float:
    """By nearest rank, so that it is one of the values."""
    known = sorted(value for value in values if not math.isnan(value))
    return known[math.ceil(percent / 100 * len(known)) - 1] if known else math.nan


def _quarantined(events: Sequence[Row]) -> list[Row]:
    found = [event for event in events if event["event"] == "quarantine"]
    times = Counter((str(e.get("case")), str(e.get("reason")), str(e.get("detail") or "")) for e in found)
    return [{"case": c, "reason": r, "detail": d, "count": n} for (c, r, d), n in sorted(times.items())]


def _overlays(run: Run) -> tuple[list[dict[str, str]], int]:
    """Pictures of the worst cases, worst first, and how many there are."""
    order = {str(case["case"]): rank for rank, case in enumerate(run.evaluated.cases)}
    pictures = [f for f in run.files if f.startswith("evaluation/overlays/") and f.endswith(".png")]
    names = {name: name.rsplit("/", 1)[1].removesuffix(".png") for name in pictures}
    chosen = sorted(pictures, key=lambda f: (order.get(names[f], len(order)), f))[:MOST_OVERLAYS]
    contents = {name: _base64(storage.read_bytes(storage.join(run.run_dir, name))) for name in chosen}
    return [{"case": names[name], "png": content} for name, content in contents.items()], len(pictures)


def _side(run: Run) -> beside.Side:
    samples = run.rows[-1]["samples_seen"]
    active_s = run.split.wall_s - run.split.stopped_s
    costs = [e["dollars"] for e in run.events if e["event"] == "cost"]
    losses = [row["loss"] for row in run.rows[-20:] if row["loss"] is not None]
    done = sum(row["positions"][1] - row["positions"][0] for row in run.rows)
    speed = {
        "samples seen": float(samples),
        "final loss": sum(losses) / len(losses) if losses else math.nan,
        "samples / s": done / active_s if active_s else math.nan,
        "goodput": run.split.goodput,
        "wall time, h": run.split.wall_s / 3600,
    } | ({"cost, $": sum(costs)} if costs else {})
    return beside.Side(run.run_dir, run.evaluated, run.about, speed)


def _beside(run: Run, earlier: Run) -> Row:
    """What the page shows of both."""
    here, there = _side(run), _side(earlier)
    return {
        "run_dir": earlier.run_dir, "lines": beside.lines(here, there), "paired": beside.paired(here, there),
        "cautions": beside.cautions(here, there), "settings": beside.settings(here, there),
    }  # fmt: skip


def _headline(
    rows: Sequence[Row], events: Sequence[Row], split: TimeBreakdown, num_groups: int, plan: planned.Planned | None
) -> list[tuple[str, ...]]:
    """(name, value, note) of every number at the top."""
    last = rows[-1]
    tail = [row["loss"] for row in rows[-20:] if row["loss"] is not None] or [math.nan]  # none where nothing counted
    total = next((e["total_samples"] for e in reversed(events) if e.get("total_samples")), None)
    done = f"of {total:,} ({min(last['samples_seen'] / total, 1):.0%})" if total else ""
    worlds = sorted({row["world_size"] for row in rows})
    samples = sum(row["positions"][1] - row["positions"][0] for row in rows)
    active_s, in_steps_s = split.wall_s - split.stopped_s, sum(row["step_s"] for row in rows)
    stalls = (split.data_wait_s, split.checkpoint_s, split.validation_s)
    bad, restarts = sum(row["bad"] for row in rows), max(num_groups, len({r["generation"] for r in rows})) - 1
    wait_s = sum(min(max(row["wait_s"], 0.0), row["step_s"]) for row in rows)
    where = next((e["where"] for e in reversed(events) if e["event"] == "residency"), "stream")
    stay = {"device": "cases stay on the GPU", "host": "cases stay in shared memory"}.get(where, "cases are streamed")
    share = "–" if math.isnan(split.goodput) else f"{split.goodput:.1%}"
    return [
        ("final loss", number(sum(tail) / len(tail), 4), f"mean of the last {len(tail)} steps"),
        ("samples seen", f"{last['samples_seen']:,}", done),
        ("steps", f"{len(rows):,}", f"{bad:,} samples could not be read" if bad else "every sample was read"),
        ("workers", "–".join(str(w) for w in dict.fromkeys((worlds[0], worlds[-1]))),
         f"{restarts} restart{'s' * (restarts != 1)} of the group"),
        ("goodput", share, "time in steps that were kept / time the run was up"),
        ("samples / s", number(samples / active_s if active_s else math.nan, 2),
         f"{number(samples / in_steps_s if in_steps_s else math.nan, 2)} within steps"),
        ("data wait", f"{wait_s / in_steps_s:.1%}" if in_steps_s else "–", f"of the time within steps; {stay}"),
        ("stood still", f"{sum(stalls) / active_s:.1%}" if active_s else "–",
         "of the time the run was up: {:.1%} waiting for data, {:.1%} saving, {:.1%} validating".format(
             *(stall / active_s if active_s else 0.0 for stall in stalls))),
        ("wall time", duration(split.wall_s), f"{duration(split.stopped_s)} of it stopped"),
        *facts.cost(events),
        *([("planned", f"{number(plan.samples_per_s, 2)} samples / s", str(plan))] if plan else []),
    ]  # fmt: skip


def _scores(found: Evaluated, validations: Sequence[Row]) -> tuple[dict[str, Any], str]:
    """Dice by region and where it comes from: the evaluation, else the last validation."""
    if summary := found.summary:
        note = f"{summary.get('split', 'held-out')} split, {summary.get('cases', '?')} cases"
        return summary.get("dice", {}), f"{note}, {summary.get('checkpoint', 'checkpoint unknown')}"
    if validations:
        return validations[-1]["dice"], f"validation at {validations[-1]['samples_seen']:,} samples"
    return {}, ""


def _on_phantoms(summary: Row, config: Any) -> bool:
    """By the evaluation's word, else by the configuration's `synthetic`."""
    if "data" in summary:
        return str(summary["data"]) == "phantom"
    return bool(config.get("synthetic")) if isinstance(config, dict) else False


def _ending(events: Sequence[Row]) -> str:
    last = next((e for e in reversed(events) if e["event"] in ("launch", "finish", "stop")), {"event": ""})
    known = {"finish": "finished", "stop": f"stopped: {last.get('reason', 'no reason given')}"}
    return known.get(last["event"], "no end recorded: running, or cut off")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _pair(draw: Callable[..., bytes], *args: Any) -> dict[str, str]:
    return {"light": _base64(draw(*args)), "dark": _base64(draw(*args, dark=True))}


def _wide(draw: Callable[..., bytes], *args: Any) -> dict[str, str]:
    """Of a picture that would be too small on a phone, also one for its width."""
    narrow = _pair(partial(draw, narrow=True), *args)
    return _pair(draw, *args) | {f"narrow_{name}": picture for name, picture in narrow.items()}


def _target(run_dir: str, out: str, files: Mapping[str, int], run: str, overwrite: bool) -> str:
    """Where the page goes. Raises UserError when something else than a report of this run would be replaced."""
    target = storage.normal(out) if out else storage.join(run_dir, REPORT)
    own = [storage.join(run_dir, name) for name in files if name != REPORT]
    tag = f'<meta name="generator" content="{GENERATOR}" data-run="{run}">'.encode()
    outputs.claim_file(target, lambda page: tag in page[:HEAD_BYTES], protected=own, overwrite=overwrite)
    return target


def write_report(run_dir: str, out: str = "", overwrite: bool = False, *, earlier: str = "", title: str = "") -> str:
    """Write the page and return its URI; `earlier`: a run to stand beside it.

    Raises UserError when there is no run to report, or a file that is no report of it stands there.
    """
    run = _read(run_dir)
    other = _read(earlier) if earlier else None
    if other and outputs.same(other.run_dir, run.run_dir):
        raise UserError(f"--beside {earlier} is the run itself; name an earlier one")
    target = _target(run.run_dir, out, run.files, run.identity, overwrite)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raytrain_brats.reporting", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "duration": duration, "signed": signed}
    page = environment.get_template("report.html.j2").render(_shown(run, other, title))
    storage.write_bytes(target, page.encode())
    return target


def _shown(run: Run, other: Run | None, title: str) -> Row:
    """Everything that the template names."""
    validations, found = run.validations, run.evaluated
    origin, end = figures.wall_span(run.rows, run.events)
    groups, (dice, dice_source) = _groups(run.rows, run.events, origin), _scores(found, validations)
    pictures, num_pictures = _overlays(run)
    why = evaluated.why_others(validations, found, run.settings, run.launch)
    return {
        "generator": GENERATOR, "run": run.identity, "run_dir": run.run_dir,
        "title": title or facts.title(run.about, run.launch),
        "facts": facts.facts(run.run_dir, run.about, run.events, (origin, end), run.split.wall_s),
        "ending": _ending(run.events), "launch": run.launch,
        "headline": _headline(run.rows, run.events, run.split, len(groups), planned.read(run.run_dir)),
        "dice": dice, "dice_source": dice_source, "phantom": _on_phantoms(found.summary, run.about),
        "figures": _figures(run, other), "split": run.split, "validations": validations, "evaluated": found,
        "how": evaluated.how(found), "why": why, "lesion_year": evaluated.YEAR, "overlays": pictures,
        "num_overlays": num_pictures, "open_overlays": OPEN_OVERLAYS, "beside": _beside(run, other) if other else None,
        "quarantined": _quarantined(run.events), "groups": groups, "recoveries": _recoveries(run.recoveries),
        "made_by": provenance.table(run.events, run.rows, run.about, run.split.wall_s - run.split.stopped_s),
        "steps": goodput.STEPS, "config": run.config, "torn": run.torn, "origin": origin,
        "regions": figures.REGION_COLOURS, "time_colours": figures.TIME_COLOURS, "most_cases": MOST_CASES,
        "most_lines": MOST_LINES,
    }  # fmt: skip


def _figures(run: Run, other: Run | None) -> dict[str, dict[str, str] | None]:
    validations, before = run.validations, other.validations if other else []
    scored = bool(run.evaluated.statistics)
    return {
        "loss": _pair(figures.loss_curve, run.rows),
        "dice": _pair(figures.dice_curve, validations, before) if validations else None,
        "workers": _wide(figures.worker_timeline, run.rows, run.events),
        "split": _pair(figures.time_split, run.split.parts()),
        "scores": _wide(figures.distributions, run.evaluated.cases) if scored else None,
    }
