"""Which case, crop and augmentation belongs to each position of a run: integers only, no I/O. Runs in any process.

In: seed, number of cases, global batch, patches per case, window, epochs.
Out: for a position its case and seed; for a rank its positions in a step; for a cursor the segment to stream.

A run is the list of positions 0 .. total-1. Step s applies positions [s*G, (s+1)*G) whatever the number of
workers. An epoch holds every case `patches_per_case` times, padded to whole global batches by samples of weight
zero. Cases are shuffled anew each epoch; `window_cases` of them are decoded together and their patches shuffled
within the window, so one decode serves several patches and neighbouring steps still see different cases.

Everything here is a pure function of (seed, position): a resume needs one number, `samples_seen`, and no state of a
generator; any process computes any position without those before it. The idea is MosaicML Streaming's (`partition/`);
theirs asks that the world size divides the batch, this one does not.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SEGMENT_WINDOWS = 1024
"""Read tasks of one Ray Data execution, a compromise: each costs 1.2 ms before the first row, and each execution about
1 s in which nothing is streamed."""


@dataclass(frozen=True)
class Sample:
    """What belongs to one position. `case` is an index into the sorted training cases, None for padding."""

    position: int
    epoch: int
    case: int | None
    seed: int


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
class Sampler:
    """The order of a whole run, as a pure function."""

    seed: int
    cases: int
    global_batch: int
    patches_per_case: int
    window_cases: int
    epochs: int

    @property
    def epoch_samples(self) -> int:
        """Real samples of an epoch."""
        return self.cases * self.patches_per_case

    @property
    def epoch_length(self) -> int:
        """Positions of an epoch: its samples padded to whole global batches."""
        return -(-self.epoch_samples // self.global_batch) * self.global_batch

    @property
    def total(self) -> int:
        """Positions of the run."""
        return self.epoch_length * self.epochs

    @property
    def window_samples(self) -> int:
        return self.window_cases * self.patches_per_case

    def sample(self, position: int) -> Sample:
        """What stands at `position`. Raises IndexError outside the run."""
        if not 0 <= position < self.total:
            raise IndexError(f"position {position} is outside [0, {self.total})")
        epoch, within = divmod(position, self.epoch_length)
        if within >= self.epoch_samples:
            return Sample(position, epoch, None, _seed(self.seed, epoch, within))
        window, row = divmod(within, self.window_samples)
        order = _shuffled(_seed(self.seed, epoch), self.cases)
        # Two shuffles: of cases over the epoch, of patches within a window. The last window may hold fewer cases.
        members = order[window * self.window_cases : (window + 1) * self.window_cases]
        mixed = _shuffled(_seed(self.seed, epoch, window), len(members) * self.patches_per_case)
        case, patch = members[mixed[row] // self.patches_per_case], mixed[row] % self.patches_per_case
        # By (epoch, case, patch), not by position: the crops of a case do not depend on the batch size or the window.
        return Sample(position, epoch, case, _seed(self.seed, epoch, case, patch))

    def windows(self, low: int, high: int) -> list[range]:
        """The positions [low, high) split at the windows' borders: one read task each."""
        cuts: list[range] = []
        while low < high:
            epoch, within = divmod(low, self.epoch_length)
            last = -(-self.epoch_samples // self.window_samples) - 1  # the last window takes the padding too
            window = min(within // self.window_samples, last)
            end = self.epoch_length if window == last else (window + 1) * self.window_samples
            end = min(high, epoch * self.epoch_length + end)
            cuts.append(range(low, end))
            low = end
        return cuts

    def segment(self, cursor: int) -> tuple[int, int]:
        """[low, high) that one Ray Data execution streams from `cursor` on; high ends a global step.

        `high` lies on a fixed grid, not at a distance from `cursor`: after a resume all later segments are the same.
        """
        steps = max(1, SEGMENT_WINDOWS * self.window_samples // self.global_batch)
        length = steps * self.global_batch
        return cursor, min(self.total, (cursor // length + 1) * length)

    def rank_positions(self, step_start: int, stream_start: int, rank: int, world_size: int) -> list[int]:
        """The positions of the step beginning at `step_start` that `rank` receives from a stream split over ranks.

        The split deals rows in turn from `stream_start` on, so counts differ by at most one and any world size
        from 1 to the global batch works.
        """
        # Position p goes to rank (p - stream_start) mod W, so the first of this step is the least p >= step_start with
        # p = stream_start + rank (mod W). Where W does not divide G, the extra sample moves from rank to rank.
        end = min(step_start + self.global_batch, self.total)
        first = step_start + (stream_start + rank - step_start) % world_size
        return list(range(first, end, world_size))
