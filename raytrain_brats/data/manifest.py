"""Which cases a folder holds: sorted, checksummed, dealt to folds.

In: a root URI (local or s3://) in MSD or BraTS 2018-2021 layout, or a manifest file written before. A dataset.json
may also state the label `convention`, and each case's `subject` and `fold`, as that of `expand` does.
Out: a `Manifest` of `Case` rows, and its identity.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from raytrain_brats import storage
from raytrain_brats.errors import UserError
from raytrain_brats.labels import CONVENTIONS

FOLDS = 5
MODALITIES = ("FLAIR", "T1w", "T1gd", "T2w")
_BRATS_SUFFIXES = ("flair", "t1", "t1ce", "t2")  # in the order of MODALITIES
_BRATS_FILE = re.compile(r"(?:^|/)(?P<id>[^/]+)/(?P=id)_(?P<kind>flair|t1|t1ce|t2|seg)\.nii(?:\.gz)?$", re.IGNORECASE)

Progress = Callable[[Iterator["Case"], int], Iterable["Case"]]
"""Hands so many cases on and shows how far it is."""


@dataclass(frozen=True)
class Case:
    """One patient's four modalities and label. Paths are relative to the manifest's root.

    `images` holds one 4D file or four 3D files in the order of MODALITIES; `bytes` counts all files;
    `sha256` is that of all files' bytes, images first, label last. In a store's index `object` names the prepared
    case, with its own checksum.
    """

    id: str
    subject: str
    images: tuple[str, ...]
    label: str | None
    bytes: int
    sha256: str = ""
    fold: int = 0
    object: str = ""
    object_sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    root: str
    layout: str
    convention: str
    cases: tuple[Case, ...]
    synthetic: bool = False
    """Phantoms: scores on them say nothing about patients."""

    def split(self, fold: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
        """(training cases, held-out cases) for a held-out fold."""
        held_out = tuple(c for c in self.cases if c.fold == fold)
        return tuple(c for c in self.cases if c.fold != fold), held_out


def identity(cases: Iterable[Case], preprocessing: dict[str, Any]) -> str:
    """Short hash of what is trained on: ids, sizes, checksums, folds and the preprocessing settings."""
    rows = [[c.id, c.bytes, c.sha256, c.fold] for c in cases]
    text = json.dumps([rows, preprocessing], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_manifest(data: str, progress: Progress | None = None, known: str | None = None) -> Manifest:
    """The manifest of a data folder (scanned and checksummed now) or of a manifest file.

    With `known`, a manifest of the same folder written before, nothing is read again while all names and sizes agree.
    Raises UserError when the folder is missing, empty, of unknown layout, or has a case without a label.
    """
    data = storage.normal(data)
    if data.endswith(".jsonl"):
        return read(data)
    found = scan(data)
    before = None
    if known and storage.exists(known):
        with contextlib.suppress(UserError):  # a damaged copy is no loss
            before = read(known)
    if before:
        stated = {case.id: case.fold for case in found.cases}
        bare = (dataclasses.replace(case, sha256="", fold=stated.get(case.id, 0)) for case in before.cases)
        if dataclasses.replace(before, cases=tuple(bare)) == found:
            return before
    return checksummed(found, progress)


def scan(root: str, need_labels: bool = True) -> Manifest:
    """Find the cases below `root` without reading any volume; no checksums, fold 0 unless another is stated."""
    root = storage.normal(root)
    files = storage.list_files(root)
    if not files:
        what = "holds no files" if storage.exists(root) else "does not exist"
        raise UserError(f"data folder {root} {what}; give a folder in MSD or BraTS layout")
    if "dataset.json" in files:
        cases, synthetic, convention = _scan_msd(root, files)
        layout = "msd"
    else:
        cases, synthetic = _scan_brats(files), False
        layout, convention = "brats2018_2021", "brats2017_2021"
    if not cases:
        raise UserError(
            f"{root} holds no case: neither an MSD dataset.json nor BraTS folders "
            "(BraTS2021_00000/BraTS2021_00000_flair.nii.gz, _t1, _t1ce, _t2, _seg) were found"
        )
    unlabelled = [c.id for c in cases if c.label is None]
    if unlabelled and need_labels:
        some = ", ".join(unlabelled[:3]) + (", ..." if len(unlabelled) > 3 else "")
        count = f"{len(unlabelled)} of {len(cases)}"
        raise UserError(f"{root}: {count} cases have no label file ({some}); add or drop them")
    return Manifest(root, layout, convention, tuple(sorted(cases, key=lambda c: c.id)), synthetic)


def scan_images(uri: str) -> list[tuple[str, Case]]:
    """(root, case) of what is to be segmented: one 4D file, or a folder in a known layout or of 4D files.

    Raises UserError when nothing is found.
    """
    uri = storage.normal(uri)
    if uri.endswith((".nii", ".nii.gz")):
        root, _, name = uri.rpartition("/")
        if not storage.exists(uri):
            raise UserError(f"image {uri} does not exist")
        return [(root, Case(_stem(name), _stem(name), (name,), None, len(storage.read_bytes(uri))))]
    files = storage.list_files(uri)
    plain = [name for name in files if "/" not in name and name.endswith((".nii", ".nii.gz"))]
    if plain and "dataset.json" not in files:
        return [(uri, Case(_stem(name), _stem(name), (name,), None, files[name])) for name in plain]
    found = []
    for case in scan(uri, need_labels=False).cases:
        size = sum(files[path] for path in case.images)
        found.append((uri, dataclasses.replace(case, label=None, bytes=size)))
    return found


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".gz").removesuffix(".nii")


def _scan_msd(root: str, files: dict[str, int]) -> tuple[list[Case], bool, str]:
    where = storage.join(root, "dataset.json")
    try:
        about = json.loads(storage.read_bytes(where))
        convention, all_stated = str(about.get("convention", "msd")), all("fold" in row for row in about["training"])
        cases = []
        for row in about["training"]:
            image, label = (row[kind].removeprefix("./") for kind in ("image", "label"))
            name, fold = _stem(image), int(row["fold"]) if all_stated else 0
            found, size = (label if label in files else None), files.get(image, -1) + files.get(label, 0)
            cases.append(Case(name, str(row.get("subject", name)), (image,), found, size, fold=fold))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{where} is not an MSD dataset.json with a "training" list of image and label') from error
    for case in cases:
        if case.images[0] not in files:
            raise UserError(f"{where} names {case.images[0]}, which is not there; restore the file or drop its entry")
    if len({c.id for c in cases}) != len(cases):
        raise UserError(f"{where} lists a case twice; every image must have a name of its own")
    if convention not in CONVENTIONS or not all(0 <= case.fold < FOLDS for case in cases):
        raise UserError(
            f"{where}: its convention or a fold is not known; give {', '.join(CONVENTIONS)}, 0 to {FOLDS - 1}"
        )
    return cases, bool(about.get("synthetic")), convention


def _scan_brats(files: dict[str, int]) -> list[Case]:
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in files:
        if match := _BRATS_FILE.search(path):
            first = found[match["id"]].setdefault(match["kind"].lower(), path)
            if first != path:
                raise UserError(f"case {match['id']} stands twice, as {first} and as {path}; keep one")
    cases = []
    for name, kinds in found.items():
        missing = [kind for kind in _BRATS_SUFFIXES if kind not in kinds]
        if missing:
            raise UserError(f"case {name} lacks {', '.join(f'{name}_{kind}.nii.gz' for kind in missing)}")
        images = tuple(kinds[kind] for kind in _BRATS_SUFFIXES)
        label = kinds.get("seg")
        size = sum(files[path] for path in [*images, *([label] if label else [])])
        cases.append(Case(name, name, images, label, size))
    return cases


def checksummed(manifest: Manifest, progress: Progress | None = None) -> Manifest:
    """Read every file once, fill in `sha256`, and deal the cases to folds.

    Folds go round in the order of hashed subjects; subjects with cases of equal content count as one, so a copy
    never stands on both sides of a split. Folds that are stated stay.
    """

    def with_checksum(case: Case) -> Case:
        digest = hashlib.sha256()
        for path in case_files(case):
            digest.update(storage.read_bytes(storage.join(manifest.root, path)))
        return dataclasses.replace(case, sha256=digest.hexdigest())

    with ThreadPoolExecutor(8) as pool:
        rows = pool.map(with_checksum, manifest.cases)
        cases = list(progress(rows, len(manifest.cases)) if progress else rows)
    if any(case.fold for case in cases):  # stated
        return dataclasses.replace(manifest, cases=tuple(cases))
    one = _as_one(cases)
    groups = sorted(set(one.values()), key=lambda s: hashlib.sha256(s.encode()).hexdigest())
    fold_of = {subject: number % FOLDS for number, subject in enumerate(groups)}
    dealt = tuple(dataclasses.replace(c, fold=fold_of[one[c.subject]]) for c in cases)
    return dataclasses.replace(manifest, cases=dealt)


def _as_one(cases: list[Case]) -> dict[str, str]:
    """{subject: the first of those that share content, directly or by way of others}."""
    parent = {case.subject: case.subject for case in cases}
    first_of: dict[str, str] = {}

    def first(subject: str) -> str:
        while parent[subject] != subject:
            subject = parent[subject]
        return subject

    for case in cases:
        parent[first(case.subject)] = first(first_of.setdefault(case.sha256, case.subject))
    return {subject: first(subject) for subject in parent}


def duplicates(manifest: Manifest) -> list[tuple[str, ...]]:
    """Groups of case ids whose files are byte for byte the same."""
    groups: dict[str, list[str]] = defaultdict(list)
    for case in manifest.cases:
        groups[case.sha256].append(case.id)
    return [tuple(ids) for ids in groups.values() if len(ids) > 1]


def case_from(row: dict[str, Any]) -> Case:
    """The case of a manifest's line (dataclasses.asdict, then JSON)."""
    return Case(**row | {"images": tuple(row["images"])})


def case_files(case: Case) -> tuple[str, ...]:
    """All files of a case, images first."""
    return (*case.images, *([case.label] if case.label else []))


def write(manifest: Manifest, uri: str) -> None:
    """JSON lines: a header, then one case a line."""
    header: dict[str, Any] = {"manifest": 1, "root": manifest.root, "layout": manifest.layout}
    header |= {"convention": manifest.convention, "synthetic": manifest.synthetic}
    lines = [header, *(dataclasses.asdict(c) for c in manifest.cases)]
    storage.write_bytes(uri, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read(uri: str) -> Manifest:
    """Raises UserError when `uri` is missing or not a manifest."""
    try:
        header, *rows = [json.loads(line) for line in storage.read_bytes(uri).splitlines()]
        cases = tuple(case_from(row) for row in rows)
        return Manifest(header["root"], header["layout"], header["convention"], cases, header["synthetic"])
    except FileNotFoundError as error:
        raise UserError(f"manifest {uri} does not exist; write it with `raytrain-brats index`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{uri} is not a manifest; write it with `raytrain-brats index`") from error
