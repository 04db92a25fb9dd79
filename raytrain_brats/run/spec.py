"""What a run is, in one frozen value that is sent to every worker. Built in the driver. Runs in any process.

In: a config, a data folder or store, a run folder.
Out: a `RunSpec`: config, cases, sampler, source, identity; UserError when the run folder holds a run of another.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import yaml

from raytrain_brats import parts, storage
from raytrain_brats.cases import scan
from raytrain_brats.cases.scan import ShowProgress
from raytrain_brats.config import Config, differences, own_parts, parse, patch_divisor
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data import store as stores
from raytrain_brats.data.manifest import FOLDS, Case, Manifest
from raytrain_brats.data.patch import PatchSpec
from raytrain_brats.data.sampler import ORDER, Sampler
from raytrain_brats.data.store import Source
from raytrain_brats.errors import UserError
from raytrain_brats.labels import REGIONS, described, regions
from raytrain_brats.parts import OwnPart
from raytrain_brats.run.run_dir import RunDir


@dataclass(frozen=True)
class Initial:
    """The weights of another run with which this one began: a copy of them is in its own folder."""

    given: str
    """As `--init-from` named it."""
    run: str
    checkpoint: str
    sha256: str
    """Of the file `initial.safetensors`."""
    left_out: tuple[str, ...] | list[str] = ()
    """Weights of that network which this one has not: its heads."""
    fresh: tuple[str, ...] | list[str] = ()
    """Weights of this network which that one had not."""


@dataclass(frozen=True)
class RunSpec:
    config: Config
    run_dir: str
    route: str
    """`raw`: .nii.gz preprocessed while training; `store`: prepared before."""
    source: Source
    train_cases: tuple[Case, ...]
    held_out_cases: tuple[Case, ...]
    sampler: Sampler
    dataset_identity: str
    manifest: Manifest
    recipe: str = ""
    """The recipe's name and changes, for people."""
    shorter: int = 0
    """Epochs that the run was to have until now, if it is lengthened with this start."""
    initial: Initial | None = None
    """The weights that it began with, if they were another run's."""

    @property
    def patch_spec(self) -> PatchSpec:
        config, data = self.config, self.config.data
        values = regions(self.source.convention) if data.foreground_draw == "regions" else {}
        drawn = tuple(values[r] for r in REGIONS if r in values)
        return PatchSpec(data.patch_xyz, data.foreground_share, drawn, moved=config.train.augment.kind == "full")

    @property
    def held_bytes(self) -> int:
        """What the cases of a step hold of the object store."""
        return self.sampler.global_batch * self.patch_spec.box_bytes

    def for_ranks(self) -> "RunSpec":
        """What a rank needs of it: of all cases only those it may validate on. Training cases come by the stream."""
        held_out = self.held_out_cases[: self.config.validate_.max_cases]
        return replace(
            self, train_cases=(), held_out_cases=held_out, manifest=replace(self.manifest, cases=(), skipped=())
        )


@dataclass(frozen=True)
class StoredRun:
    """What the config.yaml of a run folder says."""

    config: Config
    convention: str
    dataset_identity: str
    order: str
    """Name of the sampler's order; "" before orders had names."""
    earlier_epochs: tuple[int, ...] = ()
    """Of before the run was lengthened."""
    initial: Initial | None = None
    """The weights that it began with, if they were another run's."""
    own_parts: dict[str, dict[str, str]] = field(default_factory=dict)
    """{name: {"file", "sha256"}} of each network, loss or augmentation of one's own, when the run was started last."""

    def changed_parts(self, run_dir: str, needed: Iterable[OwnPart]) -> list[str]:
        """Which files of those needed were changed since. Raises UserError when one is not there any more."""
        try:
            return parts.changes(self.own_parts, parts.sources(needed))
        except UserError as error:
            raise UserError(f"{run_dir} was trained with a part of one's own: {error}") from error


def preprocessing(config: Config) -> dict[str, Any]:
    return config.preprocess.model_dump(mode="json")


