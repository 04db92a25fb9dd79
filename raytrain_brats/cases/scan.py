"""Find a folder's cases, compute checksums, determine the label convention, assign folds. Runs in the driver; checksums
of large sets in data tasks.

In: a root URI (local or s3://) in one of the layouts of docs/data.md, or a manifest file written before.
Out: a `Manifest`. A file that changed since it was read is detected by its size or time, and read again.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np

from raytrain_brats import labels, storage
from raytrain_brats.cases import dataset_json, layouts
from raytrain_brats.cases.dataset_json import Stated
from raytrain_brats.cases.layouts import NIFTI, Found
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data import nifti
from raytrain_brats.data.manifest import FOLDS, Case, Manifest, Skipped
from raytrain_brats.errors import UserError
from raytrain_brats.storage import Listing

T = TypeVar("T")

ShowProgress = Callable[[Iterator[Case], int], Iterable[Case]]
"""Yields the given cases, of which there are so many, and shows progress."""
Row = dict[str, Any]
Spread = Callable[[Callable[[Row], Row], list[Row], str], Iterator[Row] | None]
"""Gives a function of each row, by the machines of a cluster, which see the folder, in any order; None without them."""
SPREAD_BYTES = 4 << 30
"""Fewer bytes are read by threads of this process: they are done before other machines have begun."""


def open_manifest(
    data: str,
    progress: ShowProgress | None = None,
    known: str | None = None,
    convention: str = "auto",
    spread: Spread | None = None,
) -> Manifest:
    """The manifest of a data folder (scanned and checksummed now) or of a manifest file.

    With `known`, a manifest of the same data written before, only files are read that are new or whose size or time
    differs. `spread` lets a cluster read large sets. Raises UserError when the folder is missing, holds no case, or
    contradicts `convention`; when files of a manifest file have changed since.
    """
    data, before = storage.normal(data), None
    if known and storage.exists(known):
        with contextlib.suppress(UserError):  # a damaged copy only means that all files are read
            before = manifests.read(known)
    if not data.endswith(".jsonl"):
        return checksummed(scan(data, convention), progress, before, spread)
    manifest = manifests.read(data)
    _agree(convention, manifest.convention, data)
    return _unchanged(manifest, data, before, spread)


def scan(root: str, convention: str = "auto") -> Manifest:
    """Find the labelled cases below `root` without reading any volume; no checksums, fold 0 unless another is stated.

    Raises UserError as `open_manifest` does.
    """
    root, listing, stated = _open(root)
    asked = None if convention == "auto" else convention
    if stated:
        found = layouts.listed(stated, listing, need_labels=True)
        read_as = _agree(convention, stated.convention or "msd", stated.where)
        found = dataclasses.replace(found, candidates=(read_as,))
        if not stated.convention:
            found = dataclasses.replace(found, layout=f"{found.layout}, labels not stated")
        if not stated.channels and any(len(case.images) == 1 for case in found.cases):
            found = dataclasses.replace(found, layout=f"{found.layout}, modalities not stated")
    else:
        found = layouts.by_names(listing, True, asked, root.rsplit("/", 1)[-1])
        if asked and found.cases and asked not in found.candidates:
            _agree(convention, found.candidates[0], f"{root}: the names of its files")
    if not found.cases:
        raise UserError(_nothing(root, listing, found, stated))
    candidates = (asked,) if asked else found.candidates
    settled = candidates[0] if len(candidates) == 1 else ""
    cases, synthetic = tuple(sorted(found.cases, key=lambda c: c.id)), bool(stated and stated.synthetic)
    return Manifest(root, found.layout, settled, cases, synthetic, found.skipped, candidates)


def is_synthetic(data: str) -> bool:
    """Whether a folder or manifest holds phantoms. Raises UserError as `scan` does."""
    data = storage.normal(data)
    if data.endswith(".jsonl"):
        return manifests.read(data).synthetic
    where = storage.join(data, "dataset.json")
    if storage.exists(where):  # no need to list it all
        return dataset_json.parse(storage.read_bytes(where), where, data).synthetic
    return scan(data).synthetic


def _open(root: str) -> tuple[str, Listing, Stated | None]:
    """(the data set's root, its files, its dataset.json); the root may be a folder below the given one."""
    root = storage.normal(root)
    listing = storage.listing(root)
    if not listing.files and NIFTI.search(root) and storage.exists(root):
        raise UserError(f"data folder {root} is one file; give the folder that it lies in")
    if not listing.files:
        why = listing.unreadable.get(".") or (None if storage.exists(root) else "does not exist")
        raise UserError(f"data folder {root} {why or 'holds no files'}; give a folder in MSD or BraTS layout")
    there = [path for path in listing.files if path.rsplit("/", 1)[-1] == "dataset.json" and path.count("/") <= 3]
    if "dataset.json" not in there and there:
        if len(there) > 1:
            some = ", ".join(path.rpartition("/")[0] for path in there[:5])
            raise UserError(f"{root} holds {len(there)} data sets ({some}); give one of them")
        below = there[0].rpartition("/")[0]
        root = storage.join(root, below)
        rest = {path for path in listing.files if NIFTI.search(path) and not path.startswith(f"{below}/")}
        listing = Listing(_below(listing.files, below), _below(listing.unreadable, below))
        if rest:
            raise UserError(
                f"{root} has a dataset.json, but {len(rest)} images lie beside that folder, such as {min(rest)}; "
                "give the folder that is wanted"
            )
    if "dataset.json" not in listing.files:
        return root, listing, None
    where = storage.join(root, "dataset.json")
    return root, listing, dataset_json.parse(storage.read_bytes(where), where, root)


def _below(rows: dict[str, T], folder: str) -> dict[str, T]:
    return {path[len(folder) + 1 :]: row for path, row in rows.items() if path.startswith(f"{folder}/")}


def _agree(asked: str, stated: str, where: str) -> str:
    """The convention to use. Raises UserError when the one asked for contradicts the data's."""
    if stated == "article" and asked != "article":
        raise UserError(
            f"{where} takes value 2 for the enhancing tumour; on MSD's files that is a known mistake (3 enhances): "
            "mend its `labels`, or read it so on purpose with the convention `article`"
        )
    if asked in ("auto", stated) or (asked == "article" and stated == "msd"):
        return stated if asked == "auto" else asked
    if labels.known(asked).tissue == labels.known(stated).tissue:
        return asked
    raise UserError(
        f"{where} says the labels are {labels.described(stated)}, asked for is {labels.described(asked)}; leave the "
        "convention away, or mend what is wrong"
    )


def _nothing(root: str, listing: Listing, found: Found, stated: Stated | None) -> str:
    """The message that no case was found, with the likely cause."""
    cases = [row for row in found.skipped if row.case]
    if cases:
        causes = "; ".join(
            f"{cause} in {len(rows)}, such as {rows[0].case} ({rows[0].detail})"
            for cause in dict.fromkeys(row.cause for row in cases)
            if (rows := [row for row in cases if row.cause == cause])
        )
        return f"{root}: no case can be used of {len(cases)} found: {causes}"
    images = [path for path in listing.files if NIFTI.search(path)]
    if images and stated:
        return f"{stated.where} lists no case, but {len(images)} NIfTI files lie there, such as {images[0]}; list them"
    if images:
        return (
            f"{root} holds {len(images)} NIfTI files, but no case: the names tell no modality, such as {images[0]}. "
            "Known are MSD and nnU-Net (with a dataset.json) and names that end in _flair, _t1, _t1ce, _t2, _seg or "
            "-t2f, -t1n, -t1c, -t2w, -seg (docs/data.md)"
        )
    dicom = sum(path.lower().endswith((".dcm", ".ima")) for path in listing.files)
    hint = (
        f"{dicom} of them DICOM: convert them with dcm2niix first" if dicom else f"such as {next(iter(listing.files))}"
    )
    return f"{root} holds no case: no NIfTI file is among its {len(listing.files)} files ({hint})"


def scan_images(uris: Iterable[str]) -> tuple[list[tuple[str, Case]], list[Skipped]]:
    """((root, case) to segment, what is skipped) of folders, 4D files and patients' 3D files.

    Labels are neither needed nor read. Raises UserError when a URI holds nothing to segment.
    """
    found: list[tuple[str, Case]] = []
    skipped: list[Skipped] = []
    files: dict[str, list[str]] = {}
    for uri in map(storage.normal, uris):
        if NIFTI.search(uri) and (storage.is_s3(uri) or not storage.is_folder(uri)):
            folder, _, name = uri.rpartition("/")
            files.setdefault(folder, []).append(name)
            continue
        root, listing, stated = _open(uri)
        some = _images(root, listing, stated)
        found += [(root, case) for case in some.cases]
        skipped += some.skipped
    for folder, names in files.items():
        here = storage.listing(folder)
        for name in names:
            if name not in here.files:
                raise UserError(f"image {storage.join(folder, name)} {here.unreadable.get(name, 'does not exist')}")
        some = _images(folder, Listing({name: here.files[name] for name in names}, {}), None)
        found += [(folder, case) for case in some.cases]
        skipped += some.skipped
    return found, skipped


def _images(root: str, listing: Listing, stated: Stated | None) -> Found:
    """The cases of a folder. Raises UserError when it holds none."""
    if stated:
        found = layouts.listed(stated, listing, need_labels=False)
        found = dataclasses.replace(found, cases=(*found.cases, *found.tests))
    else:
        found = layouts.by_names(listing, False, root_name=root.rsplit("/", 1)[-1])
        if not any(row.case for row in found.skipped) and not found.cases:
            found = layouts.loose(listing, _beside(root))
    if not found.cases:
        hint = "; give the patient's folder, or all four files" if stated is None else ""
        raise UserError(_nothing(root, listing, found, stated) + hint)
    return found


def _beside(root: str) -> Stated | None:
    """The dataset.json in a folder or the one above: it applies to the images of imagesTr."""
    for folder in (root, root.rpartition("/")[0]):
        where = storage.join(folder, "dataset.json")
        if folder.strip("/") and storage.exists(where):
            return dataset_json.parse(storage.read_bytes(where), where, folder)
    return None


def unstated(found: list[tuple[str, Case]]) -> list[str]:
    """Ids of the 4D images found by `scan_images` for which no dataset.json states the channels' modalities."""
    is_stated: dict[str, bool] = {}
    for root in {root for root, case in found if len(case.images) == 1}:
        stated = _beside(root)
        is_stated[root] = bool(stated and stated.channels)
    return [case.id for root, case in found if len(case.images) == 1 and not is_stated[root]]


def checksummed(
    manifest: Manifest,
    progress: ShowProgress | None = None,
    before: Manifest | None = None,
    spread: Spread | None = None,
) -> Manifest:
    """Read every file once, fill in `sha256`, determine the convention by values where needed, and assign folds.

    Files that `before` has with the same sizes and times are not read again. Stated folds are kept. Raises UserError
    where the values do not determine the convention.
    """
    known = {(c.id, case_versions(c)): c for c in before.cases if c.versions} if before else {}
    same = before is not None and all((case.id, case_versions(case)) in known for case in manifest.cases)
    settled = manifest.convention or (before.convention if before and same else "")
    if settled not in (manifest.convention, *manifest.candidates):
        settled = ""
    values: set[int] = set()

    def read() -> Iterator[Case]:
        there = {c.id: known.get((c.id, case_versions(c))) for c in manifest.cases} if settled else {}
        for case in manifest.cases:
            if old := there.get(case.id):
                yield dataclasses.replace(case, sha256=old.sha256)
        new = [case for case in manifest.cases if not there.get(case.id)]
        for case, digest, found in _digests(manifest.root, new, not settled, spread):
            values.update(found)
            yield dataclasses.replace(case, sha256=digest)

    rows = read()
    place = {case.id: number for number, case in enumerate(manifest.cases)}
    cases = sorted(progress(rows, len(place)) if progress else rows, key=lambda case: place[case.id])
    manifest = dataclasses.replace(manifest, convention=settled or _by_values(manifest, values), candidates=())
    stated = any(case.fold for case in cases)
    return dataclasses.replace(manifest, cases=tuple(cases) if stated else dealt(cases))


def _digests(
    root: str, cases: list[Case], with_values: bool, spread: Spread | None
) -> Iterator[tuple[Case, str, list[int]]]:
    """(case, sha256 of its files, its label's values if wanted), in any order. Raises OSError."""
    rows = [
        {"number": number, "uris": json.dumps([storage.join(root, path) for path in manifests.case_files(case)])}
        for number, case in enumerate(cases)
    ]
    work = partial(_digest, with_values=with_values)
    large = sum(case.bytes for case in cases) >= SPREAD_BYTES
    results = spread(work, rows, root) if spread and large else None
    with ThreadPoolExecutor(8) as pool:
        for row in pool.map(work, rows) if results is None else results:
            if row["problem"]:
                raise OSError(row["problem"])
            yield cases[row["number"]], row["sha256"], json.loads(row["values"])


def _digest(row: Row, with_values: bool) -> Row:
    """Runs in threads of the driver or in data tasks."""
    found: Row = {"number": row["number"], "sha256": "", "values": "[]", "problem": ""}
    digest, content = hashlib.sha256(), b""
    try:
        for uri in json.loads(row["uris"]):
            content = storage.read_bytes(uri)
            digest.update(content)
    except OSError as error:
        return found | {"problem": f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")}
    if with_values:  # the label is the last file
        found["values"] = json.dumps(sorted(_values(content)))
    return found | {"sha256": digest.hexdigest()}


def dealt(cases: Iterable[Case]) -> tuple[Case, ...]:
    """The cases with their folds, all of a subject in one fold, and subjects of equal content too.

    By a hash of the subject, so that one more case hardly moves the others.
    """
    cases = list(cases)
    one = _as_one(cases)
    groups = sorted(set(one.values()), key=lambda s: hashlib.sha256(s.encode()).hexdigest())
    fold_of = {subject: number % FOLDS for number, subject in enumerate(groups)}
    return tuple(dataclasses.replace(c, fold=fold_of[one[c.subject]]) for c in cases)


def case_versions(case: Case) -> tuple[tuple[str, str], ...]:
    """(path, size and time) of each of a case's files."""
    return tuple(zip(manifests.case_files(case), case.versions, strict=True))


def _values(label: bytes) -> set[int]:
    """The values of a label file; none of a damaged one, which is rejected later with its reason."""
    with contextlib.suppress(nifti.InvalidCase):
        return {int(value) for value in np.unique(nifti.decode(label, "label").array) if value == int(value)}
    return set()


def _by_values(manifest: Manifest, values: set[int]) -> str:
    """The candidate that the values allow. Raises UserError where several do and they differ in meaning."""
    allowed = {c: set(labels.allowed_values(c)) for c in manifest.candidates}
    values &= set[int]().union(*allowed.values())  # any other value makes its case invalid, later
    fitting = [c for c in manifest.candidates if values <= allowed[c]]
    tissue = {tuple((v, t) for v, t in labels.known(c).tissue.items() if v in values) for c in fitting}
    old = 4 in values and 3 not in values and "RC" in labels.regions(fitting[0])  # as likely the 4 of BraTS 2021
    if len(tissue) == 1 and not old:
        return fitting[0]
    names = " or ".join(labels.described(c) for c in manifest.candidates)
    raise UserError(
        f"{manifest.root}: by its names ({manifest.layout}) and its values ({sorted(values)}) it may be {names}, in "
        "which the same values mean other tissues; state which: index --convention, or --set data.convention="
    )


def _unchanged(manifest: Manifest, uri: str, before: Manifest | None, spread: Spread | None = None) -> Manifest:
    """The manifest with its files' current times. Raises UserError when the content of a file changed.

    Only files that differ in size or time from both the manifest and `before` are read.
    """
    here = storage.listing(manifest.root).files
    if not here and manifest.cases:
        raise UserError(f"the data of {uri}, {manifest.root}, are not there; mount them, or index them where they are")
    both = (*manifest.cases, *(before.cases if before else ()))
    known = {(c.id, case_versions(c)): c.sha256 for c in both if c.versions}

    def now(case: Case) -> Case:
        files = manifests.case_files(case)
        if any(path not in here for path in files):  # rejected as `missing` when it is read
            return case
        return dataclasses.replace(case, versions=tuple(f"{here[path][0]}:{here[path][1]}" for path in files))

    cases = [now(case) for case in manifest.cases]
    new = [
        case
        for case, old in zip(cases, manifest.cases, strict=True)
        if case is not old and known.get((case.id, case_versions(case))) != case.sha256
    ]
    for case, digest, _ in _digests(manifest.root, new, False, spread):
        if digest != case.sha256:
            raise UserError(
                f"the files of case {case.id} below {manifest.root} changed since {uri} was written; write it anew "
                "with `raytrain-brats index`"
            )
    return dataclasses.replace(manifest, cases=tuple(cases))


def _as_one(cases: list[Case]) -> dict[str, str]:
    """{subject: the first of those that share content, directly or through others}: union-find."""
    parent = {case.subject: case.subject for case in cases}
    first_of: dict[str, str] = {}

    def first(subject: str) -> str:
        while parent[subject] != subject:
            subject = parent[subject]
        return subject

    for case in cases:
        parent[first(case.subject)] = first(first_of.setdefault(case.sha256, case.subject))
    return {subject: first(subject) for subject in parent}
