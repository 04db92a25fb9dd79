"""EC2 nodes on spot, on demand where spot has no capacity: `provider.module` of cluster/p3.yaml and p4d.yaml.

In: what Ray's autoscaler asks of its AWS provider.
Out: the same instances; of an order that spot cannot fill, on-demand ones, unless `provider.on_demand_fallback: false`.

Ray 2.60 has a `priority` for node types, meant for this, but it moves on only from nodes that were allocated and did
not come up. A spot request that EC2 refuses is made again for ever.
"""

import logging
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

logger = logging.getLogger(__name__)

NO_SPOT = {
    "InsufficientInstanceCapacity",
    "InsufficientCapacity",
    "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow",
    "UnfulfillableCapacity",
}
"""EC2's error codes for: not as spot, not now. Of on-demand capacity they say nothing."""


class SpotFirst(AWSNodeProvider):
    """Ray's AWS provider; a node type that asks for spot gets on-demand nodes when there is none."""

    def _create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> Any:
        try:
            return super()._create_node(node_config, tags, count)
        except NodeLaunchException as error:
            wanted = "InstanceMarketOptions" in node_config and self.provider_config.get("on_demand_fallback", True)
            if not wanted or error.category not in NO_SPOT:
                raise
            kind = node_config["InstanceType"]
            logger.warning("no spot capacity for %d %s (%s): buying on demand", count, kind, error.category)
            on_demand = {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
            return super()._create_node(on_demand, tags, count)
