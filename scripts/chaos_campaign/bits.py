"""Damage committed checkpoints in every way a disk, a copy or a hand may, and read them.

In: a folder, a seed, how many single bits to flip.
Out: how many were detected, named and passed over for the newest intact one; how many were loaded in silence (none).

Damage is done in place and undone. Each time the newest valid checkpoint is asked for and loaded, and the damaged one
is loaded too, which must be refused.
"""

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytrain_brats.errors import RunFailed
from raytrain_brats.run import checkpoint
from scripts.chaos_campaign.core import Progress

FILES = ("tensors.safetensors", "state.json", "MANIFEST.json")


@dataclass(frozen=True)
class Truth:
    """Three committed checkpoints, oldest first, and what they hold."""

    run_dir: Path
    names: tuple[str, ...]
    tensors: tuple[dict[str, torch.Tensor], ...]

    def path(self, which: int, file: str) -> Path:
        return self.run_dir / "checkpoints" / self.names[which] / file


@dataclass(frozen=True)
class Damage:
    """One fault: how to do it (undone when the context ends), which checkpoint it hits, whether it is to be named."""

    kind: str
    which: int
    done: AbstractContextManager[None]
    named: bool = True
    """A checkpoint without a manifest does not exist: passed over without a word."""


def made(folder: Path) -> Truth:
    shutil.rmtree(folder, ignore_errors=True)
    names, everything = [], []
    for number in range(3):
        random_tensor = torch.Generator().manual_seed(number)
        tensors = {f"network/{i}": torch.randn(1000 + i, generator=random_tensor) for i in range(3)}
        state = {"samples_seen": 8 * (number + 1), "bad_in_epoch": 0, "learner": {"lr": 1e-3}}
        saved = checkpoint.save(str(folder), 8 * (number + 1), number + 1, tensors, state)
        names.append(saved.name)
        everything.append(tensors)
    return Truth(folder, tuple(names), tuple(everything))


@contextmanager
def replaced(*changes: tuple[Path, bytes | None]) -> Iterator[None]:
    """Files with other content (None: gone) for a while."""
    before = [(path, path.read_bytes()) for path, _ in changes]
    try:
        for path, content in changes:
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
        yield
    finally:
        for path, content in before:
            path.write_bytes(content)


def flip(truth: Truth, rng: random.Random) -> Damage:
    """One bit, in a file drawn evenly; half of the time of the newest checkpoint."""
    which = rng.choice((0, 1, 2, 2))
    path = truth.path(which, rng.choice(FILES))
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    return Damage(f"bit flipped in {path.name}", which, replaced((path, bytes(content))))


def others(truth: Truth) -> Iterator[Damage]:
    """Every truncation of the small files, the tensors at each 4 KiB, and all that is not a single bit."""
    for file in FILES:
        for which in (2, 1):
            path = truth.path(which, file)
            content, older = path.read_bytes(), truth.path(which - 1, file).read_bytes()
            size = len(content)
            near = {0, 1, 7, 8, 9, size // 2, size - 1}
            pages = {cut + d for cut in range(0, size, 4096) for d in (-1, 0, 1) if 0 <= cut + d < size}
            for length in sorted(near | pages) if file == FILES[0] else range(size):
                yield Damage(f"{file} truncated", which, replaced((path, content[:length])))
            yield Damage(f"{file} gone", which, replaced((path, None)), named=file != "MANIFEST.json")
            for extra in (b"\0", b"\n{}", content):
                yield Damage(f"{file} with bytes added", which, replaced((path, content + extra)))
            yield Damage(f"{file} is the older checkpoint's", which, replaced((path, older)))
            zeros = content[: size // 2] + bytes(size - size // 2)
            yield Damage(f"{file} half zeros", which, replaced((path, zeros)))
    all_older = [(truth.path(2, file), truth.path(1, file).read_bytes()) for file in FILES]
    yield Damage("all files are the older checkpoint's", 2, replaced(*all_older))


def after(truth: Truth, damage: Damage) -> str:
    """What went wrong with one damage done; an empty string when it was found, named and passed over."""
    with damage.done:
        try:
            found, damaged = checkpoint.newest_valid(str(truth.run_dir))
        except (Exception, RunFailed) as error:  # noqa: BLE001 - any is a finding
            return f"{damage.kind}: newest_valid raised {error!r}"
        right = 1 if damage.which == 2 else 2
        if found is None or found.name != truth.names[right]:
            return f"{damage.kind}: {found.name if found else None} was chosen, not {truth.names[right]}"
        named = [name for name, _ in damaged]
        if named != ([truth.names[2]] if damage.which == 2 and damage.named else []):
            return f"{damage.kind}: named as damaged were {named}"
        try:
            tensors, _ = checkpoint.load(str(truth.run_dir), found.name)
        except ValueError as error:
            return f"{damage.kind}: the chosen one cannot be loaded: {error}"
        if any(not torch.equal(tensors[k], t) for k, t in truth.tensors[right].items()):
            return f"{damage.kind}: other tensors were loaded in silence"
        try:
            checkpoint.load(str(truth.run_dir), truth.names[damage.which])
        except ValueError:
            return ""
        except Exception as error:  # noqa: BLE001 - any other than ValueError is a finding
            return f"{damage.kind}: load raised {error!r}"
        return f"{damage.kind}: the damaged one was loaded in silence"


def section(folder: Path, seed: int, flips: int, progress: Progress) -> dict[str, Any]:
    """The report's entry."""
    truth, rng = made(folder), random.Random(seed)
    kinds: Counter[str] = Counter()
    failures: list[str] = []
    began = time.monotonic()

    def tried(damage: Damage) -> None:
        kinds[damage.kind] += 1
        if why := after(truth, damage):
            failures.append(why)

    for number in range(flips):
        tried(flip(truth, rng))
        if number % 50 == 49 or number == flips - 1:
            progress(number + 1, flips, f"{len(failures)} violations")
    for damage in others(truth):
        tried(damage)
    found, damaged = checkpoint.newest_valid(str(truth.run_dir))
    if damaged or found is None or found.name != truth.names[2]:
        failures.append("the damage was not undone: the checks above prove nothing")
    flipped = sum(n for kind, n in kinds.items() if kind.startswith("bit "))
    figures = {
        "single bits flipped": flipped,
        "other damage": sum(kinds.values()) - flipped,
        "loaded in silence": sum("silence" in why for why in failures),
        "violations": len(failures),
        "faults a second": round(sum(kinds.values()) / (time.monotonic() - began)),
    }
    table = [{"damage": kind, "tries": number} for kind, number in sorted(kinds.items())]
    return {"figures": figures, "tables": {"What was done:": table}, "failures": failures}
