"""Private names of Ray Train's torch backend. Runs in workers alone: it imports torch.

In: an address, a rank, a world size. Out: a process group, ended with the worker group.
"""

import os
from typing import Any

from ray.train.torch import config as torch_config

ATTRIBUTES = {
    "ray.train.torch.config": (
        "TorchConfigContextManager",
        "_set_torch_distributed_env_vars",
        "_setup_torch_process_group",
        "_shutdown_torch",
    ),
}


def on_device() -> Any:
    """A context in which the worker's GPU, if it has one, is torch's default."""
    return torch_config.TorchConfigContextManager()


def join(address: str, port: int, backend: str, rank: int, world_size: int, timeout_s: int) -> None:
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    torch_config._set_torch_distributed_env_vars()
    torch_config._setup_torch_process_group(
        backend=backend, world_rank=rank, world_size=world_size, init_method="env://", timeout_s=timeout_s
    )


def leave(several: bool) -> None:
    torch_config._shutdown_torch(destroy_process_group=several)
