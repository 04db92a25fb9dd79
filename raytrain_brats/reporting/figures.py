"""Every chart of a run, drawn in memory.

In: rows and events of a run, seconds by kind, scores of cases.
Out: PNG bytes, with a transparent ground, in a light and a dark variant. Pictures of cases: `overlays`.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import isfinite
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raytrain_brats.reporting import scores
from raytrain_brats.reporting.goodput import validation_span

Row = Mapping[str, Any]
Array = np.ndarray

# Told apart with every common colour blindness: they differ in lightness, not in hue alone. (The ten causes by 18 units
# of CIELAB at least, as protan, deutan and tritan eyes see them.)
REGION_COLOURS = {"WT": "#3fa7e6", "TC": "#f2ae00", "ET": "#e0478a"}
TIME_COLOURS = {  # by the causes of `goodput.TimeBreakdown`
    "productive": "#159183",
    "data wait": "#f2ae00",
    "checkpoint": "#3064c8",
    "validation": "#b292ea",
    "recovery": "#e0603a",
    "redone": "#9f2485",
    "unsaved": "#88dca7",
    "other": "#80564d",
    "unrecorded": "#decd73",
    "stopped": "#c4cad0",
}
_GREY = "#a9b0b9"
_LANES = {  # event kind: (name, marker, colour)
    "group": ("group start", "^", TIME_COLOURS["productive"]),
    "checkpoint": ("checkpoint", "o", TIME_COLOURS["checkpoint"]),
    "validation": ("validation", "D", TIME_COLOURS["validation"]),
    "chaos": ("chaos kill", "X", TIME_COLOURS["recovery"]),
}


def theme(dark: bool) -> dict[Any, Any]:
    ink, faint = ("#c9d1da", "#3a424d") if dark else ("#3d4650", "#d5dae0")
    inks = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), ink)
    lines = dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), faint)
    ground = {"axes.facecolor": "none", "figure.facecolor": "none", "axes.titlelocation": "left"}
    look = {"font.size": 9.5, "legend.fontsize": 8.5, "legend.frameon": False, "ytick.major.size": 0}
    axes = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True}
    return {**inks, **lines, **ground, **look, **axes, "axes.titlesize": 10}


def png(figure: Figure, dpi: int = 150) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=dpi, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return target.getvalue()


def _samples_axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="samples seen")
    axes.xaxis.set(major_locator=MaxNLocator(6, integer=True), major_formatter="{x:,.0f}")
    return figure, axes


def running_mean(values: Array) -> tuple[Array, int]:
    """(centred mean over a twenty-fifth of the values, 500 at most, fewer at the ends; over how many). A value that is
    not finite carries no weight."""
    known, window = np.isfinite(values), min(max(1, len(values) // 25), 500) | 1
    parts = np.where(known, values, 0.0), known
    total, count = (np.convolve(x, np.ones(window), "same")[: len(values)] for x in parts)  # else as long as the window
    return np.where(count > 0.5, total / np.maximum(count, 1), np.nan), window


def loss_curve(rows: Sequence[Row], dark: bool = False) -> bytes:
    """Loss over samples seen: each step faint, its running mean strong, restarts as vertical lines."""
    seen, loss = np.array([(row["samples_seen"], row["loss"]) for row in rows], dtype=float).T
    restarts = [after for before, after in pairwise(rows) if before["generation"] != after["generation"]]
    with matplotlib.rc_context(theme(dark)):
        figure, axes = _samples_axes("Training loss")
        axes.plot(seen, loss, color=_GREY, lw=0.8, alpha=0.7, label="each step")
        mean, window = running_mean(loss)
        label = f"mean of {window} steps" if window > 1 else None
        axes.plot(seen, mean, ".-" if len(rows) < 30 else "-", color=TIME_COLOURS["productive"], lw=2.2, label=label)
        for row in restarts:
            start, name = row["positions"][0], f"group {row['generation']}" if len(restarts) <= 12 else ""
            axes.axvline(start, color=TIME_COLOURS["recovery"], lw=min(0.9, 12 / len(restarts)), ls="--", zorder=1)
            look: dict[str, Any] = {"color": TIME_COLOURS["recovery"], "size": 7.5, "rotation": 90, "va": "top"}
            axes.annotate(name, (start, 1), (3, 0), axes.get_xaxis_transform(), "offset points", **look)
        axes.legend(loc="best" if len(rows) < 2000 else "upper right")
        return png(figure)


def dice_curve(validations: Sequence[Row], earlier: Sequence[Row] = (), dark: bool = False) -> bytes:
    """Validation Dice of WT, TC and ET over samples seen, named at their last value; of an earlier run dotted."""
    seen = [row["samples_seen"] for row in validations]
    curves = {r: np.array([row["dice"].get(r) for row in validations], dtype=float) for r in REGION_COLOURS}
    ends = {r: float(known[-1]) for r, curve in curves.items() if len(known := curve[np.isfinite(curve)])}
    with matplotlib.rc_context(theme(dark)):
        figure, axes = _samples_axes("Validation Dice" if ends else "Validation Dice: none yet")
        axes.set_ylim(-0.02, 1.02)
        for region, colour in REGION_COLOURS.items() if earlier else ():
            before = np.array([row["dice"].get(region) for row in earlier], dtype=float)
            axes.plot([row["samples_seen"] for row in earlier], before, ":", color=colour, lw=1.6, alpha=0.8)
        label_y = -1.0
        for region, end in sorted(ends.items(), key=lambda item: item[1]):
            axes.plot(seen, curves[region], "o-", color=REGION_COLOURS[region], lw=2, ms=4.5)
            label_y = max(end, label_y + 0.075)  # labels keep a distance, whatever the scores
            look: dict[str, Any] = {"va": "center", "color": REGION_COLOURS[region], "fontweight": "bold"}
            axes.text(1.02, label_y, f"{region} {end:.2f}", transform=axes.get_yaxis_transform(), **look)
        return png(figure)


def wall_span(rows: Sequence[Row], events: Sequence[Row]) -> tuple[float, float]:
    """Unix seconds of the first launch (or first step) and of the last thing known of the run."""
    starts = [row["time"] - row["step_s"] for row in rows[:1]]
    starts += [e["time"] for e in events if e["event"] == "launch"] or [e["time"] for e in events]
    return min(starts), max([*starts, *(row["time"] for row in [*rows, *events])])


def stopped_spans(rows: Sequence[Row], events: Sequence[Row]) -> list[tuple[float, float]]:
    """Pauses between the last sign of life of one driver and the launch of the next."""
    launches = sorted(event["time"] for event in events if event["event"] == "launch")[1:]
    times = np.sort(np.array([row["time"] for row in [*rows, *events]], dtype=float))
    return [(float(times[before - 1]), t) for t in launches if (before := int(np.searchsorted(times, t))) > 0]


def _joined(spans: Iterable[tuple[float, float, int]], tolerance_s: float) -> list[tuple[float, float, int]]:
    """Sorted (start, end, height) with neighbours of equal height joined across gaps up to the tolerance."""
    joined: list[tuple[float, float, int]] = []
    for start, end, height in sorted(spans):
        if joined and joined[-1][2] == height and start - joined[-1][1] <= tolerance_s:
            start, end = joined[-1][0], max(end, joined.pop()[1])
        joined.append((start, end, height))
    return joined


def _areas(rows: Sequence[Row], events: Sequence[Row], top: int) -> dict[str, list[tuple[float, float, int]]]:
    """(start, end, height) of what filled the wall time, by its name in TIME_COLOURS."""
    origin, end = wall_span(rows, events)
    tolerance_s = max(1.0, 4 * float(np.median([row["step_s"] for row in rows])), (end - origin) / 1500)
    training = _joined(((row["time"] - row["step_s"], row["time"], row["world_size"]) for row in rows), tolerance_s)
    validation = [(*validation_span(e), top) for e in events if e["event"] == "validation"]
    stopped = [(*span, top) for span in stopped_spans(rows, events)]
    busy = _joined(((a, b, 0) for a, b, _ in [*training, *validation, *stopped, (end, end, 0)]), tolerance_s)
    gaps = zip([origin, *(span[1] for span in busy)], [span[0] for span in busy], strict=False)
    lost = [(a, b, top) for a, b in gaps if b - a > tolerance_s]
    named = {"productive": training, "recovery": lost, "validation": validation, "stopped": stopped}
    return {name: spans for name, spans in named.items() if spans}


def worker_timeline(rows: Sequence[Row], events: Sequence[Row], dark: bool = False, narrow: bool = False) -> bytes:
    """How many workers trained when, what happened in between, and one lane of marks per kind of event; `narrow`: to be
    read at a phone's width."""
    origin, end = wall_span(rows, events)
    unit, unit_s = next(((n, s) for n, s in (("h", 3600), ("min", 60)) if end - origin > 3 * s), ("s", 1))
    lanes = {kind: lane for kind, lane in _LANES.items() if any(e["event"] == kind for e in events)}
    top = max(row["world_size"] for row in rows)
    labels = {"productive": "training", "recovery": "start-up, recovery, redone"}  # rows do not tell them apart
    with matplotlib.rc_context(theme(dark)):
        figure = Figure(figsize=(5.4 if narrow else 10.6, 2.6 + 0.22 * len(lanes) + 0.4 * narrow), layout="constrained")
        axes, marks = figure.subplots(2, 1, sharex=True, height_ratios=[1.7, 0.12 + 0.22 * len(lanes)])
        for name, spans in _areas(rows, events, top).items():
            start, stop, height = np.array(spans, dtype=float).T
            look: dict[str, Any] = {
                "color": TIME_COLOURS[name],
                "alpha": 0.9 if name == "productive" else 0.32,
                "lw": 0,
            }
            axes.bar(
                (start - origin) / unit_s,
                height,
                (stop - start) / unit_s,
                align="edge",
                label=labels.get(name, name),
                **look,
            )
        axes.set(title="World size", ylim=(0, top * 1.04))
        if narrow:
            figure.legend(ncols=2, loc="outside lower center")
        else:
            axes.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        for lane, (kind, (_, marker, colour)) in enumerate(lanes.items()):
            times = [(e["time"] - origin) / unit_s for e in events if e["event"] == kind]
            marks.scatter(times, [lane] * len(times), s=32, marker=marker, color=colour, lw=0, clip_on=False)
        marks.set_yticks(range(len(lanes)), [name for name, _, _ in lanes.values()])
        marks.set(xlim=(0, (end - origin) / unit_s or 1), ylim=(len(lanes) - 0.4, -0.6), xlabel=f"{unit} since launch")
        return png(figure)


