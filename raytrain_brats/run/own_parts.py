"""Networks, losses and augmentations of one's own, as a run meets them again. Runs in the driver.

In: a config, what the run folder says of its parts, weights.
Out: lines to tell: what a part is, which file was changed; or UserError, before anything is started.
"""

import sys
from typing import Any

from raytrain_brats.config import Config, own_parts
from raytrain_brats.errors import UserError
from raytrain_brats.networks import OwnNetwork
from raytrain_brats.run import spec
from raytrain_brats.run.events import event


def check(config: Config, run_dir: str) -> list[str]:
    """Before training: what there is to tell of the config's own parts. Raises UserError where one breaks a promise."""
    if not own_parts(config):
        return []
    from raytrain_brats.learn import own_check  # here: torch, which a driver does without otherwise

    told = own_check.check(config)
    try:
        changed = spec.read_config(run_dir).changed_parts(run_dir, own_parts(config).values())
    except FileNotFoundError:
        return told
    for line in changed:
        event(run_dir, "own_part_changed", text=line)
    return [*told, *(f"warning: {line}; steps from now on are by the new code" for line in changed)]


def check_weights(run_dir: str, run: spec.StoredRun, weights: dict[str, Any]) -> None:
    """Before predicting: tell which files were changed since. Raises UserError where the network is not there any more,
    or does not take the weights."""
    if not isinstance(run.config.network, OwnNetwork):
        return
    from raytrain_brats.learn.model import build_network

    for line in run.changed_parts(run_dir, [run.config.network]):
        print(f"warning: {line}", file=sys.stderr)
    try:
        build_network(run.config).load_state_dict(weights)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"{run_dir}: {run.config.network.name} does not take the weights of its checkpoint ({text}); bring its "
            "file back to what it was"
        ) from error
