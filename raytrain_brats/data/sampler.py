"""Which case, crop and augmentation belongs to each position of a run: integers only, no I/O. Runs in any process.

In: seed, number of cases N, global batch G, patches per case k, epochs; how many there were to be at first.
Out: for a position its case and seed; for a rank its positions in a step and the cases that it needs for them.

A run deals its cases as one endless list, shuffled anew each epoch: dealt case n is case number n mod N of the order of
epoch n div N. It is shown for k steps from step `start(n)` = n k div G on, one patch a step, so that a step shows the G
youngest dealt cases, G / k of them for the first time. Position p is place p mod G of step p div G. While a run fills
up, in its first k - 1 steps, and while it ends, some places show no case: padding, samples of weight zero.

Rank r of W owns the dealt cases n = r mod W. A step's G cases have successive numbers, so each rank owns G / W of them,
rounded up or down, at any world size from 1 to G, and a case travels to one rank only, for all its k patches.

A run that was lengthened is one list all the same: its first part is the list of the shorter run, to its end, padding
included, and the next part follows as a run does that begins there, with the epochs that come next. So no position
changes by it, wherever the run stood, and each epoch shows each case k times. Dealt numbers go on behind a gap in which
no case is dealt, the shortest after which a case first shows when the part before has ended.

Everything here is a pure function of (seed, position): a resume needs one number, `samples_seen`, and no state of a
generator; any process computes any position without those before it. The idea is MosaicML Streaming's (`partition/`);
theirs asks that the world size divides the batch, this one does not.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

ORDER = "dealt"
"""Name of this order in a run folder's config.yaml: a run that began in another cannot go on in it."""


@dataclass(frozen=True)
class Sample:
    """What belongs to one position. `case` is an index into the sorted training cases, None for padding."""

    position: int
    epoch: int
    case: int | None
    seed: int


@dataclass(frozen=True)
class Row:
    """What a rank receives at once. Empty where a turn has no case for the rank."""

    until: int
    """With this row the rank has all of its dealt cases below this number."""
    cases: tuple[tuple[int, tuple[Sample, ...]], ...]
    """(case, its samples that are still to come)."""


