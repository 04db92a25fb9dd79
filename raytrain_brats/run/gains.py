"""Which checkpoint scored best on the held-out cases, and whether training still gains. Runs in a worker (rank 0) and
in the driver.

In: `validation/<samples seen>.csv`; the checkpoints that are there.
Out: the best of these; why a run ends before its last position, or "".

Tables decide, as no other file could disagree with them: each is written at once, before any later checkpoint, and
never changed. So whoever looks finds the same best, whatever was killed between two writes.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raytrain_brats import storage
from raytrain_brats.errors import UserError
from raytrain_brats.labels import REGIONS
from raytrain_brats.run import checkpoint
from raytrain_brats.run.checkpoint import Checkpoint
from raytrain_brats.run.run_dir import RunDir


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
    rows = list(csv.DictReader(storage.read_bytes(uri).decode().splitlines()))
    try:
        found = tuple((r, sum(float(row[f"dice_{r}"]) for row in rows) / len(rows)) for r in REGIONS)
        cases = frozenset(row["case"] for row in rows)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{uri} is no table of a validation") from error
    if not all(0 <= value <= 1 for _, value in found):
        raise ValueError(f"{uri} holds a Dice that is none")
    return Scored(samples_seen, found, cases)


def scored(run_dir: str, samples_seen: int) -> Scored | None:
    """The validation at this sample; None where there is none, or one without scores. Raises OSError."""
    try:
        return _read(RunDir(run_dir).validation(samples_seen), samples_seen)
    except (FileNotFoundError, ValueError):
        return None


def history(run_dir: str) -> list[Scored]:
    """All validations of a run, in order. Raises OSError."""
    names = (name.removesuffix(".csv") for name in storage.list_files(RunDir(run_dir).file("validation")))
    found = (scored(run_dir, int(name)) for name in sorted(names) if name.isdigit())
    return [each for each in found if each]


def best(found: Iterable[Scored]) -> Scored | None:
    """The greatest mean Dice; of equal ones the first."""
    return max(found, key=lambda each: (each.mean, -each.samples_seen), default=None)


def best_checkpoint(run_dir: str, names: Iterable[tuple[str, int]]) -> str:
    """Of checkpoints (name, samples seen), the one of the best validation; "" where none was validated.
    Raises OSError: what cannot be read just now may be the best."""
    return next(iter(_by_score(run_dir, names)), "")


def _by_score(run_dir: str, names: Iterable[tuple[str, int]]) -> list[str]:
    """Validated ones, best first; of several at one sample the newest group's; last those of other cases than the
    newest validation's, of which nobody knows whether they are better."""
    known = [(each, name) for name, seen in names if (each := scored(run_dir, seen))]
    known.sort(key=lambda pair: pair[1], reverse=True)
    newest = max((each for each, _ in known), key=lambda each: each.samples_seen, default=None)
    known.sort(key=lambda pair: (newest and pair[0].cases != newest.cases, -pair[0].mean, pair[0].samples_seen))
    return [name for _, name in known]


def best_valid(run_dir: str) -> Checkpoint:
    """The best checkpoint whose every byte is as committed. Raises UserError when there is none."""
    for name in _by_score(run_dir, [(name, seen) for name, seen, _ in checkpoint.committed(run_dir)]):
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
