"""The learning rate of a run. Runs in workers, and in the driver, which does without torch.

In: the optimiser's options, samples seen, samples in all. Out: the rate.
"""

import math

from raytrain_brats.config import Optimiser


def learning_rate(options: Optimiser, samples_seen: int, total: int) -> float:
    """A function of samples, so that it is the same at any number of workers: linear warm-up, then `schedule`."""
    warmup = options.warmup_share * total
    if samples_seen < warmup:
        return options.learning_rate * (samples_seen + 1) / (warmup + 1)
    done = min(1.0, (samples_seen - warmup) / max(1.0, total - warmup))
    if options.schedule == "constant":
        return options.learning_rate
    if options.schedule == "poly":
        return float(options.learning_rate * (1 - done) ** 0.9)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
