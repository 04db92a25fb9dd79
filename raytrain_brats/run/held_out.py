"""Which cases a run, or the runs of its folds, held out, and which they trained on. Runs in the driver.

In: a run folder; where the cases are.
Out: the cases of a split, and where their voxels come from; or UserError where the run does not say.
"""

from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Case, Manifest
from raytrain_brats.data.store import Source
from raytrain_brats.errors import UserError
from raytrain_brats.labels import comparable, described
from raytrain_brats.run import members, spec


def cases_of_run(run_dir: str, data: str, store: str, split: str) -> tuple[Manifest, Source, tuple[Case, ...]]:
    """(all cases there, where they come from, those of split `val`, `train` or `all`), by fold where there are several.

    Raises UserError where the run, or the runs of its folds, do not say which cases were held out.
    """
    runs = {place: spec.open_run(place) for place in members.runs_of([run_dir])}
    run = next(iter(runs.values()))
    manifest, source = spec.open_cases(run.config, data, store, run_dir)
    own = [_is_own(place, one, manifest, source, split) for place, one in runs.items()]
    if len(runs) > 1 and (split == "train" or (split == "all" and any(own))):
        raise UserError(
            f"{run_dir} holds {len(runs)} folds, and each case of --split {split} was trained on by some: leave --split"
            " out, then each is scored by the network that has not seen it; or give one fold's run"
        )
    held_out = {run.config.data.fold for run in runs.values()}
    parts = {"val": lambda c: c.fold in held_out, "train": lambda c: c.fold not in held_out, "all": lambda _: True}
    cases = tuple(case for case in manifest.cases if parts[split](case))
    if not cases:
        raise UserError(f"{manifest.root} has no case in split {split!r}; choose another with --split")
    return manifest, source, tuple(sorted(cases, key=lambda case: case.fold) if len(runs) > 1 else cases)


def _is_own(run_dir: str, run: spec.StoredRun, manifest: Manifest, source: Source, split: str) -> bool:
    """Whether the cases are those the run was made of. Raises UserError where they must be, or mean something else."""
    if not comparable(run.convention, source.convention):
        raise UserError(
            f"{run_dir} learned labels read as {described(run.convention)}, {manifest.root} holds "
            f"{described(source.convention)}: WT, TC and ET are other tissues; give data of the run's own convention"
        )
    meant = spec.preprocessing(run.config), run.convention
    own = run.convention == source.convention and manifests.is_dataset_identity(
        run.dataset_identity, manifest.cases, *meant
    )
    if not own and split != "all":
        raise UserError(
            f"{manifest.root} is not what {run_dir} was trained on, so its folds do not say what was held out; "
            "give the run's own data, or --split all if none of these cases was trained on"
        )
    return own
