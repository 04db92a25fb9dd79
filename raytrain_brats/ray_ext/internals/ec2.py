"""Private names of Ray's autoscaler for AWS: its provider and its key pair. Runs in `ray up` and in the autoscaler.

In: the cluster's YAML. Out: instances.
"""

from ray.autoscaler._private.aws.config import _configure_key_pair as configure_key_pair
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

__all__ = ["AWSNodeProvider", "configure_key_pair"]

ATTRIBUTES = {
    "ray.autoscaler._private.aws.node_provider:AWSNodeProvider": (
        "_create_node",
        "bootstrap_config",
        "fillout_available_node_types_resources",
        "get_command_runner",
    ),
}
