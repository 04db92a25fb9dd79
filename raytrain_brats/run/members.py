"""The runs whose networks answer together: one, several, or the folds of one. Runs in the driver.

In: run folders; folders that hold a run for each fold; files made by `share`.
Out: `Member`s, each with its newest or best weights; or UserError where their answers cannot be averaged.
"""

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from raytrain_brats import config, outputs, storage
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import FOLDS
from raytrain_brats.errors import UserError
from raytrain_brats.labels import described
from raytrain_brats.learn.postprocess import Rules
from raytrain_brats.parts import OwnPart
from raytrain_brats.run import checkpoint, own_parts, shared_file, spec
from raytrain_brats.run.predictor import newest_weights
from raytrain_brats.run.run_dir import RunDir


@dataclass(frozen=True)
class Member:
    """One network: a run and its newest checkpoint."""

    run_dir: str
    run: spec.StoredRun
    checkpoint: str
    digest: str
    """Of the weights."""
    weights: dict[str, Any] = field(repr=False, compare=False)

    @property
    def fold(self) -> int:
        """The one that it did not see."""
        return self.run.config.data.fold

    def made_of(self) -> dict[str, Any]:
        """`about`, with the seed and the data that it learned from: for the records of its predictions."""
        return self.about() | {"seed": self.run.config.train.seed, "data": self.run.dataset_identity}

    def about(self) -> dict[str, Any]:
        """As records of outputs name it."""
        where = {"run": outputs.place(self.run_dir), "fold": self.fold}
        return where | {"checkpoint": self.checkpoint, "weights": self.digest}


def runs_of(folders: Iterable[str]) -> list[str]:
    """The run folders: each given one, or the runs of the folds that it holds."""
    found = []
    for folder in map(storage.normal, folders):
        runs = [folder] if storage.exists(RunDir(folder).config) else spec.folds_in(folder) or [folder]
        found += [run for run in runs if checkpoint.committed(run)] or runs  # of folds, those that have trained
    return list(dict.fromkeys(found))


def opened(folders: Sequence[str], best: bool = False) -> list[Member]:
    """All that are to answer together, each by its newest checkpoint, or its best; of a file made by `share` all that
    it holds. Raises UserError where one has no checkpoint, where they do not agree, or where a network of
    one's own is gone."""
    files = [folder for folder in map(storage.normal, folders) if shared_file.is_named(folder)]
    runs = [
        (run_dir, spec.open_run(run_dir)) for run_dir in runs_of(f for f in folders if storage.normal(f) not in files)
    ]
    shared = [(file, network) for file in dict.fromkeys(files) for network in shared_file.read(file)]
    told = [(f, spec.StoredRun(n.config, n.convention, n.dataset_identity, "")) for f, n in shared]
    _check_alike(runs + told)
    members = []
    for run_dir, run in runs:
        name, weights = newest_weights(run_dir, best)
        own_parts.check_weights(run_dir, run, weights)
        members.append(Member(run_dir, run, name, shared_file.digest(weights)[:8], weights))
    for (file, run), (_, network) in zip(told, shared, strict=True):
        members.append(Member(file, run, network.checkpoint, shared_file.digest(network.weights)[:8], network.weights))
    return members


def _check_alike(runs: list[tuple[str, spec.StoredRun]]) -> None:
    """Their networks, patches and training may differ; what a network is shown and what it answers may not."""
    (first, one), *others = runs
    for run_dir, run in others:
        if run.convention != one.convention:
            raise UserError(
                f"{first} learned {described(one.convention)}, {run_dir} learned {described(run.convention)}: their "
                "answers cannot be averaged; give runs of one convention"
            )
        ours, theirs = (spec.preprocessing(each.config) for each in (one, run))
        if ours != theirs:
            what = "; ".join(f"preprocess.{k} is {ours[k]} and {theirs[k]}" for k in ours if ours[k] != theirs.get(k))
            raise UserError(
                f"{first} and {run_dir} were trained on other voxels ({what}): their answers cannot be averaged; give "
                "runs of one preprocessing"
            )


