"""Runs side by side. Runs in the driver.

In: of each run its validations, rows and settings. Out: the settings in which they differ; a picture of loss and Dice.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raytrain_brats.reporting.figures import running_mean

COLOURS = ("#3064c8", "#e0603a", "#159183", "#9f2485", "#f2ae00", "#80564d", "#e0478a", "#3fa7e6")
_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Curve:
    """What is drawn of one run."""

    name: str
    samples: Sequence[int]
    loss: Sequence[float | None]
    """Of each step."""
    validations: Sequence[tuple[int, float]]
    """(samples seen, mean Dice)."""


def differing(settings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of all settings that are not the same in all of {run: {key: value}}."""
    keys = sorted({key for mine in settings.values() for key in mine})
    found = []
    for key in keys:
        values = [str(mine.get(key, "-")) for mine in settings.values()]
        if len(set(values)) > 1:
            found.append((key, values))
    return found


def picture(curves: Sequence[Curve], made_by: str) -> bytes:
    """PNG: the running mean of the loss, and the mean Dice of held-out cases, over samples seen."""
    look: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#d5dae0",
    }
    with matplotlib.rc_context({**look, "font.size": 9.5, "legend.frameon": False, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(10.6, 3.8), layout="constrained")
        loss, dice = figure.subplots(1, 2, sharex=True)
        for number, curve in enumerate(curves):
            ink: dict[str, Any] = {
                "color": COLOURS[number % len(COLOURS)],
                "ls": _STYLES[number // len(COLOURS) % len(_STYLES)],
                "label": curve.name,
            }
            if curve.samples:
                loss.plot(curve.samples, running_mean(np.array(curve.loss, dtype=float))[0], lw=1.8, **ink)
            if curve.validations:
                seen, mean = zip(*curve.validations, strict=True)
                dice.plot(seen, mean, marker="o", ms=3.5, lw=1.8, **ink)
            else:
                dice.plot([], [], **ink)
        loss.set(title="Training loss", xlabel="samples seen")
        dice.set(title="Mean validation Dice", xlabel="samples seen", ylim=(-0.02, 1.02))
        loss.set_xlim(left=0)
        for axes in (loss, dice):
            axes.xaxis.set(major_locator=MaxNLocator(6, integer=True), major_formatter="{x:,.0f}")
        figure.legend(*dice.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=150, metadata={"Software": made_by})
        return target.getvalue()