def time_split(seconds: Mapping[str, float], dark: bool = False) -> bytes:
    """One stacked bar of the wall time; `seconds` by cause."""
    total, left = sum(seconds.values()) or 1.0, 0.0
    with matplotlib.rc_context(theme(dark)):
        figure = Figure(figsize=(10.6, 0.5))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(-0.5, 0.5), frame_on=False)
        for name, part in seconds.items():
            share = part / total
            axes.barh(0, share, left=left, height=1, color=TIME_COLOURS[name])
            label = f"{name} {share:.0%}" if share > 0.04 + 0.0095 * len(name) else f"{share:.0%}" * (share > 0.04)
            ink = "white" if name in ("productive", "checkpoint", "recovery", "redone", "other") else "#1c2127"
            axes.text(left + share / 2, 0, label, ha="center", va="center_baseline", color=ink, weight="bold")
            left += share
        return png(figure)


_SHOWN = {  # metric: (title, the end of its axis; None where it is open)
    "dice": ("Dice", 1.0),
    "hd95": ("HD95, mm", None),
    "nsd_1mm": ("Surface Dice at 1 mm", 1.0),
    "lesion_dice_2023": ("Lesion-wise Dice, 2023", 1.0),
    "lesion_dice_2024": ("Lesion-wise Dice, 2024", 1.0),
}