def open_cases(
    config: Config, data: str, store: str = "", run_dir: str = "", progress: ShowProgress | None = None
) -> tuple[Manifest, Source]:
    """The manifest and the source of a data folder (or manifest file) or of a store. Raises UserError.

    The manifest in `run_dir` saves reading unchanged files again; `progress` shows how far the reading is.
    """
    if store:
        manifest = stores.open_index(store, preprocessing(config), config.data.convention)
    elif data:
        from raytrain_brats.ray_ext.cluster import spread  # here: what a run is, is also known where Ray is not

        known = RunDir(run_dir).manifest if run_dir else None
        manifest = scan.open_manifest(data, progress, known, config.data.convention, spread)
    else:
        raise UserError("no data given; name a folder with --data or a prepared store with --store")
    convention = read_as(config, manifest)
    return manifest, Source(manifest.root, convention, config.preprocess.spacing_mm)


def read_as(config: Config, manifest: Manifest) -> str:
    """The convention by which label values are read: that of the data, or `article` where it was asked for."""
    return manifest.convention if config.data.convention == "auto" else config.data.convention


def build(config: Config, run_dir: str, data: str, store: str, recipe: str = "") -> RunSpec:
    """The `RunSpec`, checked as far as possible before Ray starts. Raises UserError."""
    divisor = patch_divisor(config)
    if any(edge % divisor or edge < 2 * divisor for edge in config.data.patch_xyz):
        patch = "x".join(map(str, config.data.patch_xyz))
        raise UserError(f"data.patch_xyz {patch}: this network needs multiples of {divisor}, {2 * divisor} at least")
    manifest, source = open_cases(config, data, store, run_dir)
    train, held_out = manifest.split(config.data.fold)
    if not train:
        raise UserError(
            f"{manifest.root}: none of its {len(manifest.cases)} cases is left to train on; more are needed"
        )
    where, route = storage.normal(run_dir), "store" if store else "raw"
    identity = manifests.dataset_identity(manifest.cases, preprocessing(config), source.convention)
    sampler = sampler_of(config, len(train))
    return as_begun(RunSpec(config, where, route, source, train, held_out, sampler, identity, manifest, recipe))


def as_begun(spec: RunSpec) -> RunSpec:
    """The same with what the run folder says now: how far it was to go, what it began with. Raises UserError when that
    is another run.

    A driver asks again once it holds the lease: another one may have begun or lengthened the run before it.
    """
    try:
        begun = read_config(spec.run_dir)
    except FileNotFoundError:
        return spec
    earlier, shorter = begun.earlier_epochs, 0
    if spec.config.train.epochs > begun.config.train.epochs:
        shorter = begun.config.train.epochs
        earlier = (*earlier, shorter)
    sampler = sampler_of(spec.config, len(spec.train_cases), earlier)
    spec = replace(spec, sampler=sampler, shorter=shorter, initial=begun.initial)
    _check_same_run(spec, begun)
    return spec


def sampler_of(config: Config, cases: int, earlier_epochs: tuple[int, ...] = ()) -> Sampler:
    """The order of a run over so many training cases; `earlier_epochs` of a run that was lengthened."""
    train, data = config.train, config.data
    return Sampler(train.seed, cases, train.global_batch, data.patches_per_case, train.epochs, earlier_epochs)


def _check_same_run(spec: RunSpec, begun: StoredRun) -> None:
    """Raises UserError when the run folder holds a run of other data or of another config, but for more epochs."""
    check_order(spec.run_dir, begun)
    if begun.convention != spec.source.convention:
        raise UserError(
            f"{spec.run_dir} was begun on labels read as {described(begun.convention)}, now they would be read as "
            f"{described(spec.source.convention)}; give the data and convention it was begun with, or another --run-dir"
        )
    meant = preprocessing(spec.config), begun.convention
    if not manifests.is_dataset_identity(begun.dataset_identity, spec.manifest.cases, *meant):
        raise UserError(
            f"{spec.run_dir} was begun on other data or preprocessing (identity {begun.dataset_identity}, now "
            f"{spec.dataset_identity}{_difference(spec)}); give the data it was begun with, or another --run-dir"
        )
    if changed := differences(begun.config, spec.config, longer=True):
        changes = "; ".join(changed)
        if spec.config.train.epochs < begun.config.train.epochs:
            changes += " (epochs may become more, never less: their end is part of the order)"
        raise UserError(
            f"{spec.run_dir} was begun with another config ({changes}); use the old values, all of which "
            f"--recipe {RunDir(spec.run_dir).config} has, or another --run-dir"
        )