def checkpoints(members: Sequence[Member]) -> dict[str, Any]:
    """Which they are, as an evaluation records it."""
    if len(members) == 1:
        return {"checkpoint": members[0].checkpoint}
    return {"checkpoint": f"{len(members)} folds", "checkpoints": [member.about() for member in members]}


def by_fold(networks: Sequence[tuple[int, Any]], split: str) -> list[tuple[Any, ...]]:
    """The networks that answer for a case of fold 0, 1, ...: of several, given with the fold that they have not seen,
    that one for a held-out case; else all."""
    everyone = tuple(network for _, network in networks)
    if len(networks) == 1 or split != "val":
        return [everyone] * FOLDS
    return [tuple(network for held_out, network in networks if held_out == fold) for fold in range(FOLDS)]


def weight_bytes(members: Iterable[Member]) -> int:
    """What their weights take of the object store."""
    return sum(tensor.nbytes for member in members for tensor in member.weights.values())


def parts_of(members: Iterable[Member]) -> list[OwnPart]:
    """Their networks that are of one's own: nodes must have them."""
    networks = (config.own_parts(member.run.config).get("network") for member in members)
    return [network for network in networks if network]


def rules_of(folders: Sequence[str], members: Sequence[Member], mirror: bool = True) -> tuple[Rules | None, str]:
    """(what held-out cases taught about these networks, if anything was asked of them; in words, or why not).

    From the first `postprocessing.json` of the folders given whose networks include all of these: of the same weights.
    """
    said = "no post-processing was learned (`raytrain-brats postprocess` does)"
    for folder in [*folders, *(member.run_dir for member in members)]:
        in_file = shared_file.is_named(storage.normal(folder))
        uri = folder if in_file else RunDir(folder).postprocessing
        try:
            found = shared_file.postprocessing(uri) if in_file else json.loads(storage.read_bytes(uri))
            if found is None:
                continue
            rules, known = Rules.from_json(found["rules"]), {(m["fold"], m["weights"]) for m in found["members"]}
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{uri} is damaged ({error}); remove it, or run `raytrain-brats postprocess` again"
            ) from error
        if {(member.fold, member.digest) for member in members} <= known:
            other = {True: "; learned from mirrored masks", False: "; learned from masks of one view"}
            views = "" if found.get("mirror", mirror) == mirror else other[not mirror]
            return rules, "post-processing: " + ("; ".join(rules.in_words()) or "none helped") + views
        said = f"{uri} was learned for other weights and is not used; run `raytrain-brats postprocess` again"
    return None, said


def missing_folds(members: Iterable[Member]) -> list[int]:
    """Which of the five nobody held out."""
    return sorted(set(range(FOLDS)) - {member.fold for member in members})


def named(members: Sequence[Member]) -> str:
    """What outputs were made with, in words: each run by its last names, its checkpoint, its weights."""
    if len(members) == 1:
        return f"checkpoint {members[0].checkpoint} ({members[0].digest})"
    each = (f"{'/'.join(m.run_dir.split('/')[-2:])} {m.checkpoint} ({m.digest})" for m in members)
    return f"the mean of {len(members)} networks: {', '.join(each)}"


def told(run_dir: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.yaml and the manifest, and the newest evaluation say; {} without an evaluation."""
    stored = dict(yaml.safe_load(storage.read_bytes(RunDir(run_dir).config)))
    with contextlib.suppress(UserError, FileNotFoundError):  # copied without it
        train, held_out = manifests.read(RunDir(run_dir).manifest).split(stored["config"]["data"]["fold"])
        stored["cases"] = f"{len(train)}, {len(held_out)}"
    where = storage.join(RunDir(run_dir).evaluation, "summary.json")
    try:
        return stored, dict(json.loads(storage.read_bytes(where)))
    except FileNotFoundError:
        return stored, {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} is damaged ({error}); run `evaluate` again") from error
