"""The campaign's books: what each section measured, on which machine, by which command.

In: a section's figures.
Out: chaos.json, which keeps the other sections' last figures; chaos.md, made from it.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TITLES = {
    "core": "Kills of the real loop",
    "ray": "Kills under Ray",
    "goodput": "Goodput at one kill in ten minutes",
    "controls": "Negative controls: one protection taken away at a time",
    "bits": "Damaged checkpoints",
    "storm": "Resize storm",
}


def machine() -> str:
    """CPU model, cores that may be used, RAM."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
            break
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {ram:.0f} GiB RAM"


def measured(command: str, seed: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The section's entry: `work` gives `figures` (name: value), `tables` (name: rows) and `failures`."""
    load, began = os.getloadavg()[0], time.monotonic()
    date = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    result = work()
    about = {"command": command, "seed": seed, "machine": machine(), "date": f"{date} UTC"}
    about |= {"duration_s": round(time.monotonic() - began, 1)}
    about |= {"load_average": [round(load, 1), round(os.getloadavg()[0], 1)]}
    return about | {"passed": not result["failures"]} | result


def write(folder: Path, sections: dict[str, dict[str, Any]]) -> None:
    """Replace these sections in the folder's books, leave the others."""
    folder.mkdir(parents=True, exist_ok=True)
    books = folder / "chaos.json"
    known = json.loads(books.read_text()) if books.exists() else {}
    known |= sections
    books.write_text(json.dumps({name: known[name] for name in TITLES if name in known}, indent=1) + "\n")
    parts = [_section(TITLES[name], known[name]) for name in TITLES if name in known]
    head = "# Fault campaign\n\nMade by `scripts/chaos`; the same figures are in `chaos.json`.\n"
    (folder / "chaos.md").write_text("\n".join([head, *parts]))


def _section(title: str, entry: dict[str, Any]) -> str:
    before, after = entry["load_average"]
    lines = [
        f"## {title}\n",
        f"**{'passed' if entry['passed'] else 'FAILED'}** | `{entry['command']}` | seed {entry['seed']} | "
        f"{entry['date']} | {entry['duration_s']:,} s | {entry['machine']}, load average {before} at the start, "
        f"{after} at the end\n",
        "| figure | value |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in entry["figures"].items()),
        "",
    ]
    for name, rows in entry["tables"].items():
        lines += [f"{name}\n", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows] + [""]
    if entry["failures"]:
        lines += ["Failures:\n", *(f"- {failure}" for failure in entry["failures"][:20]), ""]
    return "\n".join(lines)
