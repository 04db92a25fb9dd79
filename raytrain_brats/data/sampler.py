"""Which case, crop and augmentation stands at each position of a run: integers only, no I/O.

In: seed, number of cases, global batch, patches per case, window, epochs.
Out: for a position its case and seeds; for a rank the positions it owns; for a cursor the stretch to stream.

A run is the list of positions 0 .. total-1. Step s applies positions [s*G, (s+1)*G) whatever the number of
workers. An epoch holds every case `patches_per_case` times, padded to whole global batches by samples of weight
zero. Cases are shuffled anew each epoch; groups of `window_cases` are decoded together and their patches shuffled
among each other, so one decode serves several patches and neighbours still differ.

The idea of a partition that is a pure function is MosaicML Streaming's (`partition/`); theirs asks that the world
size divides the batch, this one does not.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SEGMENT_WINDOWS = 1024
"""Read tasks of one Ray Data execution: each costs 1.2 ms before the first row, each execution about 1 s."""


@dataclass(frozen=True)
class Sample:
    """What stands at one position. `case` is an index into the sorted training cases, None for padding."""

    position: int
    epoch: int
    case: int | None
    seed: int


def draw(seed: int, purpose: str, count: int) -> list[float]:
    """`count` numbers in [0, 1): the same for the same arguments on any machine and library version."""
    numbers: list[float] = []
    for block in range((count + 7) // 8):
        digest = hashlib.blake2b(f"{seed}/{purpose}/{block}".encode(), digest_size=64).digest()
        # 53 bits fill a float; 64 would round up to 1.0 now and then
        numbers += [(int.from_bytes(digest[i : i + 8], "little") >> 11) / 2**53 for i in range(0, 64, 8)]
    return numbers[:count]


def _seed(*parts: int) -> int:
    """A 63-bit seed from integers (so that it fits a signed 64-bit column)."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def fingerprint(position: int, case_id: str, seed: int) -> int:
    """32 bits of what stands at a position. A step's sum over its samples is the same however ranks share them."""
    text = f"{position}/{case_id}/{seed}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


@lru_cache(maxsize=8)
def _shuffled(seed: int, count: int) -> tuple[int, ...]:
    # RandomState is frozen by NumPy's policy (NEP 19); Generator may change between releases.
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
        members = order[window * self.window_cases : (window + 1) * self.window_cases]
        mixed = _shuffled(_seed(self.seed, epoch, window), len(members) * self.patches_per_case)
        case, patch = members[mixed[row] // self.patches_per_case], mixed[row] % self.patches_per_case
        return Sample(position, epoch, case, _seed(self.seed, epoch, case, patch))

    def windows(self, low: int, high: int) -> list[range]:
        """The positions [low, high) cut where a new group of cases begins: one read task each."""
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
        """[low, high) that one Ray Data execution streams from `cursor` on; high ends a global step."""
        steps = max(1, SEGMENT_WINDOWS * self.window_samples // self.global_batch)
        length = steps * self.global_batch
        return cursor, min(self.total, (cursor // length + 1) * length)

    def rank_positions(self, step_start: int, stream_start: int, rank: int, world_size: int) -> list[int]:
        """The positions of the step beginning at `step_start` that `rank` receives from a stream split over ranks.

        The split deals rows in turn from `stream_start` on, so counts differ by at most one and any world size
        from 1 to the global batch works.
        """
        end = min(step_start + self.global_batch, self.total)
        first = step_start + (stream_start + rank - step_start) % world_size
        return list(range(first, end, world_size))
