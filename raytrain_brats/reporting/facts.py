"""What was trained, on what, where, when and for how much: the lines below a page's title.

In: a run's config.yaml and events. Out: words; numbers and times as pages show them.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import jinja2

Row = Mapping[str, Any]
NO_PRICES = "unknown: no prices were given (RAYTRAIN_BRATS_DOLLARS_PER_HOUR)"


def number(value: Any, digits: int = 3) -> str:
    """A dash for what is none."""
    try:
        found = float(value)
    except (TypeError, ValueError, jinja2.UndefinedError):
        return "–"
    return "–" if math.isnan(found) else "∞" if math.isinf(found) else f"{found:,.{digits}f}"


def signed(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:+,.{digits}f}"


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def cost(events: Sequence[Row]) -> list[tuple[str, ...]]:
    """(name, value, note); nothing where no prices were given."""
    costs = [event for event in events if event["event"] == "cost"]
    if not costs:
        return []
    note = f"${costs[-1]['dollars_per_hour']:,.2f} an hour at last; while a driver ran, by the prices given"
    return [("cost", f"${sum(event['dollars'] for event in costs):,.2f}", note)]


def title(about: Row, launch: Row) -> str:
    """The recipe, and on how many cases."""
    recipe = str(about.get("recipe") or "").rpartition("/")[2].removesuffix(".yaml")
    cases = launch.get("cases_train")
    return f"{recipe or 'Training run'}{f' on {cases} cases' if cases else ''}"


def facts(
    run_dir: str, about: Row, events: Sequence[Row], span: tuple[float, float], wall_s: float
) -> list[tuple[str, str]]:
    """(name, value); `about`: config.yaml, `span`: Unix seconds of the first and the last thing known."""
    launch = next((event for event in events if event["event"] == "launch"), {})
    began, ended = (datetime.fromtimestamp(second, UTC) for second in span)
    until = ended.strftime("%Y-%m-%d %H:%M" if began.date() != ended.date() else "%H:%M")
    dollars = [f"{value} ({note})" for _, value, note in cost(events)]
    return [
        ("recipe", _recipe(about)),
        ("data", _data(launch)),
        ("hardware", _hardware(events)),
        ("time", f"{began:%Y-%m-%d %H:%M} to {until} UTC, {duration(wall_s)}"),
        ("cost", dollars[0] if dollars else NO_PRICES),
        ("folder", run_dir),
    ]


def _recipe(about: Row) -> str:
    config = about.get("config")
    settings = config if isinstance(config, dict) else {}
    network, data, train = (settings.get(key) or {} for key in ("network", "data", "train"))
    parts = [str(about.get("recipe") or ""), str(network.get("name") or "")]
    if patch := data.get("patch_xyz"):
        parts.append(f"patch {'×'.join(map(str, patch))}")
    if batch := train.get("global_batch"):
        parts += [f"global batch {batch}", f"{train.get('epochs', '?')} epochs"]
    return ", ".join(part for part in parts if part) or "unknown"


def _data(launch: Row) -> str:
    kinds = (("cases_train", "training"), ("cases_val", "validation"))
    parts = [f"{launch[key]} {what} cases" for key, what in kinds if key in launch]
    if identity := launch.get("dataset_identity"):
        parts.append(f"identity {identity}")
    return ", ".join(parts) or "unknown"


def _hardware(events: Sequence[Row]) -> str:
    """Of the newest worker group."""
    workers = [event for event in events if event["event"] == "worker"]
    newest = max((event.get("generation") or 0 for event in workers), default=0)
    last = [event for event in workers if (event.get("generation") or 0) == newest]
    devices, nodes = Counter(str(e.get("device") or "?") for e in last), len({e.get("node") for e in last})
    each = ", ".join(f"{count} × {'CPU' if device == 'cpu' else device}" for device, count in devices.items())
    return f"{each} on {nodes} machine{'s' * (nodes != 1)}" if last else "unknown"