def _difference(spec: RunSpec) -> str:
    """How the cases differ from those of the run folder's manifest, in words; "" if it cannot be read."""
    with contextlib.suppress(UserError):
        before = manifests.read(RunDir(spec.run_dir).manifest).cases
        old, new = ({case.id: case.sha256 for case in cases} for cases in (before, spec.manifest.cases))
        changed = [name for name in new if name in old and new[name] != old[name]]
        kinds = {"changed": changed, "new": sorted(new.keys() - old.keys()), "gone": sorted(old.keys() - new.keys())}
        return "".join(f"; {len(names)} cases {kind}, such as {names[0]}" for kind, names in kinds.items() if names)
    return ""


def write_config(spec: RunSpec) -> None:
    """Write the run folder's config.yaml and manifest.jsonl, for resumes, `evaluate` and people."""
    about = {
        "recipe": spec.recipe,
        "identity": spec.dataset_identity,
        **manifests.meaning(spec.source.convention),
        "data": spec.source.root,
        "route": spec.route,
        "synthetic": spec.manifest.synthetic,
        "order": ORDER,
        **({"earlier_epochs": list(spec.sampler.earlier)} if spec.sampler.earlier else {}),
        **({"initial": asdict(spec.initial)} if spec.initial else {}),
        "config": yaml.safe_load(spec.config.to_yaml()),
    }
    if own := own_parts(spec.config):
        about["own_parts"] = parts.sources(own.values())
    storage.write_bytes(RunDir(spec.run_dir).config, yaml.safe_dump(about, sort_keys=False).encode())
    manifests.write(spec.manifest, RunDir(spec.run_dir).manifest)


def read_config(run_dir: str) -> StoredRun:
    """Raises FileNotFoundError when the folder holds no run, UserError when its config.yaml is no such file."""
    where = RunDir(run_dir).config
    try:
        stored = yaml.safe_load(storage.read_bytes(where))
        order = str(stored.get("order", ""))
        if not order:
            stored["config"]["data"].pop("window_cases", None)  # of the order that had no name
        config = parse(stored["config"], where)
        earlier = tuple(map(int, stored.get("earlier_epochs", ())))
        if any(a >= b for a, b in pairwise((0, *earlier, config.train.epochs))):
            raise ValueError("earlier_epochs do not ascend")
        initial = Initial(**stored["initial"]) if stored.get("initial") else None
        own = dict(stored.get("own_parts") or {})
        return StoredRun(config, str(stored["convention"]), str(stored["identity"]), order, earlier, initial, own)
    except FileNotFoundError:
        raise
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} is not a run's config.yaml; give another --run-dir") from error
    except OSError as error:
        raise UserError(f"cannot read {where} ({error}); choose another folder or mend its rights") from error


def check_order(run_dir: str, begun: StoredRun) -> None:
    """Raises UserError when the run's samples have another order than this version's."""
    if begun.order != ORDER:
        raise UserError(
            f"{run_dir} was begun by a version that gave the samples another order; go on with that version, or give "
            "another --run-dir"
        )


def fold_run(folder: str, fold: int) -> str:
    """The run folder of one fold, below that of all."""
    return storage.join(storage.normal(folder), f"fold-{fold}")


def folds_in(folder: str) -> list[str]:
    """The runs of `train --fold` below a folder, in order."""
    runs = [fold_run(folder, fold) for fold in range(FOLDS)]
    return [run for run in runs if storage.exists(RunDir(run).config)]


def open_run(run_dir: str) -> StoredRun:
    """As `read_config`, for commands that need a run. Raises UserError when there is none."""
    try:
        return read_config(run_dir)
    except FileNotFoundError as error:
        if folds := folds_in(run_dir):
            raise UserError(f"{run_dir} holds the runs of {len(folds)} folds; give one, such as {folds[0]}") from error
        raise UserError(f"{run_dir} is not a run folder (no config.yaml); train first") from error
