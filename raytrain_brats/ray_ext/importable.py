"""Whether every node can import a network, loss or augmentation of one's own. Runs in the driver.

In: their names; a connected cluster.
Out: nothing; or UserError that names the node, what it lacks and how to ship it.

A Ray of this process has the driver's folder on its workers' path, and a job's working directory is theirs. A cluster
that is joined otherwise sees a folder only where it is mounted, or where the package is installed.
"""

from collections.abc import Iterable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrain_brats import parts
from raytrain_brats.errors import UserError
from raytrain_brats.parts import OwnPart

_PATIENCE_S = 120.0
"""A node's first process, torch and the module: seconds; longer where the node is busy."""


def check(own: Iterable[OwnPart], told: dict[str, dict[str, str]] | None = None) -> None:
    """Raises UserError unless all nodes that are up import these parts, from files of the driver's content.

    `told`: what the driver has (`parts.sources`); by default it is found.
    """
    wanted = list(own)
    if not wanted:
        return
    mine = parts.sources(wanted) if told is None else told
    there: Any = ray.remote(num_cpus=0, max_retries=0)(_there)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    asked = {
        there.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            wanted
        ): node["NodeManagerHostname"]
        for node in nodes
    }
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE_S)
    for answer in done:
        missing, found = ray.get(answer)
        if missing:
            raise UserError(
                f"node {asked[answer]} cannot use {missing}; ship the folder (`ray job submit --working-dir . -- "
                "raytrain-brats ...`), or install the package on every node"
            )
        for name, about in found.items():
            if about["sha256"] != mine[name]["sha256"]:
                raise UserError(
                    f"node {asked[answer]} has another {about['file']} ({name}) than this process; ship the folder "
                    "(`ray job submit --working-dir . -- raytrain-brats ...`), or bring both to one version"
                )


def _there(wanted: list[OwnPart]) -> tuple[str, dict[str, dict[str, str]]]:
    """(what is missing here, in words; the files that are here)."""
    try:
        return "", parts.sources(wanted)
    except UserError as error:
        return str(error), {}
