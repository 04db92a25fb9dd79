"""How a run stands, as a line: whole for a log file, and as much as fits for a terminal. Runs in the driver.

In: the last rows and events of a run, the worker groups before this launch, the width of the terminal.
Out: a `Standing`; its line.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytrain_brats.labels import REGIONS

_RECENT = 20
_SPACE = "  "


@dataclass(frozen=True)
class Standing:
    """Of the newest steps of a run."""

    seen: int
    total: int
    instead: str = ""
    """What is said while no step of this launch, or of its newest worker group, is there."""
    warning: str = ""
    """Since when nothing is saved, and why."""
    left_s: float = 0.0
    loss: float | None = None
    dice: Mapping[str, float] | None = None
    """Of the last validation."""
    speed: float = 0.0
    """Samples a second."""
    waiting: float = 0.0
    """Share of the time spent waiting for data."""
    still: str = ""
    """For what else training stood still."""
    workers: int = 0
    restarts: int = 0
    more: tuple[str, ...] = ()
    """What else there is to say: cost, plan."""


def standing(
    rows: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], total: int, trouble: str = "", before: int = 0
) -> Standing:
    """`before`: the newest worker group of an earlier launch. What it did says nothing about the speed now."""
    failure = unsaved(events, trouble)
    warning = f"not saved since sample {failure[0]:,}: {failure[1]}" if failure else ""
    groups = [e for e in events if e["event"] == "group"]
    begun = groups and groups[-1]["generation"] > before
    if not rows:
        text = f"sample 0 of {total:,}: workers are starting" if begun else "starting"
        return Standing(0, total, text, warning)
    recent = [row for row in rows[-_RECENT:] if row.get("generation", before + 1) > before]
    seen = rows[-1]["samples_seen"]
    if not recent or (begun and groups[-1]["time"] > recent[-1]["time"]):
        number = f"worker group {groups[-1]['generation']} is starting" if begun else "starting"
        return Standing(seen, total, f"sample {seen:,} of {total:,}: {number}", warning)
    if failure and seen >= total:
        text = f"sample {total:,} of {total:,}: waiting for room to save the last checkpoint"
        return Standing(seen, total, text, warning)
    losses = [row["loss"] for row in recent if row["loss"] is not None]
    seconds = max(sum(row["step_s"] for row in recent), 1e-9)
    speed = sum(row["positions"][1] - row["positions"][0] for row in recent) / seconds
    scored = [e for e in events if e["event"] == "validation"]
    return Standing(
        seen,
        total,
        warning=warning,
        left_s=(total - seen) / max(speed, 1e-9),
        loss=sum(losses) / len(losses) if losses else None,
        dice=scored[-1]["dice"] if scored else None,
        speed=speed,
        waiting=sum(row["wait_s"] for row in recent) / seconds,
        still=_standing_still(events),
        workers=recent[-1]["world_size"],
        restarts=groups[-1]["generation"] - 1 if groups else 0,
    )


def whole(now: Standing) -> str:
    """The line of a log file; SageMaker reads numbers from it."""
    warning = f" | {now.warning}" if now.warning else ""
    more = "".join(f" | {text}" for text in now.more)
    if now.instead:
        return now.instead + warning + more
    parts = [
        f"sample {now.seen:,} of {now.total:,}{warning}",
        "loss -" if now.loss is None else f"loss {now.loss:.3f}",
        *([f"Dice {' '.join(f'{r} {now.dice[r]:.2f}' for r in REGIONS)}"] if now.dice else []),
        f"{now.speed:.1f} samples/s",
        f"{now.waiting:.0%} waiting for data{now.still}",
        _count(now.workers, "worker"),
        f"{clock(now.left_s)} left",
        *([_count(now.restarts, "restart")] if now.restarts else []),
    ]
    return " | ".join(parts) + more


def fitted(now: Standing, width: int) -> str:
    """The most important of it within so many columns: first as many facts as there is room for, then more words."""
    if now.instead:
        return _cropped(f"{now.instead}{f', {now.warning}' if now.warning else ''}", width)
    dice = [now.dice[r] for r in REGIONS] if now.dice else []
    facts = [  # (short, long), the most important first
        (f"{int(100 * now.seen / max(now.total, 1))}%", ""),
        *([(_cropped(now.warning, max(20, width // 2)), now.warning)] if now.warning else []),
        (f"{clock(now.left_s)} left", ""),
        ("loss -" if now.loss is None else f"loss {now.loss:.3f}", ""),
        *([(f"Dice {' '.join(f'{d:.2f}'.lstrip('0') for d in dice)}", _long_dice(now))] if dice else []),
        (f"{now.speed:.1f}/s", f"{now.speed:.1f} samples/s"),
        (f"wait {now.waiting:.0%}", f"{now.waiting:.0%} waiting for data{now.still}"),
        (_count(now.workers, "worker"), ""),
        *([(_count(now.restarts, "restart"), "")] if now.restarts else []),
        (f"sample {now.seen:,} of {now.total:,}", ""),
        *((text, "") for text in now.more),
    ]
    shown = [short for short, _ in facts]
    while len(shown) > 1 and len(_SPACE.join(shown)) > width:
        shown.pop()
    for number in (place for place in (*range(len(shown)),) if facts[place][1]):
        longer = [*shown[:number], facts[number][1], *shown[number + 1 :]]
        if len(_SPACE.join(longer)) <= width:
            shown = longer
    return _cropped(_SPACE.join(shown), width)


def clock(seconds: float) -> str:
    """A time to go: 2:30, 3 h 20 min, 2 d 3 h."""
    if seconds < 3600:
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
    minutes = int(seconds // 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def unsaved(events: Sequence[dict[str, Any]], trouble: str = "") -> tuple[int, str] | None:
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


def _long_dice(now: Standing) -> str:
    return "Dice " + " ".join(f"{region} {(now.dice or {})[region]:.2f}" for region in REGIONS)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _cropped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def _standing_still(events: Sequence[dict[str, Any]]) -> str:
    """For what else training stood still between the last two checkpoints, where it is a per cent or more."""
    last: dict[str, float] = next(
        (e["stall"] for e in reversed(events) if e["event"] == "checkpoint" and "stall" in e), {}
    )
    causes = {"saving": last.get("checkpoint", 0.0), "validating": last.get("validation", 0.0)}
    return "".join(f", {share:.0%} {cause}" for cause, share in causes.items() if share >= 0.01)
