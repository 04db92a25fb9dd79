"""The cases of a data set as one value, and its identity; `cases.scan` makes them. Runs in any process.

In: cases; a manifest file written before.
Out: a `Manifest` of `Case` rows and of what was not taken; its identity; its file (JSON lines).
"""

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from raytrain_brats import labels, storage
from raytrain_brats.errors import UserError
from raytrain_brats.labels import MODALITIES

FOLDS = 5


@dataclass(frozen=True)
class Case:
    """One patient's four modalities and label. Paths are relative to the manifest's root.

    `images` holds one 4D file or four 3D files in the order of MODALITIES; `channels` says which channel of a 4D file
    holds each of them, () as they are; `bytes` counts all files; `sha256` is that of all files' bytes, images first,
    label last; `versions` has each file's size and time of change (S3: ETag) when that was read. In a store's index
    `object` names the prepared case, with its own checksum.
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
    channels: tuple[int, ...] = ()
    versions: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Skipped:
    """A case or file of the folder that is not used, and why; `case` is empty for a file."""

    path: str
    cause: str
    detail: str
    case: str = ""


@dataclass(frozen=True)
class Manifest:
    root: str
    layout: str
    convention: str
    """How label values are read; "" where the values decide and none was read yet."""
    cases: tuple[Case, ...]
    synthetic: bool = False
    """Phantoms: scores on them say nothing about patients."""
    skipped: tuple[Skipped, ...] = ()
    candidates: tuple[str, ...] = ()
    """The conventions that the files' names allow; the label values decide."""

    def split(self, fold: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
        """(training cases, held-out cases) for a held-out fold."""
        held_out = tuple(c for c in self.cases if c.fold == fold)
        return tuple(c for c in self.cases if c.fold != fold), held_out


def meaning(convention: str) -> dict[str, Any]:
    """What voxels mean, as identities, keys and outputs record it: convention, its label values, modality order."""
    words = {str(value): word for value, word in labels.names(convention).items()}
    return {"convention": convention, "labels": words, "modalities": list(MODALITIES)}


def dataset_identity(cases: Iterable[Case], preprocessing: dict[str, Any], convention: str) -> str:
    """Short hash of what is trained on: ids, sizes, checksums, folds, what voxels mean, preprocessing."""
    rows = [[c.id, c.bytes, c.sha256, c.fold, list(c.channels)] for c in cases]
    text = json.dumps([rows, preprocessing, meaning(convention)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_dataset_identity(stored: str, cases: Iterable[Case], preprocessing: dict[str, Any], convention: str) -> bool:
    """Whether a run's identity is that of these; `convention` must be the run's own.

    Earlier identities did not include what voxels mean: such a run is accepted where the channels are in file order.
    """
    cases = list(cases)
    if stored == dataset_identity(cases, preprocessing, convention):
        return True
    rows = [[c.id, c.bytes, c.sha256, c.fold] for c in cases]
    earlier = hashlib.sha256(json.dumps([rows, preprocessing], sort_keys=True).encode()).hexdigest()[:16]
    return stored == earlier and not any(c.channels for c in cases)


def duplicates(manifest: Manifest) -> list[tuple[str, ...]]:
    """Groups of case ids whose files are byte for byte the same."""
    groups: dict[str, list[str]] = defaultdict(list)
    for case in manifest.cases:
        groups[case.sha256].append(case.id)
    return [tuple(ids) for ids in groups.values() if len(ids) > 1]


def case_from(row: dict[str, Any]) -> Case:
    """The case of a manifest's line (dataclasses.asdict, then JSON)."""
    lists: dict[str, Any] = {name: tuple(row[name]) for name in ("images", "channels", "versions") if name in row}
    return Case(**row | lists)


def case_files(case: Case) -> tuple[str, ...]:
    """All files of a case, images first."""
    return (*case.images, *([case.label] if case.label else []))


def write(manifest: Manifest, uri: str) -> None:
    """JSON lines: a header about the set as a whole, then one case a line."""
    header: dict[str, Any] = {"manifest": 1, "root": manifest.root, "layout": manifest.layout}
    header |= meaning(manifest.convention) | {"synthetic": manifest.synthetic}
    header |= {"skipped": [dataclasses.asdict(row) for row in manifest.skipped]}
    rows = "".join(json.dumps(dataclasses.asdict(case)) + "\n" for case in manifest.cases).encode()
    header["rows_sha256"] = hashlib.sha256(rows).hexdigest()
    storage.write_bytes(uri, json.dumps(header).encode() + b"\n" + rows)


def as_written(uri: str) -> bool:
    """False when the cases of a manifest file were edited by hand (which `read` allows)."""
    header, _, rows = storage.read_bytes(uri).partition(b"\n")
    return json.loads(header).get("rows_sha256") in (None, hashlib.sha256(rows).hexdigest())


def read(uri: str) -> Manifest:
    """Raises UserError when `uri` is missing or not a manifest, or one whose label table means something else here."""
    try:
        header, *rows = [json.loads(line) for line in storage.read_bytes(uri).splitlines()]
        cases = tuple(case_from(row) for row in rows)
        skipped = tuple(Skipped(**row) for row in header.get("skipped", []))
        convention, synthetic = str(header["convention"]), bool(header["synthetic"])
        made = Manifest(header["root"], header["layout"], convention, cases, synthetic, skipped)
        now = meaning(convention)
        written = {name: header.get(name, now[name]) for name in now}
    except FileNotFoundError as error:
        raise UserError(f"manifest {uri} does not exist; write it with `raytrain-brats index`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{uri} is not a manifest; write it with `raytrain-brats index`") from error
    if written != now:
        raise UserError(
            f"{uri} was written with {written}, here that is {now}; write it anew with `raytrain-brats index`"
        )
    return made
