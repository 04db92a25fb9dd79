"""Private names of Ray's core: key-value store, raylets, tokens, start-up. Runs in any process of a cluster.

In: addresses, keys. Out: values, idle processes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray
from ray._common.utils import get_ray_address_file
from ray._private import auto_init_hook, ray_constants, services
from ray._private.authentication import authentication_token_setup
from ray._private.grpc_utils import init_grpc_channel
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray._private.node import Node
from ray.core.generated import (
    common_pb2,
    gcs_service_pb2,
    gcs_service_pb2_grpc,
    node_manager_pb2,
    node_manager_pb2_grpc,
    runtime_environment_pb2,
)
from ray.experimental import internal_kv

ATTRIBUTES = {
    "ray._private.auto_init_hook": ("enable_auto_connect",),
    "ray._private.utils": ("set_sigterm_handler",),
    "ray._private.node:Node": ("start_api_server", "start_log_monitor", "start_monitor", "webui_url"),
    "ray._private.services": ("find_node_ids", "canonicalize_bootstrap_address_or_die", "get_node_ip_address"),
    "ray._private.authentication.authentication_token_setup": (
        "maybe_enable_token_auth_if_token_available",
        "generate_and_save_token",
    ),
    "ray.experimental.internal_kv": (
        "_internal_kv_put",
        "_internal_kv_get",
        "_internal_kv_list",
        "_internal_kv_initialized",
    ),
    "ray.core.generated.node_manager_pb2_grpc:NodeManagerServiceStub": (),
    "ray.core.generated.gcs_service_pb2_grpc:NodeInfoGcsServiceStub": (),
    "ray.core.generated.node_manager_pb2:PrestartWorkersRequest": (),
    "ray.core.generated.gcs_service_pb2:GetClusterIdRequest": (),
    "ray.core.generated.common_pb2:PYTHON": (),
    "ray.core.generated.runtime_environment_pb2:RuntimeEnvInfo": (),
    "ray.core.generated.autoscaler_pb2:DrainNodeReason": (),
    "ray._raylet:GcsClient": (),
    "ray._raylet:InnerGcsClient": ("internal_kv_keys", "internal_kv_get", "get_all_node_info", "drain_node"),
    "ray._private.ray_constants": ("WORKER_PROCESS_SETUP_HOOK_ENV_VAR",),
    # names given as text: loggers that are quieted, modules that are imported ahead
    "ray.train.v2._internal.execution.worker_group.worker": (),
}
NAMESPACE = b"raytrain_brats"
"""Of our keys in the cluster's key-value store."""
TOKEN_LOGGER = "ray._private.authentication"  # noqa: S105 - a logger's name
SETUP_HOOK = ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR
"""Environment variable by which Ray hands `worker_process_setup_hook` on."""
WORKER_MODULE = "ray.train.v2._internal.execution.worker_group.worker"
"""What a worker's process imports first; a warm process has imported it already."""


# The cluster's key-value store: an actor for a few bytes would need a process, and be lost with its node.


def kv_ready() -> bool:
    """Whether this process is connected; not while Ray shuts down."""
    return bool(internal_kv._internal_kv_initialized())


def kv_put(key: str, value: bytes) -> None:
    internal_kv._internal_kv_put(key.encode(), value, namespace=NAMESPACE)


def kv_get(key: str) -> bytes | None:
    found: bytes | None = internal_kv._internal_kv_get(key.encode(), namespace=NAMESPACE)
    return found


def kv_list(prefix: str) -> list[str]:
    return [key.decode() for key in internal_kv._internal_kv_list(prefix.encode(), namespace=NAMESPACE)]


def keep_own_signals() -> None:
    """Keep our SIGTERM handler: Ray's ends the process with status 15, or never."""
    ray._private.utils.set_sigterm_handler = lambda _: None


def stop_auto_connect() -> None:
    """Else a thread that calls Ray after `ray.shutdown` starts a new local Ray."""
    auto_init_hook.enable_auto_connect = False


