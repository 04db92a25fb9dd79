"""One self-contained page about a run: scores, curves, workers, where the time went.

In: a run folder (local or s3://); only rows of steps must be there.
Out: `report.html` beside it. A page of the same run is replaced, by its own word (a meta tag); any other file is not.
"""

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import jinja2
import yaml

from raytrain_brats import books, outputs, storage
from raytrain_brats.errors import UserError
from raytrain_brats.reporting import figures, goodput, planned, provenance, scores
from raytrain_brats.reporting.goodput import Recovery, TimeBreakdown

Row = dict[str, Any]
REGIONS = tuple(figures.REGION_COLOURS)
REPORT, GENERATOR, HEAD_BYTES = "report.html", f"{outputs.PROGRAM} report", 2000
MOST_CASES, MOST_OVERLAYS, MOST_LINES, MOST_RECOVERIES = 50, 12, 200, 20


def _number(value: Any, digits: int = 3) -> str:
    try:
        number = float(value)
    except (TypeError, ValueError, jinja2.UndefinedError):
        return "–"
    return "–" if math.isnan(number) else "∞" if math.isinf(number) else f"{number:,.{digits}f}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


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


def _evaluation(run_dir: str, files: Mapping[str, int]) -> Row:
    """Summary, cases (worst mean Dice first) and overlays, as far as they are there."""
    found: Row = {"summary": {}, "cases": [], "overlays": [], "statistics": []}
    if "evaluation/summary.json" in files:
        found["summary"] = json.loads(storage.read_bytes(storage.join(run_dir, "evaluation/summary.json")))
    if "evaluation/cases.csv" in files:
        text = storage.read_bytes(storage.join(run_dir, "evaluation/cases.csv")).decode()
        found["cases"] = scores.worst_first(scores.read(text))
    found["statistics"] = list(scores.by_column(found["cases"]).values())
    order = {case["case"]: rank for rank, case in enumerate(found["cases"])}
    pictures = [f for f in files if f.startswith("evaluation/overlays/") and f.endswith(".png")]
    names = {name: name.rsplit("/", 1)[1].removesuffix(".png") for name in pictures}
    for name in sorted(pictures, key=lambda f: (order.get(names[f], len(order)), f))[:MOST_OVERLAYS]:
        picture = _base64(storage.read_bytes(storage.join(run_dir, name)))
        found["overlays"].append({"case": names[name], "png": picture})
    found["num_overlays"] = len(pictures)
    return found


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
        ("final loss", _number(sum(tail) / len(tail), 4), f"mean of the last {len(tail)} steps"),
        ("samples seen", f"{last['samples_seen']:,}", done),
        ("steps", f"{len(rows):,}", f"{bad:,} samples could not be read" if bad else "every sample was read"),
        ("workers", "–".join(str(w) for w in dict.fromkeys((worlds[0], worlds[-1]))),
         f"{restarts} restart{'s' * (restarts != 1)} of the group"),
        ("goodput", share, "time in steps that were kept / time the run was up"),
        ("samples / s", _number(samples / active_s if active_s else math.nan, 2),
         f"{_number(samples / in_steps_s if in_steps_s else math.nan, 2)} within steps"),
        ("data wait", f"{wait_s / in_steps_s:.1%}" if in_steps_s else "–", f"of the time within steps; {stay}"),
        ("stood still", f"{sum(stalls) / active_s:.1%}" if active_s else "–",
         "of the time the run was up: {:.1%} waiting for data, {:.1%} saving, {:.1%} validating".format(
             *(stall / active_s if active_s else 0.0 for stall in stalls))),
        ("wall time", _duration(split.wall_s), f"{_duration(split.stopped_s)} of it stopped"),
        *_cost(events),
        *([("planned", f"{_number(plan.samples_per_s, 2)} samples / s", str(plan))] if plan else []),
    ]  # fmt: skip


def _cost(events: Sequence[Row]) -> list[tuple[str, ...]]:
    """Nothing where no prices were given."""
    costs = [event for event in events if event["event"] == "cost"]
    if not costs:
        return []
    note = f"${costs[-1]['dollars_per_hour']:,.2f} an hour at last; while a driver ran, by the prices given"
    return [("cost", f"${sum(event['dollars'] for event in costs):,.2f}", note)]


