"""Preprocess all cases once: `raytrain-brats prepare --data URI --store URI`, a Ray Data job over all CPUs.

In: a folder of NIfTI cases or a manifest; a recipe's `preprocess` section.
Out: a store for `train --store`; `quarantine.json` in it names what could not be used and why.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from raytrain_brats import config, storage
from raytrain_brats.cli import Changes, Uri, default, entry
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data import store as stores
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import Refused
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.run import cluster, job


@dataclass(frozen=True)
class Args:
    """Decode, reorient, resample and crop every case once, over all CPUs; a second run does only what is missing."""

    data: Uri = ""
    """Folder in MSD or BraTS layout, or a manifest; by default RAYTRAIN_BRATS_DATA."""
    store: Uri = ""
    """Where the store goes (local or s3://); by default RAYTRAIN_BRATS_STORE."""
    recipe: str = "demo"
    """Recipe whose `preprocess` section counts."""
    set: Changes = ()
    """Change a setting of the recipe: key=value, such as preprocess.spacing_mm=1.0."""
    strict: bool = False
    """Stop at the first case that cannot be used, instead of setting it aside."""


def work(args: Args) -> None:
    data, store = default(args.data, "DATA"), default(args.store, "STORE")
    if not data or not store:
        missing = "store" if data else "data"
        raise UserError(f"no {missing} given; name it with --{missing}")
    settings = config.load(args.recipe, args.set)
    store, options = storage.normal(store), job.preprocessing(settings)
    manifest, source = job.open_cases(settings, data)
    storage.check_writable(store)
    cluster.connect()
    cluster.check_shared({"store": store}, {"data folder": source.root})
    good: list[Case] = []
    refused: list[dict[str, str]] = []
    results = _prepare_all(store, source, manifest.cases, options)
    for row in track(results, "preparing", len(manifest.cases), disable=not sys.stdout.isatty()):
        case = manifests.case_from(json.loads(row.pop("prepared")))
        if not row["reason"]:
            good.append(case)
            continue
        refused.append({"case": case.id, **row})
        if args.strict:
            raise RunFailed(f"case {case.id} ({row['uri']}): {row['reason']}, {row['detail']}")
    storage.write_bytes(storage.join(store, "quarantine.json"), json.dumps(refused, indent=1).encode())
    _show(refused)
    if not good:
        raise RunFailed(
            f"none of {len(manifest.cases)} cases could be used; see {storage.join(store, 'quarantine.json')}"
        )
    good.sort(key=lambda case: case.id)
    stores.write_index(store, dataclasses.replace(manifest, cases=tuple(good), convention=source.convention), options)
    size = sum(storage.list_files(storage.join(store, "objects")).values())
    print(f"{len(good)} cases prepared, {len(refused)} set aside, {size / 1e6:,.1f} MB in {store}")


def _prepare_all(
    store: str, source: Source, cases: tuple[Case, ...], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    def one(row: dict[str, Any]) -> dict[str, Any]:
        case = manifests.case_from(json.loads(row["case"]))
        about = {"uri": storage.join(source.root, case.images[0]), "reason": "", "detail": ""}
        try:
            case = stores.put(store, source, case, options)
        except Refused as error:
            about |= {"reason": error.reason, "detail": error.detail}
        return about | {"prepared": json.dumps(dataclasses.asdict(case))}

    cpus = ray.cluster_resources()["CPU"]
    rows = ray.data.from_items(
        [{"case": json.dumps(dataclasses.asdict(case))} for case in cases],
        override_num_blocks=min(len(cases), 64 * int(cpus)),  # enough for an even load, not one task a case
    )
    yield from rows.map(one, num_cpus=0.5 if cpus <= 4 else 1.0).iter_rows()


def _show(refused: list[dict[str, str]]) -> None:
    if refused:
        table = Table("case", "reason", "detail", title=f"{len(refused)} cases set aside")
        for row in refused[:20]:
            table.add_row(row["case"], row["reason"], row["detail"])
        Console().print(table)


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "prepare", argv)


if __name__ == "__main__":
    sys.exit(main())