def draw(seed: int, purpose: str, count: int) -> list[float]:
    """`count` numbers in [0, 1): the same for the same arguments on any machine and library version.

    A hash, not a generator: `purpose` keeps the crop's numbers independent of the augmentation's, so that one more
    number for the one does not change the other.
    """
    numbers: list[float] = []
    for block in range((count + 7) // 8):
        digest = hashlib.blake2b(f"{seed}/{purpose}/{block}".encode(), digest_size=64).digest()
        # A float's significand holds 53 bits; 64 bits would sometimes round up to 1.0, which is outside [0, 1).
        numbers += [(int.from_bytes(digest[i : i + 8], "little") >> 11) / 2**53 for i in range(0, 64, 8)]
    return numbers[:count]


def _seed(*parts: int) -> int:
    """A 63-bit seed from integers, so that it fits a signed 64-bit column. Hashing keeps seeds of neighbouring
    arguments unrelated; sums of them would collide."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def fingerprint(position: int, case_id: str, seed: int) -> int:
    """32 bits of what belongs to a position. A step's sum over its samples does not depend on how ranks share them, so
    one number in each row proves which samples a step applied (`verify` computes it again)."""
    text = f"{position}/{case_id}/{seed}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


@lru_cache(maxsize=8)
def _shuffled(seed: int, count: int) -> tuple[int, ...]:
    # NumPy freezes the numbers of RandomState (NEP 19); those of Generator may change between releases, and a resume
    # under another NumPy would then apply cases twice. Cached, as `sample` asks for one order once for each position.
    return tuple(np.random.RandomState(seed % 2**32).permutation(count).tolist())


@dataclass(frozen=True)
class _Part:
    """What a run of a certain length adds to a shorter one."""

    first: int
    end: int
    """Its dealt cases have the numbers [first, end)."""
    before: int
    """Cases dealt in earlier parts."""
    steps: int
    """It ends before this step."""
    epochs: int
    """Of the run up to there."""


@dataclass(frozen=True)
class Sampler:
    """The order of a whole run, as a pure function."""

    seed: int
    cases: int
    global_batch: int
    patches_per_case: int
    epochs: int
    earlier: tuple[int, ...] = ()
    """The epochs of before the run was lengthened, ascending."""

    @cached_property
    def _parts(self) -> tuple[_Part, ...]:
        parts, first, before = [], 0, 0
        for epochs in (*self.earlier, self.epochs):
            end = first + self.cases * epochs - before
            parts.append(_Part(first, end, before, self.start(end - 1) + self.patches_per_case, epochs))
            before = self.cases * epochs
            first = -(-parts[-1].steps * self.global_batch // self.patches_per_case)  # start(n) >= steps
        return tuple(parts)

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch: every case `patches_per_case` times."""
        return self.cases * self.patches_per_case

    @property
    def dealt(self) -> int:
        """The dealt cases of the run have numbers below this: all of them, unless the run was lengthened."""
        return self._parts[-1].end

    @property
    def steps(self) -> int:
        return self._parts[-1].steps

    @property
    def total(self) -> int:
        """Positions of the run, padding included."""
        return self.steps * self.global_batch

    def start(self, dealt: int) -> int:
        """The first step that shows this dealt case."""
        # Staggered, so that G / k cases are new at each step and reads come evenly: ranks waited a third as long as
        # where all G were new at every k-th step (measured in docs/benchmarks/stream.md).
        return dealt * self.patches_per_case // self.global_batch

    def oldest(self, step: int) -> int:
        """The first of the G successive dealt cases that a step shows; below 0 while the run fills up."""
        # The youngest is the last n with start(n) <= step, that is the last below (step + 1) G / k.
        return -(-(step + 1) * self.global_batch // self.patches_per_case) - self.global_batch

    def sample(self, position: int) -> Sample:
        """What stands at `position`. Raises IndexError outside the run."""
        if not 0 <= position < self.total:
            raise IndexError(f"position {position} is outside [0, {self.total})")
        step, place = divmod(position, self.global_batch)
        dealt = self.oldest(step) + place
        part = next(part for part in self._parts if step < part.steps)
        number = dealt - part.first + part.before
        epoch = min(max(0, number // self.cases), part.epochs - 1)
        if not part.first <= dealt < part.end:
            return Sample(position, epoch, None, _seed(self.seed, part.epochs, position))
        case = _shuffled(_seed(self.seed, epoch), self.cases)[number % self.cases]
        # By (epoch, case, patch), not by position: the crops of a case do not depend on the batch size.
        return Sample(position, epoch, case, _seed(self.seed, epoch, case, step - self.start(dealt)))

    def rank_positions(self, step: int, rank: int, world_size: int) -> range:
        """The positions of a step that `rank` trains."""
        first = step * self.global_batch
        return range(first + (rank - self.oldest(step)) % world_size, first + self.global_batch, world_size)

    def turns(self, step: int, world_size: int, cases_per_row: int) -> range:
        """The dealt case with which each turn begins, from `step` on: in a turn each rank receives one row."""
        if step >= self.steps:
            return range(0)
        first = max(0, self.oldest(step))  # of the cases before it, nothing is left to show
        # A turn begins with a multiple of W: then its row for rank r holds the numbers r mod W.
        return range(first - first % world_size, self.dealt, world_size * cases_per_row)

    def row(self, step: int, turn: int, rank: int, world_size: int, cases_per_row: int) -> Row:
        """What `rank` receives in the turn that begins with the dealt case `turn`, in a run that goes on at `step`."""
        until = min(turn + world_size * cases_per_row, self.dealt)
        there = self.row_dealt(step, turn, rank, world_size, cases_per_row)
        return Row(until, tuple(self._left(dealt, step) for dealt in there))

    def row_dealt(self, step: int, turn: int, rank: int, world_size: int, cases_per_row: int) -> list[int]:
        """The numbers of the dealt cases in that row."""
        mine = range(turn + rank, min(turn + world_size * cases_per_row, self.dealt), world_size)
        first = max(0, self.oldest(step))
        return [n for n in mine if n >= first and any(part.first <= n < part.end for part in self._parts)]

    def case(self, dealt: int) -> int:
        """Which case is dealt as this number: a fraction of a `sample`'s work. Raises IndexError for padding."""
        for part in self._parts:
            if part.first <= dealt < part.end:
                epoch, number = divmod(dealt - part.first + part.before, self.cases)
                return _shuffled(_seed(self.seed, epoch), self.cases)[number]
        raise IndexError(f"no case is dealt as number {dealt}")

    def _left(self, dealt: int, step: int) -> tuple[int, tuple[Sample, ...]]:
        """(case, its samples from `step` on) of a dealt case that is still shown then."""
        steps = range(max(step, self.start(dealt)), self.start(dealt) + self.patches_per_case)
        samples = tuple(self.sample(s * self.global_batch + dealt - self.oldest(s)) for s in steps)
        case = samples[0].case
        assert case is not None, "dealt cases are no padding"
        return case, samples
