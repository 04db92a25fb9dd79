"""Begin with another run's weights: `train --init-from`. Runs in the driver, which copies them, and in workers, which
read the copy.

In: a run folder, one of its checkpoints, or a file made by `share`.
Out: `initial.safetensors` in the new run's folder, and what config.yaml says of it; or UserError where they do not fit.

A copy, since the other run may train on, or be gone, when this one starts again before its first checkpoint.
"""

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from raytrain_brats import config as configs
from raytrain_brats import outputs, storage
from raytrain_brats.config import Config
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import described
from raytrain_brats.run import checkpoint, gains, shared_file, spec
from raytrain_brats.run.run_dir import RunDir
from raytrain_brats.run.spec import Initial, RunSpec, StoredRun

if TYPE_CHECKING:
    from torch import Tensor

HEADS = ("deep_supervision_heads.", "heads.", "output_block.", "out_0.", "conv_final.")
"""Weights that may differ: the outputs of a network, also those that only training has."""


def check(run_spec: RunSpec, given: str) -> None:
    """Raises UserError when the run was begun otherwise than `--init-from` says now."""
    if not given or not storage.exists(RunDir(run_spec.run_dir).config):
        return
    begun = run_spec.initial
    if begun is None or begun.given != outputs.place(given):
        how = f"with the weights of {begun.given}" if begun else "without --init-from"
        raise UserError(f"{run_spec.run_dir} was begun {how}; leave --init-from {given} out, or give another --run-dir")


def begin(run_spec: RunSpec, given: str) -> tuple[RunSpec, list[str]]:
    """The spec of a run that begins with these weights, which are copied into its folder; what to tell, in lines.

    One that has begun stays as it is. Raises UserError.
    """
    if not given or storage.exists(RunDir(run_spec.run_dir).config):
        return run_spec, []
    from raytrain_brats.learn.model import build_network  # torch and MONAI: only for a run that begins so

    run_dir, run, name, weights = _source(given, run_spec.config.data.fold)
    own = build_network(run_spec.config).state_dict()
    kept, left_out, fresh = fitting(given, run.config, weights, run_spec.config, own)
    content = bytes(checkpoint.tensors_file(kept))
    storage.write_bytes(RunDir(run_spec.run_dir).initial, content)
    sha256 = hashlib.sha256(content).hexdigest()
    initial = Initial(outputs.place(given), outputs.place(run_dir), name, sha256, left_out, fresh)
    return replace(run_spec, initial=initial), _lines(run_spec, run, initial)


def load(run_dir: str, initial: Initial) -> "dict[str, Tensor]":
    """The weights that a run begins with. Raises RunFailed when they are not those that its config.yaml names."""
    from safetensors.torch import load as tensors_from_bytes

    where = RunDir(run_dir).initial
    try:
        content = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise RunFailed(f"{where} is gone, and no checkpoint was made yet; give another --run-dir") from error
    if hashlib.sha256(content).hexdigest() != initial.sha256:
        raise RunFailed(f"{where} differs from its checksum, and no checkpoint was made yet; give another --run-dir")
    return tensors_from_bytes(content)


def _source(given: str, fold: int) -> "tuple[str, StoredRun, str, dict[str, Tensor]]":
    """(its place, its run, name of the checkpoint, the weights with which it predicts). Raises UserError."""
    from raytrain_brats.run.predictor import weights_of

    where = storage.normal(given)
    if shared_file.is_named(where):
        networks = shared_file.read(where)
        one = next((n for n in networks if n.config.data.fold == fold), networks[0])
        return where, StoredRun(one.config, one.convention, one.dataset_identity, ""), one.checkpoint, one.weights
    above, _, last = where.rpartition("/")
    if last == "best" or checkpoint.is_name(last):
        run_dir = above.removesuffix("/checkpoints")
        run = spec.open_run(run_dir)
        found = gains.best_valid(run_dir) if last == "best" else checkpoint.valid(run_dir, last)
        if found is None:
            known = ", ".join(name for name, _, _ in checkpoint.committed(run_dir)) or "none"
            raise UserError(f"--init-from {given}: {run_dir} has no such valid checkpoint; there are {known}")
        return run_dir, run, *weights_of(run_dir, found)
    if not storage.exists(RunDir(where).config) and spec.fold_run(where, fold) in spec.folds_in(where):
        where = spec.fold_run(where, fold)
    run = spec.open_run(where)
    found, _ = checkpoint.newest_valid(where)
    if found is None:
        raise UserError(f"--init-from {given}: {where} has no valid checkpoint yet; train it first")
    return where, run, *weights_of(where, found)


def fitting(
    given: str, theirs: Config, weights: "dict[str, Tensor]", ours: Config, own: "dict[str, Tensor]"
) -> "tuple[dict[str, Tensor], list[str], list[str]]":
    """(weights that both networks have, names only they have, names only ours has). Raises UserError where they differ
    in more than their heads."""
    # DynUNet's skip_layers are named twice in format 1
    weights = {n: t for n, t in weights.items() if n in own or not n.startswith("skip_layers.")}
    kept = {name: t for name, t in weights.items() if name in own and own[name].shape == t.shape}
    left_out, fresh = sorted(weights.keys() - kept.keys()), sorted(own.keys() - kept.keys())
    if wrong := [name for name in {*left_out, *fresh} if not name.startswith(HEADS)]:
        first = min(wrong)
        shapes = [str(tuple(n[first].shape)) if first in n else "none" for n in (weights, own)]
        changed = [line for line in configs.differences(theirs, ours) if line.startswith("network.")]
        why = "; ".join(changed) or "their code differs"
        raise UserError(
            f"--init-from {given}: its network is another one ({why}): {len(wrong)} weights differ, such as {first}, "
            f"{shapes[0]} there and {shapes[1]} here; give this run the network section of that one's config.yaml"
        )
    return kept, left_out, fresh


def _lines(run_spec: RunSpec, run: StoredRun, initial: Initial) -> list[str]:
    lines = [f"begins with the weights of {initial.run}, checkpoint {initial.checkpoint}; all else is new"]
    if initial.left_out:
        lines.append(f"left out, as this network has no such heads: {', '.join(initial.left_out)}")
    if initial.fresh:
        lines.append(f"begin at random, as that network had no such heads: {', '.join(initial.fresh)}")
    if run.convention != run_spec.source.convention:
        ours = described(run_spec.source.convention)
        lines.append(f"that run learned {described(run.convention)}, this one learns {ours}")
    was, now = (c.preprocess.spacing_mm for c in (run.config, run_spec.config))
    if was != now:
        lines.append(f"that run saw voxels of {was:g} mm, this one sees {now:g} mm")
    if run.dataset_identity == run_spec.dataset_identity and run.config.data.fold != run_spec.config.data.fold:
        lines.append(
            f"warning: that run trained on the cases that this one holds out (fold {run_spec.config.data.fold}): "
            "scores will be too good"
        )
    return lines
