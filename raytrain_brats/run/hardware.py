"""What a rank trains on, for the run's record. Runs in a worker.

In: its device.
Out: names and sizes of GPU and machine, versions of CUDA and driver; how much GPU memory was used at most.
"""

from typing import Any

import torch

from raytrain_brats import provenance


def facts(device: torch.device) -> dict[str, Any]:
    """{"machine", "torch"}, and of a GPU {"gpu_gb", "cuda", "driver"}."""
    machine = dict(provenance.machine())
    driver = machine.pop("driver", "")
    found: dict[str, Any] = {"machine": machine, "torch": torch.__version__}
    if device.type == "cuda":
        found["gpu_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
        found |= {"cuda": torch.version.cuda} | ({"driver": driver} if driver else {})
    return found


def peak(device: torch.device) -> dict[str, Any]:
    """{"gpu_peak_gb"} since the process began, or since `micro_batch` was chosen; {} without a GPU."""
    return {"gpu_peak_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2)} if device.type == "cuda" else {}