def distributions(rows: Sequence[Row], dark: bool = False, narrow: bool = False) -> bytes:
    """Every case as a point over a box from quartile to quartile, a panel a metric, a box a region; `narrow`: two
    panels a line, to be read at a phone's width."""
    names = {c: name for c in scores.columns_of(rows) if (name := scores.name_of(c)) and name[0] in _SHOWN}
    values = {c: [v for row in rows if (v := scores.number(row.get(c))) is not None and isfinite(v)] for c in names}
    kinds = list(dict.fromkeys(names[c][0] for c, found in values.items() if found))
    with matplotlib.rc_context(theme(dark)):
        across = max(min(len(kinds), 2) if narrow else len(kinds), 1)
        down = -(-len(kinds) // across) or 1
        figure = Figure(figsize=((2.7 if narrow else 2.1) * across, 2.6 * down), layout="constrained")
        for place, kind in enumerate(kinds, 1):
            title, end = _SHOWN[kind]
            axes = figure.add_subplot(down, across, place, title=title)
            shown = {names[c][1]: found for c, found in values.items() if names[c][0] == kind and found}
            ink = {"color": matplotlib.rcParams["text.color"]}
            axes.boxplot(
                list(shown.values()), tick_labels=list(shown), widths=0.6, showfliers=False,
                medianprops=ink, boxprops=ink, whiskerprops=ink, capprops=ink,
            )  # fmt: skip
            for number, (region, found) in enumerate(shown.items(), 1):
                beside = number + np.linspace(-0.18, 0.18, len(found)) * (len(found) > 1)
                axes.scatter(beside, found, s=9, alpha=0.6, lw=0, color=REGION_COLOURS.get(region, _GREY), zorder=3)
            if end:
                axes.set_ylim(-0.03, end + 0.03)
            else:
                axes.set_yscale("symlog", linthresh=10)
            axes.tick_params("x", labelrotation=0 if len(shown) < 5 else 60)
        return png(figure)
