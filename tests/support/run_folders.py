"""The books of a run, written by hand: rows, events, a folder that holds them."""

import json
from pathlib import Path
from typing import Any

from raytrain_brats import storage
from raytrain_brats.labels import REGIONS
from raytrain_brats.run import checkpoint
from raytrain_brats.run.run_dir import RunDir

Row = dict[str, Any]
HOSTILE = '<script>alert("case")</script>'


def step(number: int, time: float, generation: int = 1, world_size: int = 1) -> Row:
    return {
        "step": number, "samples_seen": 4 * number + 4, "positions": [4 * number, 4 * number + 4],
        "world_size": world_size, "generation": generation, "loss": 1 / (number + 1), "lr": 1e-3, "bad": 0,
        "wait_s": 0.5, "step_s": 2.0, "time": time,
    }  # fmt: skip


def event(kind: str, time: float, **more: Any) -> Row:
    return {"event": kind, "time": time, "mono_s": time, "host": "h", "pid": 1, **more}


def scores(value: float) -> Row:
    return {"seconds": 3.0, "cases": 2, "dice": dict.fromkeys(("WT", "TC", "ET"), value), "hd95_mm": {}}


ROWS = [step(n, 1012.0 + 2 * n) for n in range(5)] + [step(n, 1112.0 + 2 * n, 2, 2) for n in range(5, 10)]
EVENTS = [
    event("launch", 1000.0, total_samples=40, route="store", cases_train=8, cases_val=2, dataset_identity="abc"),
    event("group", 1002.0, generation=1, samples_seen=0, checkpoint=None, redone_steps=0),
    event("checkpoint", 1021.0, generation=1, samples_seen=20, name="c-20", seconds=1.0, bytes=9, stall_s=1.0),
    event("validation", 1024.0, samples_seen=20, **scores(0.5)),
    event("invented_next_year", 1025.0),
    event("launch", 1100.0, total_samples=40),
    event("group", 1103.0, generation=2, samples_seen=20, checkpoint="c-20", redone_steps=1),
    event("quarantine", 1113.0, case=HOSTILE, reason="truncated", detail="cut & short", position=30),
    event("validation", 1135.0, samples_seen=40, **scores(0.75)),
    event("finish", 1140.0, samples_seen=40, seconds=40.0),
]


def write_run(folder: Path, rows: list[Row] = ROWS, events: list[Row] = EVENTS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if events:
        (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    return folder


def validation(run: Path, seen: int, dice: float) -> None:
    """A validation's table, of two cases."""
    head = ["case", *(f"dice_{r}" for r in REGIONS), *(f"hd95_{r}_mm" for r in REGIONS)]
    lines = [[name, *(f"{dice + d:.4f}",) * 3, *("1.0",) * 3] for name, d in (("a", -0.01), ("b", 0.01))]
    storage.write_bytes(RunDir(str(run)).validation(seen), "\n".join(map(",".join, [head, *lines])).encode())


def checkpoints(run: Path) -> list[int]:
    """The samples at which they stand."""
    return [seen for _, seen, _ in checkpoint.committed(str(run))]
