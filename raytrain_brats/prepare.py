"""Preprocess all cases once: `raytrain-brats prepare --data URI --store URI`, a Ray Data job over all CPUs.

In: a folder of NIfTI cases or a manifest; a recipe's `preprocess` section.
Out: a store for `train --store`; `quarantine.json` in it names what could not be used and why; `manifest.jsonl` what
the folder held, so that it is not read again.

May be killed anywhere: the same command again makes what is missing. An object is identified by its name and length;
`--verify` reads all of them, and the folder, again.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raytrain_brats import config, outputs, storage
from raytrain_brats.cases import recipe as recipes
from raytrain_brats.cases.layouts import QUARANTINED
from raytrain_brats.cli import Changes, Uri, default, entry, progress, show_refused, show_skipped
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data import store as stores
from raytrain_brats.data.manifest import Case, Manifest
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.store import Codec, Source
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import described
from raytrain_brats.ray_ext import cluster
from raytrain_brats.run import spec


@dataclass(frozen=True)
class Args:
    """Decode, reorient, resample and crop every case once, over all CPUs; a second run does only what is missing."""

    data: Uri = ""
    """Folder in MSD or BraTS layout, or a manifest; by default RAYTRAIN_BRATS_DATA."""
    store: Uri = ""
    """Where the store goes (local or s3://); by default RAYTRAIN_BRATS_STORE."""
    recipe: str = ""
    """Recipe whose `preprocess` section counts; by default RAYTRAIN_BRATS_RECIPE, and `demo` for phantoms."""
    set: Changes = ()
    """Change a setting of the recipe: key=value, such as preprocess.spacing_mm=1.0."""
    codec: Codec = "zstd"
    """How new objects are packed: zstd is smaller, lz4 faster; those already there stay as they are."""
    strict: bool = False
    """Refuse a folder of which anything is not taken; stop at the first case that cannot be used."""
    overwrite: bool = False
    """Replace the index of a store that was prepared otherwise or from other data."""
    verify: bool = False
    """Read all that is there again and make damaged objects anew, instead of trusting names and sizes."""


def work(args: Args) -> None:
    data, store = default(args.data, "DATA"), default(args.store, "STORE")
    if not data or not store:
        missing = "store" if data else "data"
        raise UserError(f"no {missing} given; name it with --{missing}")
    recipe, settings = _settings(args, data)
    store, options = storage.normal(store), spec.preprocessing(settings)
    begun = stores.begun(store)
    known = "" if args.verify or begun is None else store
    manifest, source = spec.open_cases(
        settings, data, run_dir=known, progress=lambda rows, total: progress(rows, "checksums", total)
    )
    about = stores.About(options, source.convention, manifest.root)
    if begun and not args.overwrite:
        _check_same_store(store, begun, about, manifest)
    show_skipped(manifest.skipped, args.strict)
    storage.check_writable(store)
    print(config.described(recipe, settings) if recipe else f"voxels of {settings.preprocess.spacing_mm:g} mm")
    print(f"{len(manifest.cases)} cases, {manifest.layout}; labels: {described(source.convention)}")
    for warning in recipes.warnings(settings, manifest, source) if begun is None else ():
        print(warning, file=sys.stderr)
    storage.sweep(store)
    stores.begin(store, about)
    manifests.write(manifest, storage.join(store, "manifest.jsonl"))

    keys = {case.id: stores.key(case, options, source.convention) for case in manifest.cases}
    first_of: dict[str, Case] = {}  # equal content is prepared once
    for case in manifest.cases:
        first_of.setdefault(keys[case.id], case)
    there = stores.objects(store)
    done = {} if args.verify else {key: there[key] for key in first_of if key in there}
    rows = [{"case": _packed(case), "object": there.get(key, "")} for key, case in first_of.items() if key not in done]
    verdicts: dict[str, dict[str, str]] = {}
    results = _prepare_all(store, source, rows, options, args.codec) if rows else iter(())
    for row in progress(results, "preparing", len(rows)):
        if row["reason"]:
            verdicts[keys[row["id"]]] = {name: row[name] for name in ("uri", "reason", "detail")}
            if args.strict:
                break
        else:
            done[keys[row["id"]]] = row["object"]

    refused = [{"case": c.id, **verdicts[keys[c.id]]} for c in manifest.cases if keys[c.id] in verdicts]
    lacking = [
        {"case": row.case, "uri": storage.join(source.root, row.path), "reason": reason, "detail": row.detail}
        for row in manifest.skipped
        if row.case and (reason := QUARANTINED.get(row.cause))
    ]
    storage.write_bytes(storage.join(store, "quarantine.json"), json.dumps(refused + lacking, indent=1).encode())
    if args.strict and refused:
        raise RunFailed("case {case} ({uri}): {reason}, {detail}".format(**refused[0]))
    show_refused(refused)
    good = tuple(stores.with_object(c, done[keys[c.id]]) for c in manifest.cases if keys[c.id] in done)
    if not good:
        raise RunFailed(f"none of {len(refused)} cases could be used; see {storage.join(store, 'quarantine.json')}")
    stores.write_index(store, dataclasses.replace(manifest, cases=good, convention=source.convention), options)
    size = sum(storage.list_files(storage.join(store, "objects")).values())
    aside = f"{len(refused) + len(lacking)} set aside"
    print(f"{len(good)} cases prepared, {aside}, {size / 1e6:,.1f} MB in {store}")


def _settings(args: Args, data: str) -> tuple[str, config.Config]:
    """(the recipe's name, the settings). A voxel edge that is given needs no recipe: nothing else of it counts here."""
    given = default(args.recipe, "RECIPE")
    if not given and any(change.startswith("preprocess.spacing_mm=") for change in args.set):
        return "", config.load("demo", args.set)
    recipe = recipes.recipe_for(given, data, "")
    return recipe, config.load(recipe, args.set)


def _check_same_store(store: str, before: stores.About, about: stores.About, manifest: Manifest) -> None:
    """Raises UserError when the store was prepared otherwise, or from other cases."""
    was, now = ((a.preprocess, a.convention) for a in (before, about))
    remedy = "give another --store, or say --overwrite"
    if was != now:
        raise UserError(
            f"store {store} was prepared with {was[0]} from labels read as {described(was[1])}; now it would be "
            f"{now[0]} and {described(now[1])}; {remedy}"
        )
    index = storage.join(store, "index.jsonl")
    if not (before.data and outputs.same(before.data, about.data)) and storage.exists(index):
        ids = {case.sha256 for case in manifest.cases}
        if lost := [case.id for case in manifests.read(index).cases if case.sha256 not in ids]:
            raise UserError(
                f"store {store} was prepared from {before.data} and holds {len(lost)} cases that {about.data} has not, "
                f"such as {lost[0]}; {remedy}"
            )


def _prepare_all(
    store: str, source: Source, rows: list[dict[str, Any]], options: dict[str, Any], codec: Codec
) -> Iterator[dict[str, Any]]:
    """{id, object, uri, reason, detail} of every row {case, object}, over the cluster; intact objects stay."""

    def one(row: dict[str, Any]) -> dict[str, Any]:  # a closure, so that workers import `data` alone and not torch
        case = manifests.case_from(json.loads(row["case"]))
        about = {"id": case.id, "object": row["object"], "uri": "", "reason": "", "detail": ""}
        if about["object"]:
            if stores.intact(store, about["object"]):
                return about
            storage.delete(storage.join(store, about["object"]))
        try:
            about["object"] = stores.put(store, source, case, options, codec).object
        except InvalidCase as error:
            uri = storage.join(source.root, error.file or case.images[0])
            about |= {"uri": uri, "reason": error.reason, "detail": error.detail}
        return about

    cluster.connect()
    cluster.check_shared({"store": store}, {"data folder": source.root})
    yield from cluster.data_map(one, rows)


def _packed(case: Case) -> str:
    return json.dumps(dataclasses.asdict(case))


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "prepare", argv)


if __name__ == "__main__":
    sys.exit(main())
