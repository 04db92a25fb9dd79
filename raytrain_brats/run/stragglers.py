"""Find ranks that need far longer than the others for a sample. Runs in a worker.

In: each rank's seconds a sample, step by step. Out: the ranks that became slow, for events.
"""

import math
import statistics
from collections import deque


class Stragglers:
    """By medians, which single outliers do not move.

    The measure is a rank's ratio to the median of the others in the same step. Over a window of steps its median must
    be far above 1, also compared with its own spread (1.4826 MAD estimates a normal distribution's standard deviation,
    Hampel 1974, doi 10.1080/01621459.1974.10482962; that of a median of n values is 1.25 / sqrt(n) times it).
    """

    WINDOW, SLOWER, WELL = 17, 1.5, 1.2

    def __init__(self, world_size: int) -> None:
        self._recent: list[deque[float]] = [deque(maxlen=self.WINDOW) for _ in range(world_size)]
        self._flagged: set[int] = set()

    def add(self, seconds: tuple[float, ...]) -> list[tuple[int, float]]:
        """(rank, times slower than the others) of those found in this step; a rank is found again only after it was
        well."""
        found = []
        for rank, recent in enumerate(self._recent if len(seconds) > 1 else ()):
            recent.append(seconds[rank] / max(statistics.median(seconds[:rank] + seconds[rank + 1 :]), 1e-9))
            centre = statistics.median(recent)
            deviation = 1.4826 * statistics.median(abs(ratio - centre) for ratio in recent)
            error = 1.25 * deviation / math.sqrt(len(recent))
            if len(recent) == self.WINDOW and centre > self.SLOWER and centre - 1 > 3 * error:
                if rank not in self._flagged:
                    found.append((rank, round(centre, 2)))
                self._flagged.add(rank)
            elif centre < self.WELL:
                self._flagged.discard(rank)
        return found
