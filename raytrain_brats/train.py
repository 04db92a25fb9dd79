"""Train, or go on training: `raytrain-brats train --data URI --run-dir URI`.

In: a folder of NIfTI cases or a prepared store; a recipe; a run folder.
Out: the run folder: checkpoints, rows of steps, events, validation tables; with `--fold` one for each fold below it.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from raytrain_brats import config, ending, storage
from raytrain_brats.cases import recipe as recipes
from raytrain_brats.cli import Changes, Uri, Workers, cases_from, default, entry, run_folder, show_skipped
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import FOLDS
from raytrain_brats.errors import UserError
from raytrain_brats.ray_ext import cluster
from raytrain_brats.run import checkpoint, driver, folds, initial, journal, lease, own_parts, spec
from raytrain_brats.run.run_dir import RunDir

HOME = "~/raytrain_brats"
PHANTOM_CASES = 20
_LEFT_BY_A_START = re.compile(
    r"lease\.json|generation\.json|initial\.safetensors|plan\.json|write-probe|probe-[0-9a-f]{32}|(ray-logs|sagemaker)/.*|"
    r"[^/]+\.(log|out|err|txt)"
)
"""What may lie in a run folder before its config.yaml: a start of ours was killed, `plan` came first, SageMaker's own
files, the file into which a shell puts what this command prints."""
_BESIDE_FOLDS = re.compile(rf"fold-\d/.*|manifest\.jsonl|evaluations?/.*|{_LEFT_BY_A_START.pattern}")


@dataclass(frozen=True)
class Args:
    """Train a recipe on Ray; the same command again goes on where the run stands.

    Joins the cluster of RAY_ADDRESS or of `ray start`, else starts Ray inside this process. Options win over
    RAYTRAIN_BRATS_DATA, RAYTRAIN_BRATS_STORE and RAYTRAIN_BRATS_RUN_DIR, those over the recipe. With no cases at all
    it trains the demo recipe on phantoms it makes, in a run folder of its own: under ~/raytrain_brats, or beside
    RAYTRAIN_BRATS_RUN_DIR.
    """

    data: Uri = ""
    """Folder in MSD or BraTS layout (local or s3://), or a manifest from `index`: preprocessed while training."""
    store: Uri = ""
    """Store made by `prepare`: read instead of --data. That of RAYTRAIN_BRATS_STORE counts once it is finished."""
    run_dir: Uri = ""
    """Where the run lives (local or s3://)."""
    recipe: str = ""
    """Name of a recipe, or a YAML file; by default RAYTRAIN_BRATS_RECIPE, and `demo` for phantoms."""
    workers: Workers = ""
    """Training workers; the run goes on with any number in between."""
    fold: Annotated[str, tyro.conf.arg(metavar="all|K", help_behavior_hint="")] = ""
    """Train without fold K (0 to 4) into RUN_DIR/fold-K; `all`: the five, side by side as there is room."""
    init_from: Annotated[Uri, tyro.conf.arg(metavar="RUN[/CHECKPOINT]", help_behavior_hint="")] = ""
    """Begin with another run's weights: of its newest checkpoint, RUN/best, RUN/CHECKPOINT, or a file by `share`."""
    set: Changes = ()
    """Change a setting of the recipe: key=value, such as train.epochs=20; may be given several times."""


def work(args: Args) -> None:
    folds.end_with_parent()
    overrides = args.set + ((f"run.workers={args.workers!r}",) if args.workers else ())
    data, store = cases_from(args.data, args.store)
    real = bool(data or store)
    recipe = recipes.recipe_for(default(args.recipe, "RECIPE") if real else args.recipe, data, store)
    settings = config.load(recipe, overrides + _held_out(args))
    if real:
        run_dir = run_folder(args.run_dir)
    else:
        data, own = _demo_places()
        run_dir = args.run_dir or (f"{own}-folds" if args.fold else own)
    if args.fold:
        _check_place_of_folds(run_dir)
        run_dir = storage.normal(run_dir) if args.fold == "all" else spec.fold_run(run_dir, int(args.fold))
    if args.fold != "all":
        _check_run_dir(run_dir)
    lease.check(storage.normal(run_dir))
    if not real:
        _make_phantoms(data)
    if args.fold == "all":
        with lease.hold(run_dir):
            _train_folds(args, settings, recipe, run_dir, data, store)
        return
    run_spec = spec.build(settings, run_dir, data, store, recipe)
    storage.check_writable(run_spec.run_dir)
    initial.check(run_spec, args.init_from)
    found, _ = checkpoint.newest_valid(run_spec.run_dir)
    if ended := _ended(run_spec, found):
        print(f"{run_spec.run_dir} is finished: {ended}")
        ending.show(run_spec, data, store)
        return
    _train(run_spec, found, args.init_from)
    ending.show(run_spec, data, store)


def _ended(run_spec: spec.RunSpec, found: checkpoint.Checkpoint | None) -> str:
    """Why there is nothing left to train, in words, and how to go on all the same; "" when there is."""
    ended = found and driver.end_of(run_spec, found.samples_seen)
    if not found or not ended:
        return ""
    if found.samples_seen < run_spec.sampler.total:
        return f"{ended}; a larger validate.patience_samples, or null, goes on"
    if run_spec.held_out_cases and not journal.validated(run_spec.run_dir, run_spec.sampler.total):
        return ""
    return f"{ended}; a larger train.epochs goes on"


def _train(run_spec: spec.RunSpec, found: checkpoint.Checkpoint | None, init_from: str) -> None:
    from raytrain_brats.monitoring import cost, tracking  # here: they import Ray Data, and a refusal is to come first
    from raytrain_brats.monitoring.progress import Progress
    from raytrain_brats.monitoring.spilling import Spilling
    from raytrain_brats.monitoring.tracking import Tracking

    settings = run_spec.config
    with lease.hold(run_spec.run_dir) as held:
        run_spec = spec.as_begun(run_spec)
        initial.check(run_spec, init_from)
        print(config.described(run_spec.recipe, settings))
        run_spec, lines = initial.begin(run_spec, init_from)
        print("\n".join([*lines, *_lengthened(run_spec)]), end="\n" if lines or run_spec.shorter else "", flush=True)
        for warning in recipes.warnings(settings, run_spec.manifest, run_spec.source):
            print(warning, file=sys.stderr)
        show_skipped(run_spec.manifest.skipped)
        cost.prices()  # refused now, not amid the run
        tracking.check(settings.run)
        for line in own_parts.check(settings, run_spec.run_dir):
            print(line, flush=True)
        parts = config.own_parts(settings).values()
        cluster.connect(held_bytes=run_spec.held_bytes, prepared=run_spec.route == "store", own=parts)
        needed = driver.check(run_spec)
        kind = "GPU" if needed.gpus else "CPU"
        done = f"{found.samples_seen:,} of them done" if found else "a new run"
        print(
            f"{len(run_spec.train_cases)} cases to train on, {len(run_spec.held_out_cases)} held out; "
            f"{needed.low} to {needed.high} {kind} workers; {run_spec.sampler.total:,} samples, {done}"
        )
        with Progress(run_spec, lambda: held.trouble), Spilling(run_spec.run_dir), Tracking(run_spec):
            driver.train(run_spec, needed, held)


def _lengthened(run_spec: spec.RunSpec) -> list[str]:
    """What changes for a run that is lengthened by this start, in words."""
    if not run_spec.shorter:
        return []
    told = driver.longer(run_spec)
    (epochs, more), (total, new), (rate, then) = told["epochs"], told["total_samples"], told["learning_rate"]
    return [
        f"longer: {epochs} -> {more} epochs, {total:,} -> {new:,} samples; the learning rate at sample "
        f"{told['samples_seen']:,} was to be {rate:.3g} and is {then:.3g}, as in a run of {more} epochs"
    ]


def _held_out(args: Args) -> tuple[str, ...]:
    """--fold as a setting. Raises UserError for what is no fold."""
    if not args.fold:
        return ()
    if args.fold not in ("all", *map(str, range(FOLDS))):
        raise UserError(f"--fold {args.fold}: give 0 to {FOLDS - 1}, or all")
    if stated := [change for change in args.set if change.startswith("data.fold=")]:
        raise UserError(f"--fold {args.fold} and --set {stated[0]} say the same thing twice; leave one out")
    return () if args.fold == "all" else (f"data.fold={args.fold}",)


def _train_folds(args: Args, settings: config.Config, recipe: str, run_dir: str, data: str, store: str) -> None:
    """Five runs below the run folder. The cases are found and checksummed once, here."""
    first = spec.build(settings, spec.fold_run(run_dir, settings.data.fold), data, store, recipe)
    storage.check_writable(run_dir)
    if not store:
        data = RunDir(run_dir).manifest
        manifests.write(first.manifest, data)
    there = sorted({case.fold for case in first.manifest.cases})
    if len(there) < FOLDS:
        print(f"the cases are in folds {', '.join(map(str, there))} alone: one run for each", file=sys.stderr)
    plan = folds.plan(len(there), settings, args.workers, first.held_bytes, bool(store))
    shares = sorted({f" with {share} workers each" for share in plan.workers if share}, reverse=True)
    print(f"{len(there)} folds into {run_dir}, {len(plan.workers)} at a time{' or'.join(shares)}", flush=True)

    def command(fold: int, workers: str) -> list[str]:
        where = ["--store", store] if store else ["--data", data]
        words = [*where, "--run-dir", run_dir, "--recipe", recipe, "--fold", str(fold)]
        words += ["--init-from", args.init_from] if args.init_from else []
        words += ["--workers", workers] if workers else []
        return folds.command_line([*words, *(word for change in args.set for word in ("--set", change))])

    folds.train(there, command, plan)
    given = f"--store {store}" if store else f"--data {data}"
    print(
        f"done: {len(there)} folds in {run_dir}; each case is scored once by\n"
        f"  raytrain-brats evaluate --run-dir {run_dir} {given}"
    )


def _check_place_of_folds(run_dir: str) -> None:
    """Raises UserError when the folder holds something else than runs of folds."""
    if storage.exists(RunDir(run_dir).config):
        raise UserError(
            f"--run-dir {run_dir} holds a run of its own; the runs of --fold go into folders below it: give another one"
        )
    if strange := [name for name in storage.list_files(run_dir) if not _BESIDE_FOLDS.fullmatch(name)]:
        raise UserError(f"--run-dir {run_dir} holds {strange[0]}, no run of a fold; give an empty or new folder")


def _demo_places() -> tuple[str, str]:
    """(folder of phantoms, run folder): never the environment's own, which are for runs on real cases."""
    if beside := default("", "RUN_DIR").rstrip("/"):
        return f"{beside}-demo-phantoms", f"{beside}-demo"
    home = Path(HOME).expanduser()
    return str(home / "phantoms"), str(home / "run")


def _check_run_dir(run_dir: str) -> None:
    """Raises UserError when the folder holds something that is no run of ours; whether one is of the same data and
    settings, `spec.build` asks."""
    try:
        spec.read_config(run_dir)
        return
    except FileNotFoundError:
        pass
    strange = [name for name in storage.list_files(run_dir) if not _LEFT_BY_A_START.fullmatch(name)]
    if strange and spec.folds_in(run_dir):
        raise UserError(f"--run-dir {run_dir} holds the runs of folds; say --fold all or --fold K, or give another one")
    if strange:
        raise UserError(
            f"--run-dir {run_dir} holds {strange[0]} and no config.yaml of a run; give an empty or new folder, "
            "or restore the run's config.yaml"
        )


def _make_phantoms(folder: str) -> None:
    from raytrain_brats.synthetic.phantom import missing, write_set  # SciPy: for the whole run, when it is loaded once

    what: Any = {"seed": 0, "grid": 60, "anatomy": "procedural"}
    if not any(missing(folder, PHANTOM_CASES, **what)):
        return
    cluster.connect()
    cluster.check_shared({"data folder": folder})
    print(f"no data given: writing {PHANTOM_CASES} phantoms to {folder}")
    write_set(folder, PHANTOM_CASES, **what, parallel_map=cluster.parallel_map)


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "train", argv)


if __name__ == "__main__":
    sys.exit(main())
