"""Use the folds of somebody else's split file. Runs in the driver.

In: a manifest; nnU-Net's splits_final.json, or a partitioning_*.csv of FeTS (Pati et al. 2021, arXiv 2105.05874).
Out: the manifest with those folds.
"""

import csv
import dataclasses
import io
import json
from collections import Counter, defaultdict

from raytrain_brats import storage
from raytrain_brats.data.manifest import FOLDS, Manifest
from raytrain_brats.errors import UserError


def dealt(manifest: Manifest, uri: str) -> Manifest:
    """Every case in the fold that the file gives it. Raises UserError when the file does not match the cases."""
    uri = storage.normal(uri)
    try:
        text = storage.read_bytes(uri).decode()
        fold_of = _partitions(text) if uri.endswith(".csv") else _splits(text)
    except FileNotFoundError as error:
        raise UserError(f"--folds {uri} does not exist") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--folds {uri} is neither nnU-Net's splits_final.json (a list of train and val) nor a FeTS partitioning "
            f"(columns Partition_ID, Subject_ID): {error}"
        ) from error
    if missing := [case.id for case in manifest.cases if case.id not in fold_of]:
        raise UserError(f"--folds {uri}: {len(missing)} cases stand in none of its folds, such as {missing[0]}")
    cases = tuple(dataclasses.replace(case, fold=fold_of[case.id]) for case in manifest.cases)
    sides, copies = defaultdict(set), defaultdict(set)
    for case in cases:
        sides[case.subject].add(case.fold)
        copies[case.sha256].add(case.fold)
    if split := [subject for subject, folds in sides.items() if len(folds) > 1]:
        ids = ", ".join(case.id for case in cases if case.subject == split[0])
        raise UserError(f"--folds {uri}: {ids} are one patient in several folds ({len(split)} such); mend the file")
    if split := [digest for digest, folds in copies.items() if digest and len(folds) > 1]:
        ids = ", ".join(case.id for case in cases if case.sha256 == split[0])
        raise UserError(f"--folds {uri}: {ids} are the same files in several folds ({len(split)} such); mend the file")
    return dataclasses.replace(manifest, cases=cases)


def _splits(text: str) -> dict[str, int]:
    splits = json.loads(text)
    if not 1 < len(splits) <= FOLDS:
        raise ValueError(f"{len(splits)} splits, 2 to {FOLDS} are known")
    fold_of: dict[str, int] = {}
    for fold, split in enumerate(splits):
        for name in split["val"]:
            if fold_of.setdefault(str(name), fold) != fold:
                raise ValueError(f"{name} is held out twice")
    return fold_of


def _partitions(text: str) -> dict[str, int]:
    """Whole partitions (sites), the largest first, each to the fold that has the fewest cases so far."""
    rows = [(row["Partition_ID"].strip(), row["Subject_ID"].strip()) for row in csv.DictReader(io.StringIO(text))]
    sizes, fold_of_site = Counter(site for site, _ in rows), dict[str, int]()
    filled = Counter(dict.fromkeys(range(FOLDS), 0))
    for site, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        fold = min(range(FOLDS), key=lambda number: (filled[number], number))
        fold_of_site[site], filled[fold] = fold, filled[fold] + size
    if not rows:
        raise ValueError("no rows")
    return {subject: fold_of_site[site] for site, subject in rows}
