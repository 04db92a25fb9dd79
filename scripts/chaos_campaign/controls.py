"""Take one protection away at a time: the campaign must see it, else its zero violations mean nothing.

In: a folder, a seed.
Out: for each control, how many faults it took until a violation was reported, and which.

Where the dangerous window is short it is widened by a pause (`PAUSE_S`); only the controls do that, never the campaign
itself.
"""

import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path
from typing import Any

from safetensors.torch import save as tensors_to_bytes

from raytrain_brats import books, storage
from raytrain_brats.run import checkpoint
from raytrain_brats.run import rows as row_parts
from raytrain_brats.run.rows import MetricsLog
from scripts.chaos_campaign import bits
from scripts.chaos_campaign.core import Campaign, Fault, Progress, draw
from scripts.chaos_campaign.groups import Twist
from scripts.chaos_campaign.setting import Setting

PAUSE_S = 0.03


def without_rename() -> None:
    """Files are written in place."""

    def write_bytes(uri: str, content: bytes | mmap) -> None:
        path = Path(storage.normal(uri))
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for half in (content[: len(content) // 2], content[len(content) // 2 :]):
                file.write(half)
                file.flush()
                time.sleep(PAUSE_S)

    storage.write_bytes = write_bytes


def without_marker() -> None:
    """The manifest comes first, so a checkpoint counts as soon as its folder is there."""

    def save(
        run_dir: str, samples_seen: int, generation: int, tensors: Any, state: Any, fence: Any = lambda: None
    ) -> checkpoint.Checkpoint:
        name = f"{samples_seen:012d}-g{generation:04d}"
        contents = {
            "tensors.safetensors": tensors_to_bytes(tensors),
            "state.json": json.dumps(state).encode(),
        }
        about = {f: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for f, c in contents.items()}
        manifest = {"format": 1, "samples_seen": samples_seen, "generation": generation, "files": about}
        fence()
        first = json.dumps(manifest | {"sha256": checkpoint._digest(manifest)}).encode()
        for file, content in ({"MANIFEST.json": first} | contents).items():
            storage.write_bytes(storage.join(run_dir, "checkpoints", name, file), content)
            time.sleep(PAUSE_S)
        return checkpoint.Checkpoint(name, samples_seen, generation, sum(map(len, contents.values())))

    checkpoint.save = save


def without_cut() -> None:
    """Rows beyond the checkpoint stay when a group begins, and do not say which group wrote them."""
    books.Part.name = property(lambda part: f"{part.start:012d}-{part.end:012d}-g0001.jsonl")  # type: ignore[assignment]
    row_parts.settle = lambda run_dir, plan: None


def without_fence() -> None:
    """A replaced group writes on."""
    MetricsLog.check = lambda log: None  # type: ignore[method-assign, assignment]
    load = checkpoint.load

    def load_later(run_dir: str, name: str) -> Any:
        time.sleep(10 * PAUSE_S)  # the replaced group's saves remove the checkpoint it is about to load
        return load(run_dir, name)

    checkpoint.load = load_later


def without_tree() -> None:
    """Gradients are summed in the order of the ranks, as DDP does (the setting, not a patch)."""


def amid_writes(rng: random.Random, world_size: int) -> Fault:
    target = rng.choice(("checkpoint write", "commit"))
    late = rng.uniform(0, 2 * PAUSE_S)
    return replace(draw(rng, world_size), target=target, visit=1, delay_s=late, rank=0, rest="end")


def late_in_writes(rng: random.Random, world_size: int) -> Fault:
    """A group comes some way first: what only a run's end shows is found after fewer faults."""
    return replace(amid_writes(rng, world_size), visit=4)


def pauses(rng: random.Random, world_size: int) -> Fault:
    return replace(draw(rng, world_size), target="data", visit=4, rank=0, rest="pause")


@dataclass(frozen=True)
class Control:
    twist: Twist
    bound: int
    faults: Callable[[random.Random, int], Fault] = draw
    reduction: str = "exact"


CONTROLS = {
    "rename": Control(without_rename, 40, amid_writes),
    "marker": Control(without_marker, 40, amid_writes),
    "cut": Control(without_cut, 150, late_in_writes),
    "fence": Control(without_fence, 150, pauses),
    "tree": Control(without_tree, 120, reduction="fast"),
}
HASH_BOUND = 100


def section(folder: Path, seed: int, only: list[str] | None, progress: Progress) -> dict[str, Any]:
    """The report's entry: every control must be found."""
    rows, failures = [], []
    names = only or [*CONTROLS, "hash"]
    for number, name in enumerate(names):
        if name == "hash":
            row, what = without_hash(folder / "hash", seed), "checkpoints are loaded unverified"
        else:
            control = CONTROLS[name]
            row, what = _sought(folder / name, seed, control), str(control.twist.__doc__).rstrip(".")
        rows.append({"taken away": name, "what that means": what} | row)
        if not row["found by"]:
            failures.append(f"control {name} was not found within its bound of {row['bound']}")
        progress(number + 1, len(names), f"{name} found after {row['faults until found']}")
    figures = {"controls": len(rows), "found": sum(bool(row["found by"]) for row in rows)}
    return {"figures": figures, "tables": {"Faults until a violation was reported:": rows}, "failures": failures}


def _sought(folder: Path, seed: int, control: Control) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(folder, reduction=control.reduction, steps=40)
    setting.warm()
    campaign = Campaign(setting, seed, twist=control.twist, faults=control.faults, stop_early=True)
    found = campaign.run(control.bound)
    why = found.violations[0].split(": ", 1)[1][:120] if found.violations else ""
    why = why.replace(os.fspath(folder), "...")
    return {"faults until found": found.kills + found.pauses, "bound": control.bound, "found by": why}


def without_hash(folder: Path, seed: int) -> dict[str, Any]:
    """Single bits flip in the tensors; what is loaded must differ in silence."""
    truth, real = bits.made(folder), checkpoint._contents
    checkpoint._contents = lambda run_dir, name: [
        storage.read_bytes(storage.join(run_dir, "checkpoints", name, file)) for file in checkpoint._FILES
    ]
    try:
        rng, why, tries = random.Random(seed), "", 0
        while not why and tries < HASH_BOUND:
            tries += 1
            why = bits.after(truth, bits.flip(truth, rng))
    finally:
        checkpoint._contents = real
    return {"faults until found": tries, "bound": HASH_BOUND, "found by": why[:120]}
