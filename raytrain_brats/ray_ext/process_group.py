"""Connect a group's workers by torch.distributed, with torch in the workers alone. Runs in Ray Train's controller; what
it sends, in workers.

In: a worker group. Out: one process group of all its workers, ended with it.

Ray's own `TorchConfig` lives in a module that imports torch in every process that unpickles it: 0.1 GB each in the
driver and in the controller, which compute nothing.
"""

import logging
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig

from raytrain_brats.ray_ext.internals import train as ray_train

_logger = logging.getLogger(__name__)
TIMEOUT_S = 1000
"""Of a collective operation: the net behind the hang detector, which names the rank that the others wait for. So it is
longer than that one's patience with any rank (900 s, in a validation), and shorter than TorchConfig's half an hour."""


@dataclass
class ProcessGroup(BackendConfig):
    """Does what `TorchConfig()` does, by the same functions, called in the workers."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Setup

    @property
    def train_func_context(self) -> Any:
        return ray_train.on_device

    @property
    def framework(self) -> Any:
        return ray_train.TrainingFramework.TORCH


class _Setup(Backend):
    share_cuda_visible_devices = True  # else a worker's GPU cannot copy to another's

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        address, port = worker_group.execute_single(0, ray_train.get_address_and_port)
        size = len(worker_group)
        joining = [(ray_train.join, address, port, backend, rank, size, TIMEOUT_S) for rank in range(size)]
        ray.get([worker_group.execute_single_async(rank, *call) for rank, call in enumerate(joining)])

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Raises what a worker raised, as `TorchConfig` does: Ray Train reports it and ends the group all the same."""
        timeout_s = ray_train.leave_timeout_s()
        leaving = worker_group.execute_async(ray_train.leave, len(worker_group) > 1)
        try:
            ray.get(leaving, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            _logger.warning("workers did not leave their process group within %d s", timeout_s)