@contextlib.contextmanager
def fewer_processes(logs: bool) -> Iterator[None]:
    """Within, a cluster that `ray.init` starts does without the processes that have nothing to do in it: 0.17 GB.

    These are the autoscaler of a machine that cannot grow; an API server which, without the dashboard, only sends usage
    statistics; and, unless `logs`, what copies the output of workers to this process. Never for a cluster that others
    join: `ray start` does not come this way.
    """
    names = ("start_api_server", "start_monitor", *(() if logs else ("start_log_monitor",)))
    before = {name: getattr(Node, name) for name in names}
    for name in names:
        setattr(Node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def address_file() -> str:
    """Where `ray start` leaves the head's address."""
    return str(get_ray_address_file(None))


def node_runs_here() -> bool:
    return bool(services.find_node_ids())


def use_token_if_there() -> None:
    """As Ray does for a cluster that it finds by itself."""
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def make_token() -> None:
    """What `ray get-auth-token --generate` does."""
    authentication_token_setup.generate_and_save_token()


def ask_cluster_id(head: str, timeout_s: float, wait: bool) -> None:
    """The one call that a Ray head answers to a caller without this id. Raises grpc.RpcError."""
    channel = init_grpc_channel(head, options=(("grpc.enable_http_proxy", 0),))
    try:
        question: Any = vars(gcs_service_pb2)["GetClusterIdRequest"]()
        ask: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetClusterId
        ask(question, timeout=timeout_s, wait_for_ready=wait)
    finally:
        channel.close()


def prestart(node: dict[str, Any], number: int, env: str, keep_s: int) -> None:
    """Ask a raylet for idle processes. Ray's own C++ does the same for `num_prestart_python_workers`."""
    calls, common, environments = (vars(m) for m in (node_manager_pb2, common_pb2, runtime_environment_pb2))
    request = calls["PrestartWorkersRequest"](
        language=common["PYTHON"],
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        runtime_env_info=environments["RuntimeEnvInfo"](serialized_runtime_env=env),
        keep_alive_duration_secs=keep_s,
        num_workers=max(0, number),
    )
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    try:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=10)
    finally:
        channel.close()


def spilled_bytes() -> int:
    """Bytes that all nodes' object stores have written to disk since they started."""
    return int(_store_stats().spilled_bytes_total)


def stored_bytes() -> int:
    """Bytes in all nodes' object stores."""
    return int(_store_stats().object_store_bytes_used)


def _store_stats() -> Any:
    return get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats


class ControlStore:
    """The cluster's control store as a node's own processes reach it, without `ray.init`, which takes too long on a
    machine that is about to be reclaimed. Raises what Ray raises."""

    def __init__(self, timeout_s: float) -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        self._timeout_s = timeout_s
        self.address = services.canonicalize_bootstrap_address_or_die("auto")
        self.here = services.get_node_ip_address()
        self._client: Any = GcsClient(address=self.address)

    def nodes_here(self, name: str = "") -> list[str]:
        """Ids of the living nodes of that name, or of this machine's address."""
        nodes = {key.hex(): about for key, about in self._client.get_all_node_info().items() if not about.state}
        return [k for k, n in nodes.items() if (n.node_name == name if name else n.node_manager_address == self.here)]

    def drain_for_preemption(self, node: str, text: str, by_ms: int) -> tuple[bool, str]:
        """(whether Ray accepted, why not)."""
        from ray.core.generated import autoscaler_pb2

        reason = vars(autoscaler_pb2)["DrainNodeReason"].Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = self._client.drain_node(node, reason, text, by_ms)
        return accepted, why

    def values(self, prefix: str) -> list[bytes]:
        """The values of our keys with this prefix."""
        keys = self._client.internal_kv_keys(prefix.encode(), NAMESPACE, timeout=self._timeout_s)
        return [self._client.internal_kv_get(key, NAMESPACE, timeout=self._timeout_s) or b"" for key in keys]
