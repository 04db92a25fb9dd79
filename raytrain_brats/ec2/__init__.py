"""Clusters on EC2: what `ray up cluster/p4d.yaml` calls, and `raytrain-brats ec2 left`.

In: the name of a step and its options, AWS credentials. For Ray: `Provider`, the `provider.module` of the YAMLs.
Out: the step's exit code.
"""

import importlib
import sys

from raytrain_brats.cli import choose
from raytrain_brats.ec2.provider import Provider

__all__ = ["Provider", "main"]

STEPS = {"left": "list what is left in your account that costs money, such as after `ray down`"}


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    name = choose("raytrain-brats ec2", "step", given, STEPS)
    if isinstance(name, int):
        return name
    return int(importlib.import_module(f"raytrain_brats.ec2.{name}").main(given[1:]))
