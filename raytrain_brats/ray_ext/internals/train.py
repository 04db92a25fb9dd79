"""Private names of Ray Train: its controller's callbacks and states, how it counts possible workers, its torch backend.

In: Ray Train's controller; an address and a rank. Out: base classes; a policy that counts given nodes; a process group
that workers join and leave. Runs in Ray Train's controller, and in workers.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray._common.utils import env_integer
from ray.train import constants
from ray.train._internal.utils import get_address_and_port
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, ResizingState, RunningState
from ray.train.v2._internal.execution.preemption import _get_draining_nodes
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.util import TrainingFramework
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

__all__ = [
    "ControllerCallback",
    "DataParallelTrainer",
    "LocalTrainer",
    "PreemptingState",
    "ResizingState",
    "RunningState",
    "TrainingFramework",
    "WorkerGroupCallback",
    "get_address_and_port",
]

ATTRIBUTES = {
    "ray.train.v2._internal.execution.callback:ControllerCallback": (
        "after_controller_start",
        "after_controller_state_update",
        "before_controller_execute_failure_decision",
    ),
    "ray.train.v2._internal.execution.callback:WorkerGroupCallback": ("after_worker_group_training_start",),
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer": ("_create_default_callbacks",),
    "ray.train.v2._internal.execution.scaling_policy.elastic:ElasticScalingPolicy": (
        "_get_reserved_resources",
        "make_decision_for_running_worker_group",
        "_count_possible_workers",
    ),
    "ray.train.v2._internal.execution.controller.state:PreemptingState()": ("preemption_info",),
    "ray.train.constants": (
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S",
        "DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S",
    ),
    "ray.train:ScalingConfig()": ("_resources_per_worker_not_none",),
    "ray.train.torch.config": (
        "TorchConfigContextManager",
        "_set_torch_distributed_env_vars",
        "_setup_torch_process_group",
        "_shutdown_torch",
    ),
}
_reserved = ElasticScalingPolicy._get_reserved_resources
_decide = ElasticScalingPolicy.make_decision_for_running_worker_group


class LocalTrainer(DataParallelTrainer):
    """A trainer on a cluster that this process started, which ends with it.

    It has no PlacementGroupCleaner: a process of 0.12 GB that frees the worker group's resources when the controller
    alone is killed, for other users of the cluster.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def leave_timeout_s() -> int:
    """How long workers may take to leave their process group: Ray's environment variable, as `TorchConfig` reads it."""
    name, default = "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", constants.DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
    return int(env_integer(name, default))


def draining_nodes() -> set[str]:
    """Ids of the nodes that are being drained."""
    return set(_get_draining_nodes() or {})


def end_preemption_wait_at(state: Any, deadline_ms: int) -> None:
    """Ray would wait for the node's deadline before it starts a group elsewhere."""
    state.preemption_info = replace(state.preemption_info, deadline_ms=deadline_ms)


def per_worker(policy: Any) -> dict[str, float]:
    """What one worker needs of a node."""
    return dict(policy.scaling_config._resources_per_worker_not_none)


def possible_workers(policy: Any, reserved: Any) -> int:
    return int(policy._count_possible_workers(reserved))


def count_on(
    nodes_for: Callable[[Any, dict[str, Any]], dict[str, Any]],
    while_running: Callable[[Any, Any, dict[str, Any]], dict[str, Any]],
) -> None:
    """Replace the nodes on which Ray Train's elastic policy counts workers, {node: resources}, in this process.

    `nodes_for(policy, reserved)` returns the nodes for any group; `while_running(policy, group, nodes)` those of them
    that count while a group trains. Ray's reservations do not know of dead, drained or cold nodes in time.
    """

    def reserved(policy: Any) -> Any:
        found = _reserved(policy)
        if found is None:
            return None
        return getattr(policy, "_counts_now", lambda nodes: nodes)(nodes_for(policy, found))

    def decide(policy: Any, worker_group_state: Any, worker_group_status: Any) -> Any:
        policy._counts_now = lambda nodes: while_running(policy, worker_group_state, nodes)
        try:
            return _decide(policy, worker_group_state, worker_group_status)
        finally:
            del policy._counts_now

    ElasticScalingPolicy._get_reserved_resources = reserved  # type: ignore
    ElasticScalingPolicy.make_decision_for_running_worker_group = decide  # type: ignore


# Called in workers, and only there the torch backend is imported: it imports torch.


def on_device() -> Any:
    """A context in which the worker's GPU, if it has one, is torch's default."""
    from ray.train.torch import config

    return config.TorchConfigContextManager()


def join(address: str, port: int, backend: str, rank: int, world_size: int, timeout_s: int) -> None:
    """Make this process a rank of the process group whose rank 0 listens at `address`."""
    from ray.train.torch import config

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(
        backend=backend, world_rank=rank, world_size=world_size, init_method="env://", timeout_s=timeout_s
    )


def leave(several: bool) -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=several)
