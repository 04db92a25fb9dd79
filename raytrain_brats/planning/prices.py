"""Machines and their prices, of the one dated file. Runs in commands, and in Ray's autoscaler on the head.

In: `prices.yaml`. Out: `Machine`s by name, what a cluster's nodes cost by role; UserError with the nearest names.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from raytrain_brats.errors import UserError

FILE = "raytrain_brats/planning/prices.yaml"


@dataclass(frozen=True)
class Machine:
    """An instance type of EC2; USD an hour."""

    kind: str
    vcpus: int
    memory_gb: float
    network_gbps: float
    gpus: int = 0
    gpu: str = ""
    gpu_gb: float = 0.0
    on_demand: float | None = None
    spot: tuple[float, float] | None = None
    """Lowest and highest that was seen; None where none was."""


@lru_cache
def table(part: str) -> dict[str, Any]:
    """`ec2` or `sagemaker`: {date, region, instances}."""
    return dict(yaml.safe_load((resources.files("raytrain_brats.planning") / "prices.yaml").read_bytes())[part])


def near(name: str, known: list[str]) -> str:
    """A hint for a message: the nearest names, else all."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"


@lru_cache
def machine(kind: str, option: str = "--gpus") -> Machine:
    """Raises UserError for a type that the file does not have."""
    known = table("ec2")["instances"]
    if kind not in known:
        raise UserError(f"{option} {kind}: {FILE} has no such instance type; {near(kind, list(known))}")
    about = dict(known[kind])
    spot = about.pop("spot", None)
    return Machine(kind, spot=(float(spot[0]), float(spot[1])) if spot else None, **about)


def nodes(given: str, option: str) -> tuple[Machine, int]:
    """(machine, number of nodes) of KIND:COUNT. Raises UserError."""
    kind, _, count = given.partition(":")
    found = machine(kind, option)
    if not (count or "1").isdigit() or (found.gpus and int(count or 1) < 1):
        raise UserError(f"{option} {given}: write it as KIND:NODES, such as {kind}:2")
    return found, int(count or 1)


def by_role(node_types: Mapping[str, Any]) -> str:
    """`head=0.384,train=21.958`: on demand, a node of each type of a cluster's YAML; "" unless all have a price, as a
    sum without the dearest would mislead."""
    known = table("ec2")["instances"]
    priced: dict[str, float] = {}
    for name, about in node_types.items():
        role = (about.get("labels") or {}).get("role", name)
        price = known.get(about["node_config"].get("InstanceType"), {}).get("on_demand")
        if price is None:
            return ""
        priced[role] = max(price, priced.get(role, 0.0))
    return ",".join(f"{role}={round(price, 3):g}" for role, price in priced.items())
