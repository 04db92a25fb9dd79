"""Ray's provider for EC2, which completes the YAML from the account: `provider.module` of p3.yaml, p4d.yaml.

In: what `ray up` and Ray's autoscaler ask; the YAML's `provider` block, the environment, the AWS configuration.
Out: instances, on spot first. Before the first one, all that is missing in one list, and nothing launched.

Ray 2.60 has a `priority` for node types, meant for on demand after spot, but it moves on only from nodes that were
allocated and did not come up. A spot request that EC2 refuses is repeated for ever, as a spot run needs.
"""

import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

import click
from botocore.exceptions import BotoCoreError, ClientError
from ray.autoscaler.node_launch_exception import NodeLaunchException

from raytrain_brats.ec2 import account
from raytrain_brats.errors import UserError
from raytrain_brats.ray_ext.internals.ec2 import AWSNodeProvider, configure_key_pair

logger = logging.getLogger(__name__)

NO_CAPACITY = {"InsufficientInstanceCapacity", "InsufficientCapacity", "UnfulfillableCapacity", "SpotMaxPriceTooLow"}
NO_QUOTA = {"MaxSpotInstanceCountExceeded"}
"""EC2's error codes for: not as spot, not now; not as spot, until the account's quota is raised."""
GRAFANA = 3000
"""Its port on the head, and here when `ray dashboard` has opened the tunnel."""


class NotReadyError(click.ClickException):
    """What `ray` prints without a traceback."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(self.message, file or sys.stderr)


class Provider(AWSNodeProvider):
    """Ray's AWS provider; it fills the YAML in, and asks for spot nodes before it buys any on demand."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        if cached := provider_config.get("_config_cache_path"):
            # Ray would take it for the next `ray up` with the same file, whatever account or bucket is meant then
            Path(cached).unlink(missing_ok=True)
        super().__init__(provider_config, cluster_name)

    @staticmethod
    def fillout_available_node_types_resources(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Unchanged: the YAMLs give them, and `bootstrap_config` checks which instance types exist."""
        return cluster_config

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """The YAML as Ray needs it. Raises NotReadyError, before anything is made in the account."""
        config: dict[str, Any] = json.loads(json.dumps(cluster_config))  # the YAML's anchors make parts one object
        context = click.get_current_context(silent=True)
        given = context.params if context else {}
        up = context is None or "restart_only" in given or bool(given.get("start"))  # else down, dashboard, exec ...
        try:
            if up:
                account.fill(config, str(given.get("cluster_config_file") or ""))
                config["provider"]["on_demand_fallback"] = _fallback(config["provider"], bool(given.get("yes")))
            else:
                config["provider"]["region"] = account.region_of(config["provider"])
            return dict(configure_key_pair(config))
        except (UserError, ClientError, BotoCoreError) as error:
            raise NotReadyError(str(error)) from error

    def get_command_runner(self, *given: Any, **named: Any) -> Any:
        """Ray's own; that of `ray dashboard` opens a second tunnel beside its own, for Grafana."""
        runner: Any = super().get_command_runner(*given, **named)
        context = click.get_current_context(silent=True)
        if context and context.info_name == "dashboard" and context.params.get("port") != GRAFANA and _is_free(GRAFANA):
            run = runner.run

            def run_with_grafana(*given: Any, **named: Any) -> Any:
                if forward := named.get("port_forward"):
                    click.echo(f"Grafana: http://localhost:{GRAFANA}/d/raytrain-brats")
                    named["port_forward"] = [*forward, (GRAFANA, GRAFANA)]
                return run(*given, **named)

            runner.run = run_with_grafana
        return runner

    def _create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> Any:
        try:
            return super()._create_node(node_config, tags, count)
        except NodeLaunchException as error:
            if "InstanceMarketOptions" not in node_config or error.category not in NO_CAPACITY | NO_QUOTA:
                raise
            kind = node_config["InstanceType"]
            why = "your account's spot quota is used up" if error.category in NO_QUOTA else "spot has no capacity"
            if self.provider_config.get("on_demand_fallback") is not True:
                logger.warning("%s for %s (%s): asking again; nothing is bought on demand", why, kind, error.category)
                raise
            logger.warning("%s for %d %s (%s): BUYING ON DEMAND", why, count, kind, error.category)
            on_demand = {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
            return super()._create_node(on_demand, tags, count)


def _fallback(provider: dict[str, Any], yes: bool) -> bool:
    """`on_demand_fallback` as true or false; `ask` asks, where somebody is there who can answer. -y says yes to what
    Ray asks, not to a price."""
    wanted = provider.get("on_demand_fallback", False)
    if wanted != "ask":
        return bool(wanted)
    prices = provider.get("dollars_per_hour", "")
    if yes or not sys.stdin.isatty():
        click.echo("Spot alone: on_demand_fallback is `ask`, and there is nobody to ask. `true` buys on demand.")
        return False
    return click.confirm(f"When spot has none, buy on demand? Dollars an hour and node: {prices}", default=False)


def _is_free(port: int) -> bool:
    """Whether a tunnel may begin there: ssh gives up all that were asked for when one cannot be opened."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            click.echo(f"Port {port} is taken here: no tunnel to Grafana; ray attach -p takes others.")
            return False
    return True
