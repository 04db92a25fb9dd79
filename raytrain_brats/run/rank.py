"""Which rank of its worker group a process is. Runs in a worker.

In: Ray Train's context. Out: a value for the parts of the loop that need it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import device as Device  # noqa: N812 - imported by the workers alone, as the spot watcher reads heartbeats


@dataclass(frozen=True)
class Rank:
    number: int
    world_size: int
    device: "Device"
