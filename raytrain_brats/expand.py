"""Make a large set from a small one: `raytrain-brats expand --data URI --out URI --copies K`, a Ray Data job.

In: a folder of labelled NIfTI cases or a manifest; K; a seed.
Out: K distinct volumes a case in MSD layout, with the source's labels, subjects and folds; `expand.json` says
what they were made from, `quarantine.json` what could not be read.

For load tests at the size of the AWS article, whose 48,884 pairs were 484 copied byte by byte, and for trying things
out; scores on deformed heads are not scores on patients. May be killed anywhere: the same command again goes on.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raytrain_brats import outputs, storage
from raytrain_brats.cases import dataset_json, scan
from raytrain_brats.cli import Uri, default, entry, progress, show_refused, show_skipped
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Manifest
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import names
from raytrain_brats.ray_ext import cluster
from raytrain_brats.synthetic import deform

VERSION = 1  # of the way copies are made; files of another are not mixed with ours
FOLDERS = ("imagesTr/", "labelsTr/")
AT_ONCE = 8  # copies made of one decoded case


@dataclass(frozen=True)
class Args:
    """Deform every case into distinct copies: a smooth random warp of image and label, other contrast per modality."""

    out: Uri
    """Where the new set goes, in MSD layout (local or s3://)."""
    copies: int
    """Volumes to make of each case."""
    data: Uri = ""
    """Folder in MSD or BraTS layout, or a manifest; by default RAYTRAIN_BRATS_DATA."""
    seed: int = 0
    """Another seed makes other volumes; the same one the same bytes."""


def work(args: Args) -> None:
    data, out = default(args.data, "DATA"), storage.normal(args.out)
    if not data:
        raise UserError("no data given; name a folder with --data")
    if args.copies < 1 or args.seed < 0:
        raise UserError(f"--copies {args.copies} --seed {args.seed}: at least 1 copy, and a seed from 0 up")
    manifest = scan.open_manifest(data, lambda rows, total: progress(rows, "checksums", total))
    show_skipped(manifest.skipped)
    files = storage.list_files(out)
    _check_same_set(out, files, args.seed, manifest)
    storage.sweep(out)
    todo = [
        {"case": json.dumps(dataclasses.asdict(case)), "copies": missing[start : start + AT_ONCE]}
        for case in manifest.cases
        if (missing := [c for c in range(1, args.copies + 1) if not all(p in files for p in _paths(case.id, c))])
        for start in range(0, len(missing), AT_ONCE)
    ]
    refused: dict[str, dict[str, str]] = {}
    made = _expand_all(manifest, out, args.seed, todo) if todo else iter(())
    for row in progress(made, "expanding", sum(len(row["copies"]) for row in todo)):
        if row["reason"]:
            refused[row["case"]] = row
    rows = [refused[case.id] for case in manifest.cases if case.id in refused]
    storage.write_bytes(storage.join(out, "quarantine.json"), json.dumps(rows, indent=1).encode())
    show_refused(rows)
    good = tuple(case for case in manifest.cases if case.id not in refused)
    if not good:
        raise RunFailed(f"none of {len(rows)} cases could be used; see {storage.join(out, 'quarantine.json')}")
    about = _dataset_json(dataclasses.replace(manifest, cases=good), args.copies, args.seed)
    storage.write_bytes(storage.join(out, "dataset.json"), json.dumps(about, indent=1).encode())
    print(f"{len(good) * args.copies:,} volumes of {len(good)} cases in {out}, {len(rows)} cases set aside")


def _paths(case: str, copy: int) -> tuple[str, str]:
    name = f"{case}_c{copy:03d}.nii.gz"
    return f"imagesTr/{name}", f"labelsTr/{name}"


def _expand_all(manifest: Manifest, out: str, seed: int, todo: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """{case, uri, reason, detail} of every copy to make, over the cluster."""
    source = Source(manifest.root, manifest.convention, 1.0)

    def some(row: dict[str, Any]) -> dict[str, Any]:  # a closure, so that workers import `data` alone and not torch
        case = manifests.case_from(json.loads(row["case"]))
        about = {"case": case.id, "uri": storage.join(source.root, case.images[0]), "reason": "", "detail": ""}
        try:
            volume = source.volume(case)
        except InvalidCase as error:
            about |= {"uri": storage.join(source.root, error.file or case.images[0])}
            return about | {"count": len(row["copies"]), "reason": error.reason, "detail": error.detail}
        for copy in row["copies"]:
            new = deform.deformed(volume, seed, case.id, int(copy))
            for path, content in zip(_paths(case.id, copy), deform.packed(new), strict=True):
                storage.write_bytes(storage.join(out, path), content)
        return about | {"count": len(row["copies"])}

    cluster.connect()
    cluster.check_shared({"output folder": out}, {"data folder": source.root})
    for row in cluster.data_map(some, todo):
        yield from [row] * row.pop("count")


def _check_same_set(out: str, files: dict[str, int], seed: int, manifest: Manifest) -> None:
    """Write down what the set is made from. Raises UserError when the folder holds another one, or other files."""
    where, now = storage.join(out, "expand.json"), {case.id: case.sha256 for case in manifest.cases}
    begun = {_case_of(path) for path in files if path.startswith(FOLDERS)}
    before: dict[str, str] = {}
    if "expand.json" in files:
        try:
            about = json.loads(storage.read_bytes(where))
            found, before = [about["version"], about["seed"]], dict(about["cases"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where} is damaged; give an empty or new folder") from error
        strange = [path for path in files if _case_of(path) not in before and path.startswith(FOLDERS)]
        if strange or not _is_ours(out, files):
            strange += ["dataset.json"]
            raise UserError(f"{storage.join(out, strange[0])} is no copy made by expand; give an empty or new folder")
        if begun and found != [VERSION, seed]:
            raise UserError(f"{out} was begun with --seed {found[1]} (version {found[0]}); give that, or another --out")
        if changed := [name for name in begun if name in before and now.get(name, before[name]) != before[name]]:
            raise UserError(f"{out} holds copies of another {min(changed)}; give another --out")
    elif files.keys() - {storage.PROBE}:  # that of a process killed right there
        raise UserError(f"--out {out} holds other files; give an empty or new folder")
    if outputs.within(out, manifest.root) or outputs.within(manifest.root, out):
        raise UserError(f"--out {out} and the data in {manifest.root} lie within each other; give another --out")
    about = {"version": VERSION, "seed": seed, "cases": dict(sorted((before | now).items()))}
    storage.check_writable(out)
    storage.write_bytes(where, json.dumps(about, indent=1).encode())


def _case_of(path: str) -> str:
    """The original of a copy's file; "" for another file."""
    return path.partition("/")[2].rpartition("_c")[0]


def _is_ours(out: str, files: dict[str, int]) -> bool:
    """Whether dataset.json is one that we wrote, where there is one."""
    try:
        name = "dataset.json"
        return name not in files or "expanded" in json.loads(storage.read_bytes(storage.join(out, name)))
    except (ValueError, TypeError):
        return False


def _dataset_json(manifest: Manifest, copies: int, seed: int) -> dict[str, Any]:
    """MSD's description of the set, with what keeps a copy on its original's side of every split."""
    subjects = {case.sha256: case.subject for case in reversed(manifest.cases)}  # one for cases of equal content
    rows = [
        {"image": f"./{image}", "label": f"./{label}", "subject": subjects[case.sha256], "fold": case.fold}
        for case in manifest.cases
        for image, label in (_paths(case.id, copy) for copy in range(1, copies + 1))
    ]
    return dataset_json.made(
        "BRATS-EXPANDED",
        f"{copies} random deformations of each of {len(manifest.cases)} cases, made by a program",
        names(manifest.convention),
        rows,
        convention=manifest.convention,
        expanded={"copies": copies, "seed": seed, "version": VERSION},
        **({"synthetic": True} if manifest.synthetic else {}),
    )


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "expand", argv)


if __name__ == "__main__":
    sys.exit(main())