def _scores(evaluation: Row, validations: Sequence[Row]) -> tuple[dict[str, Any], str]:
    """Dice by region and where it comes from: the evaluation, else the last validation."""
    if summary := evaluation["summary"]:
        note = f"{summary.get('split', 'held-out')} split, {summary.get('cases', '?')} cases"
        return summary.get("dice", {}), f"{note}, {summary.get('checkpoint', 'checkpoint unknown')}"
    if validations:
        return validations[-1]["dice"], f"validation at {validations[-1]['samples_seen']:,} samples"
    return {}, ""


def _mapping(config: str) -> Row:
    """config.yaml's content; {} where there is none, or something else."""
    found = yaml.safe_load(config)
    return found if isinstance(found, dict) else {}


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


def _target(run_dir: str, out: str, files: Mapping[str, int], run: str, overwrite: bool) -> str:
    """Where the page goes. Raises UserError when something else than a report of this run would be replaced."""
    target = storage.normal(out) if out else storage.join(run_dir, REPORT)
    own = [storage.join(run_dir, name) for name in files if name != REPORT]
    tag = f'<meta name="generator" content="{GENERATOR}" data-run="{run}">'.encode()
    outputs.claim_file(target, lambda page: tag in page[:HEAD_BYTES], protected=own, overwrite=overwrite)
    return target


def write_report(run_dir: str, out: str = "", overwrite: bool = False) -> str:
    """Write the page and return its URI. Raises UserError when there is no run to report, or a file that is no report
    of it stands there."""
    run_dir = storage.normal(run_dir)
    files = storage.list_files(run_dir)
    if not files:
        raise UserError(f"{run_dir}: no such run folder, or an empty one; name the folder that `train` wrote")
    torn: list[str] = []
    rows, events = books.read_rows(run_dir, torn=torn), books.read_events(run_dir, torn)
    if not rows:
        raise UserError(f"{run_dir}: metrics/ is missing or empty; report after the run's first step")
    run = hashlib.sha256(json.dumps((events or rows)[0]).encode()).hexdigest()[:16]
    target = _target(run_dir, out, files, run, overwrite)
    config = storage.read_bytes(storage.join(run_dir, "config.yaml")).decode() if "config.yaml" in files else ""
    split, recoveries = (
        goodput.time_breakdown(events, rows),
        goodput.recoveries(events),
    )  # the books' order is the true one
    events = sorted((e for e in events if "event" in e and "time" in e), key=lambda event: float(event["time"]))
    validations = [event for event in events if event["event"] == "validation"]
    evaluation, (origin, end) = _evaluation(run_dir, files), figures.wall_span(rows, events)
    groups, (dice, dice_source) = _groups(rows, events, origin), _scores(evaluation, validations)
    drawn = {
        "loss": _pair(figures.loss_curve, rows),
        "dice": _pair(figures.dice_curve, validations) if validations else None,
        "workers": _pair(figures.worker_timeline, rows, events),
        "split": _pair(figures.time_split, split.parts()),
        "scores": _pair(figures.distributions, evaluation["cases"]) if evaluation["statistics"] else None,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raytrain_brats.reporting", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "duration": _duration}
    page = environment.get_template("report.html.j2").render(
        generator=GENERATOR, run=run, run_dir=run_dir, ending=_ending(events),
        began=datetime.fromtimestamp(origin, UTC), ended=datetime.fromtimestamp(end, UTC),
        launch=next((e for e in events if e["event"] == "launch"), {}),
        headline=_headline(rows, events, split, len(groups), planned.read(run_dir)), dice=dice, dice_source=dice_source,
        phantom=_on_phantoms(evaluation["summary"], yaml.safe_load(config)), figures=drawn, split=split,
        validations=validations, evaluation=evaluation, quarantined=_quarantined(events), groups=groups,
        recoveries=_recoveries(recoveries), steps=goodput.STEPS,
        made_by=provenance.table(events, rows, _mapping(config), split.wall_s - split.stopped_s),
        config=config, torn=len(torn), origin=origin, regions=figures.REGION_COLOURS,
        time_colours=figures.TIME_COLOURS, most_cases=MOST_CASES, most_lines=MOST_LINES,
    )  # fmt: skip
    storage.write_bytes(target, page.encode())
    return target
