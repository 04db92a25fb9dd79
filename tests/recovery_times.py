"""Measure recoveries: hurt a run again and again, read the time to its next applied step from its books.

In: kinds of kills, how many of each, a seed.
Out: a table of p50 and p95 per kind and part of the time; JSON with every single one. Run it on an idle machine.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.chaos import KILLS, Cluster, ElasticRun

PARTS = ("detect_s", "reschedule_s", "import_s", "first_batch_s", "first_step_s", "total_s")
SETTLE_S = 30.0
"""Training between two kills: spare processes need it to get ready, as they would between real failures."""


def one(run: ElasticRun, kind: str, workers: int, dice: random.Random) -> tuple[dict[str, Any], int]:
    """One kill; what it cost as seen from outside and by the run itself, and how many workers train now."""
    hurt, change = KILLS[kind]
    before, load = run.generation(), os.getloadavg()[0]
    began = hurt(run, dice)
    first = run.rows_until(workers + change, before, rows=1)
    seen = {"kind": kind, "outside_s": round(first["time"] - began, 2), "load": round(load, 1)}
    told = [e for e in run.events("recovered") if e["generation"] == first["generation"]]
    seen |= {part: told[0][part] for part in PARTS} if told else {}
    run.rows_until(workers + change, before, rows=20)
    time.sleep(SETTLE_S)
    return seen, workers + change


def campaign(kinds: list[str], times: int, seed: int, place: Path) -> list[dict[str, Any]]:
    """`resize` and `node` follow each other: a node is lost only after it was added."""
    dice, found = random.Random(seed), []
    cluster = Cluster(place)
    try:
        # both workers on the first node, except where nodes come and go
        nodes = {"resize", "node"} & set(kinds)
        run = ElasticRun(cluster, "1:2", *([] if nodes else ["run.cpus_per_worker=0.5"]))
        workers = 1 if nodes else 2
        run.rows_until(workers, 0)
        time.sleep(SETTLE_S)
        for _ in range(times):
            for kind in kinds:
                seen, workers = one(run, kind, workers, dice)
                print(json.dumps(seen), flush=True)
                found.append(seen)
        run.interrupt()
    finally:
        cluster.close()
    return found


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of all do not exceed."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def table(found: list[dict[str, Any]]) -> str:
    lines = ["kind        n  " + "".join(f"{part[:-2]:>22}" for part in ("outside_s", *PARTS))]
    for kind in dict.fromkeys(seen["kind"] for seen in found):
        rows = [seen for seen in found if seen["kind"] == kind]
        cells = ""
        for part in ("outside_s", *PARTS):
            values = [row[part] for row in rows if part in row]
            cells += f"{quantile(values, 0.5):>13.2f} /{quantile(values, 0.95):>7.2f}" if values else " " * 22
        lines.append(f"{kind:<11}{len(rows):>2}  {cells}")
    return "\n".join(lines) + "\n(p50 / p95, seconds)"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--kinds", default="worker", help=f"in this order, of {','.join(KILLS)}")
    options.add_argument("--times", type=int, default=3)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=Path("recovery.json"))
    given = options.parse_args()
    place = Path(tempfile.mkdtemp(prefix="rb", dir="/tmp"))  # short: Ray's sockets do not fit below a long path
    try:
        found = campaign(given.kinds.split(","), given.times, given.seed, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    given.out.write_text(json.dumps({"seed": given.seed, "cpus": os.cpu_count(), "recoveries": found}, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
