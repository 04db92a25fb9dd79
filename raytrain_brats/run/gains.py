"""Which checkpoint scored best on the held-out cases, and whether training still gains. Runs in a worker (rank 0) and
in the driver.

In: `validation/<samples seen>.csv`; the checkpoints that are there.
Out: the best of these that is intact; why a run ends before its last position, or "".

Tables decide, as no other file could disagree with them: each is written at once, before any later checkpoint, and
never changed. So whoever looks finds the same best, whatever was killed between two writes.
"""

import csv
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from raytrain_brats import storage
from raytrain_brats.errors import UserError
from raytrain_brats.labels import REGIONS
from raytrain_brats.run import checkpoint
from raytrain_brats.run.checkpoint import Checkpoint
from raytrain_brats.run.run_dir import RunDir

READS, READ_AGAIN_S = 3, 0.2
"""A table that makes no sense is read again: the reading may be at fault, not the table."""
WHOLE_S = 3600.0
"""How long a checkpoint counts as intact that was read whole."""


@dataclass(frozen=True)
class Scored:
    """A validation: mean Dice over its cases, by region."""

    samples_seen: int
    dice: tuple[tuple[str, float], ...]
    cases: frozenset[str]
    """Means over other cases do not compare."""

    @property
    def mean(self) -> float:
        return sum(value for _, value in self.dice) / len(self.dice)


def _read(uri: str, samples_seen: int) -> Scored:
    """Raises FileNotFoundError, ValueError."""
    try:
        rows = list(csv.DictReader(storage.read_bytes(uri).decode().splitlines()))
        found = tuple((r, sum(float(row[f"dice_{r}"]) for row in rows) / len(rows)) for r in REGIONS)
        cases = frozenset(row["case"] for row in rows)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, csv.Error) as error:
        raise ValueError(f"{uri} is no table of a validation") from error
    if not all(0 <= value <= 1 for _, value in found):
        raise ValueError(f"{uri} holds a Dice that is none")
    return Scored(samples_seen, found, cases)


def scored(run_dir: str, samples_seen: int) -> Scored | None:
    """The validation at this sample; None where there is none. Raises OSError, and UserError for a damaged table."""
    for last in (False,) * (READS - 1) + (True,):
        try:
            return _read(RunDir(run_dir).validation(samples_seen), samples_seen)
        except FileNotFoundError:
            return None
        except ValueError as error:
            if last:
                raise UserError(f"{error}; restore it, or remove it, and that validation does not count") from error
            time.sleep(READ_AGAIN_S)
    raise AssertionError("the last reading returns or raises")


def history(run_dir: str) -> list[Scored]:
    """All validations of a run, in order. Raises OSError, and UserError for a damaged table."""
    names = (name.removesuffix(".csv") for name in storage.list_files(RunDir(run_dir).file("validation")))
    found = (scored(run_dir, int(name)) for name in sorted(names) if name.isdigit())
    return [each for each in found if each]


def best(found: Iterable[Scored]) -> Scored | None:
    """The greatest mean Dice; of equal ones the first."""
    return max(found, key=lambda each: (each.mean, -each.samples_seen), default=None)


class Keeper:
    """Chooses which checkpoint `checkpoint.prune` keeps as the best, in one worker group.

    What it keeps it has read whole, and reads again each hour: one that is damaged gives way to the next best, while
    that is there.
    """

    def __init__(self, run_dir: str, damaged: Callable[[str, str], None], warn: Callable[[str], None]) -> None:
        """`damaged` is told (name, why) of a checkpoint, `warn` of a table that cannot be read; each once."""
        self._run_dir, self._damaged, self._warn = run_dir, damaged, warn
        self._intact: dict[str, float] = {}
        self._told: set[str] = set()

    def __call__(self, names: list[tuple[str, int]]) -> str:
        """Of checkpoints (name, samples seen); "" when none was validated. Raises OSError: what cannot be read just now
        may be the best."""
        for name in _ranked([(each, name) for name, seen in names if (each := self._scored(seen))]):
            if time.monotonic() < self._intact.get(name, -math.inf) + WHOLE_S:
                return name
            why = checkpoint.damage(self._run_dir, name) and checkpoint.damage(self._run_dir, name)
            if not why:  # one bad read must not cost a good checkpoint
                self._intact[name] = time.monotonic()
                return name
            if name not in self._told:
                self._told.add(name)
                self._damaged(name, why)
        return ""

    def _scored(self, seen: int) -> Scored | None:
        try:
            return scored(self._run_dir, seen)
        except UserError as error:
            if (text := str(error)) not in self._told:
                self._told.add(text)
                self._warn(text)
            return None


def _ranked(known: list[tuple[Scored, str]]) -> list[str]:
    """Best first; of several at one sample the newest group's; last those of other cases than the newest validation's,
    of which nobody knows whether they are better."""
    known.sort(key=lambda pair: pair[1], reverse=True)
    newest = max((each for each, _ in known), key=lambda each: each.samples_seen, default=None)
    known.sort(key=lambda pair: (newest and pair[0].cases != newest.cases, -pair[0].mean, pair[0].samples_seen))
    return [name for _, name in known]


def best_valid(run_dir: str) -> Checkpoint:
    """The best checkpoint whose every byte is as committed. Raises UserError when there is none, or for a damaged
    table: it might be that of the best."""
    there = checkpoint.committed(run_dir)
    for name in _ranked([(each, name) for name, seen, _ in there if (each := scored(run_dir, seen))]):
        if found := checkpoint.valid(run_dir, name):
            return found
    raise UserError(
        f"{run_dir} has no valid checkpoint that was validated; leave --best out, or train with "
        "--set checkpoint.best=true"
    )


def stalled(found: Sequence[Scored], samples_seen: int, patience: int | None) -> str:
    """Why a run that stands at this sample ends there: no gain for `validate.patience_samples`; "" when it goes on."""
    known = [each for each in found if each.samples_seen <= samples_seen]
    known = [each for each in known if each.cases == known[-1].cases]
    top = best(known)
    if not patience or top is None or (since := known[-1].samples_seen - top.samples_seen) < patience:
        return ""
    return (
        f"the held-out cases' mean Dice was {top.mean:.4f} at sample {top.samples_seen:,}, and not more in the "
        f"{since:,} samples after it (validate.patience_samples: {patience:,})"
    )
