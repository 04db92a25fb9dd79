"""The journal of a run: where the current worker group started and which group may write (`generation.json`); rows of
applied steps (`run/rows.py`) and events (`run/events.py`). Runs in the controller, workers and the driver.

In: rows of applied steps, events, the decision from which checkpoint a worker group starts.
Out: exactly one row per applied step, whatever was killed; a `Generation` that the stream and all ranks share.

A row counts once the checkpoint that holds its step is committed. When a group starts from samples_seen = c, rows
beyond c are dropped: their steps are lost and will be applied again.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from raytrain_brats import books, storage
from raytrain_brats.errors import RunFailed
from raytrain_brats.run import checkpoint, control, rows
from raytrain_brats.run.control import Generation
from raytrain_brats.run.events import event as event
from raytrain_brats.run.events import warn as warn
from raytrain_brats.run.run_dir import RunDir

_TAKEN = "another driver has taken {} over; this one ends, and the run goes on there"


def begin_generation(run_dir: str, driver: str = "") -> Generation:
    """Choose the newest valid checkpoint, and record the decision: it drops the rows beyond it.

    Raises RunFailed, and leaves rows and checkpoints as they are, when none is valid although there were some, or when
    another driver took the run over ("" as `driver` does not check).

    A kill may come between any two of these steps, and a group that was replaced may still be writing, so the order is:
    1. Raise the fence: from then on no older group passes `MetricsLog.check`. What is read before that may change.
    2. Remove checkpoints that a replaced group committed late. Their rows do not count since the current group began.
    3. Choose the checkpoint, and see that its rows are there. Nothing that counts is removed yet: a person can restore.
    4. Record the decision. At once rows of older groups count up to the checkpoint (`books.chain`). A writer that
       passed its fence before 1 may still put a part, which does not count, or its manifest; if that comes after 3, the
       record is what tells the next call that it is late (2).
    5. Tidy the rows up, before the group writes: where a merged part reaches beyond the checkpoint, the next part must
       follow its head. A kill amid this is mended by the next call.
    """
    content, known = control.read_generation(run_dir)
    before = known or Generation(0, driver=driver)
    if driver and before.driver != driver:
        raise RunFailed(_TAKEN.format(run_dir))
    last = 0 if before.number else control.newest(run_dir)  # a person removed generation.json: no number twice
    fence = max(before.number, before.fence, last) + 1
    content = _decide(run_dir, content, replace(before, fence=fence))
    _remove_temporary_files(run_dir)
    for name, seen, generation in checkpoint.committed(run_dir):
        if generation < before.number and seen > before.samples_seen:
            checkpoint.discard(run_dir, name)
    found, damaged = checkpoint.newest_valid(run_dir)
    if damaged:  # they will be removed: one bad read must not cost a good checkpoint
        found, damaged = checkpoint.newest_valid(run_dir)
    status = control.status(run_dir, before.number)
    if status.stopped and before.failures_in_place >= 0:  # else a person has started the run again since
        raise RunFailed(status.stopped)
    if found is None and (damaged or before.checkpoint or status.committed):
        why = "; ".join(f"{name}: {reason}" for name, reason in damaged) or "they are gone"
        raise RunFailed(f"no checkpoint of {run_dir} is valid ({why}); restore them, or give another --run-dir")
    for name, why in damaged:
        event(run_dir, "damaged_checkpoint", name=name, why=why)
        checkpoint.discard(run_dir, name)
    anew: dict[str, Any] = {"samples_seen": 0, "checkpoint": None, "bad_in_epoch": 0, "failures_in_place": 0}
    decided = replace(before, number=fence, fence=fence, **anew)
    if (first := status.rolled_back_from) >= 0:
        again = before.roll_backs if first == before.rolled_back_from else 0
        decided = replace(decided, rolled_back_from=first, roll_backs=again + 1)
    if found:
        at, bad = found.samples_seen, found.state["bad_in_epoch"]
        decided = replace(decided, samples_seen=at, checkpoint=found.name, bad_in_epoch=bad)
    if decided.samples_seen == before.samples_seen:
        decided = replace(decided, failures_in_place=max(0, before.failures_in_place + bool(status.failure)))
    plan = rows.plan(run_dir, decided.number, decided.samples_seen)
    dropped = len(books.read_rows(run_dir, decided.samples_seen, []))
    last_row = books.recent(run_dir)[0][-1:]
    content = _decide(run_dir, content, decided)
    if control.read_generation(run_dir)[0] != content:
        raise RunFailed(_TAKEN.format(run_dir))
    rows.settle(run_dir, plan)
    facts: dict[str, Any] = {"samples_seen": decided.samples_seen, "checkpoint": decided.checkpoint}
    facts |= {"failures_in_place": decided.failures_in_place, "redone_steps": dropped}
    event(run_dir, "group", generation=decided.number, last_row=last_row[0].get("time") if last_row else None, **facts)
    return decided


def _decide(run_dir: str, before: bytes | None, generation: Generation) -> bytes:
    """Replace generation.json by compare-and-swap. Raises RunFailed when another driver wrote it in between."""
    content = json.dumps(asdict(generation)).encode()
    if not RunDir(run_dir).generation.swap(before, content):
        raise RunFailed(_TAKEN.format(run_dir))
    return content


def _remove_temporary_files(run_dir: str) -> None:
    """Remove temporary files of controllers that were killed while they wrote; nobody else writes these files so."""
    if not storage.is_s3(run_dir):
        for name in (".generation.json", "groups/.*.json"):
            for path in Path(run_dir).glob(f"{name}.*.tmp"):
                path.unlink(missing_ok=True)


def take_over(run_dir: str, driver: str = "") -> None:
    """Reset the failure counter for a manual restart and take ownership of the run."""
    for last in (False, False, True):  # the previous driver may still begin a group, which writes at most twice
        content, before = control.read_generation(run_dir)
        try:
            if before or driver:
                _decide(run_dir, content, replace(before or Generation(0), failures_in_place=-1, driver=driver))
            return
        except RunFailed:
            if last:
                raise


def last_row_time(run_dir: str) -> float | None:
    """When the last step in the rows was applied; None on S3, where rows are written late."""
    rows = books.recent(run_dir)[0]
    return float(rows[-1]["time"]) if rows and not storage.is_s3(run_dir) else None


def validated(run_dir: str, seen: int) -> bool:
    """Whether the validation at `seen` samples was written: a kill may have come between it and the checkpoint."""
    return storage.exists(RunDir(run_dir).validation(seen))
