"""What voxels mean is part of the data: stated by them, kept with all that is made of them, never swapped unsaid."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytrain_brats import config, prepare, storage
from raytrain_brats.cases import recipe as recipes
from raytrain_brats.cases import scan
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data import store as stores
from raytrain_brats.data.store import Source
from raytrain_brats.errors import UserError
from raytrain_brats.ray_ext import cluster
from raytrain_brats.run import spec
from tests.support.cases import LPS, make_arrays, save, write_brats_folder, write_msd_folder

SHAPE = (10, 9, 8)
MSD = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
OTHER = {"0": "background", "1": "necrotic and non-enhancing tumor core", "2": "peritumoral edema", "3": "ET"}
SPACING = ["--set", "preprocess.spacing_mm=1"]


def state(folder: Path, **about: Any) -> None:
    """Let the folder's dataset.json say more."""
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | about))


@pytest.fixture
def msd(tmp_path: Path) -> Path:
    return write_msd_folder(tmp_path / "data", 6, shape=SHAPE)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` works in this process."""
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "check_shared", lambda *_: None)
    monkeypatch.setattr(cluster, "data_map", lambda function, rows: map(function, rows))


def prepared(data: Path, store: Path, *options: str) -> int:
    return prepare.main(["--data", str(data), "--store", str(store), *SPACING, *options])


def settings(*changes: str) -> config.Config:
    return config.load("demo", ("preprocess.spacing_mm=1", "data.patch_xyz=[8,8,8]", "run.workers=1", *changes))


def test_channels_are_put_in_order_by_their_names(msd: Path, tmp_path: Path) -> None:
    """dataset.json says T1, T1Gd, T2, FLAIR and the files have it so: the volume is that of files in our order."""
    plain = scan.open_manifest(str(msd))
    turned = tmp_path / "turned"
    for case in plain.cases:
        image, label = make_arrays(SHAPE, seed=int(case.id[-1]) - 1, dtype=np.float32)
        save(turned / case.images[0], image[..., [1, 2, 3, 0]])
        save(turned / str(case.label), label)
    (turned / "dataset.json").write_bytes((msd / "dataset.json").read_bytes())
    state(turned, modality={"0": "T1w", "1": "t1gd", "2": "T2w", "3": "FLAIR"})
    other = scan.open_manifest(str(turned))
    for ours, theirs in zip(plain.cases, other.cases, strict=True):
        a, b = (Source(m.root, "msd", 1.0).volume(c) for m, c in ((plain, ours), (other, theirs)))
        assert np.array_equal(a.image_cxyz, b.image_cxyz) and np.array_equal(a.label_xyz, b.label_xyz)  # type: ignore[arg-type]
    state(turned, modality={"0": "PD", "1": "t1gd", "2": "T2w", "3": "FLAIR"})
    with pytest.raises(UserError, match=r"dataset\.json: modality 'PD' is not understood"):
        scan.open_manifest(str(turned))


def test_an_order_that_changes_is_another_data_set(msd: Path) -> None:
    """The same bytes under another order of modalities or another convention have another identity and store key."""
    keys = []
    for about in (
        {"modality": {"0": "FLAIR", "1": "T1w", "2": "T1gd", "3": "T2w"}, "labels": MSD},
        {"modality": {"0": "T1w", "1": "FLAIR", "2": "T1gd", "3": "T2w"}, "labels": MSD},
        {"modality": {"0": "FLAIR", "1": "T1w", "2": "T1gd", "3": "T2w"}, "labels": OTHER},
    ):
        state(msd, **about)
        found = scan.open_manifest(str(msd))
        options = {"spacing_mm": 1.0}
        dataset_identity = manifests.dataset_identity(found.cases, options, found.convention)
        keys.append((dataset_identity, stores.key(found.cases[0], options, found.convention)))
    assert len({dataset_identity for dataset_identity, _ in keys}) == len({key for _, key in keys}) == 3


def test_a_convention_against_the_stated_labels_is_refused(msd: Path) -> None:
    """Both are shown; `article`, the known mistake, may be asked for on MSD's files, and only by name."""
    state(msd, labels=OTHER)
    assert scan.open_manifest(str(msd)).convention == "brats2023"
    with pytest.raises(UserError, match=r"brats2023 \(1 NCR, 2 ED, 3 ET\), asked for is msd \(1 edema"):
        scan.open_manifest(str(msd), convention="msd")
    state(msd, labels=MSD)
    assert scan.open_manifest(str(msd), convention="article").convention == "article"
    state(msd, labels={"0": "background", "1": "edema", "2": "enhancing tumour", "3": "necrosis"})
    with pytest.raises(UserError, match="known mistake"):
        scan.open_manifest(str(msd))
    state(msd, labels={"0": "background", "1": "lesion"})
    with pytest.raises(UserError, match="'lesion' is not understood"):
        scan.open_manifest(str(msd))


def test_a_manifest_carries_its_label_table(msd: Path, tmp_path: Path) -> None:
    """One written under another table of the same name is not read in another meaning."""
    out = tmp_path / "m.jsonl"
    manifests.write(scan.open_manifest(str(msd)), str(out))
    header, *rows = out.read_text().splitlines()
    about = json.loads(header)
    assert about["convention"] == "msd" and about["labels"] == MSD
    assert about["modalities"] == ["FLAIR", "T1w", "T1gd", "T2w"]
    out.write_text("\n".join([json.dumps(about | {"labels": OTHER}), *rows]))
    with pytest.raises(UserError, match=r"m\.jsonl was written with .*necrotic.*here that is .*edema"):
        manifests.read(str(out))


def test_a_run_goes_on_under_its_own_convention_alone(msd: Path, tmp_path: Path) -> None:
    """A dataset.json that says other tissues by now, or another setting: refused with both, config.yaml as it was."""
    state(msd, labels=MSD)
    run_dir = tmp_path / "run"
    spec.write_config(spec.build(settings(), str(run_dir), str(msd), "", "demo"))
    before = (run_dir / "config.yaml").read_bytes()
    for word in (b"convention: msd", b"enhancing tumour", b"- FLAIR", b"recipe: demo"):
        assert word in before
    spec.build(settings(), str(run_dir), str(msd), "")
    with pytest.raises(UserError, match=r"begun on labels read as msd \(1 edema.*as article \(1 edema, 2 enhancing"):
        spec.build(settings("data.convention=article"), str(run_dir), str(msd), "")
    state(msd, labels=OTHER)
    with pytest.raises(UserError, match=r"begun on labels read as msd \(.*as brats2023 \("):
        spec.build(settings(), str(run_dir), str(msd), "")
    assert (run_dir / "config.yaml").read_bytes() == before


def test_a_store_is_served_as_it_was_prepared(
    msd: Path, tmp_path: Path, here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prepared as brats2024_gli with a 4 in it: never served as msd, nor prepared over; --overwrite makes another."""
    _, label = make_arrays(SHAPE)
    label[4, 4, 4] = 4
    save(msd / "labelsTr/BRATS_001.nii.gz", label)
    state(msd, labels={"0": "background", "1": "NETC", "2": "SNFH", "3": "ET", "4": "RC"})
    store = tmp_path / "store"
    assert prepared(msd, store) == 0
    index = (store / "index.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"prepared as brats2024_gli \(.*, data\.convention says msd \("):
        spec.build(settings("data.convention=msd"), str(tmp_path / "run"), "", str(store))
    state(msd, labels=MSD)
    assert prepared(msd, store) == 2
    assert "labels read as brats2024_gli (1 NETC" in capsys.readouterr().err
    assert (store / "index.jsonl").read_bytes() == index
    assert prepared(msd, store, "--overwrite") == 0
    assert stores.open_index(str(store), {"spacing_mm": 1.0}).convention == "msd"
    rows = json.loads((store / "quarantine.json").read_text())
    assert [(row["case"], row["reason"]) for row in rows] == [("BRATS_001", "label_values")]


def test_other_preprocessing_or_other_data_do_not_replace_a_store(
    msd: Path, tmp_path: Path, here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does a store begin in a folder that holds other things; more cases of the same folder go in."""
    store = tmp_path / "store"
    assert prepared(msd, store) == 0
    index = (store / "index.jsonl").read_bytes()
    for arguments, named in (
        ([msd, store, "--set", "preprocess.spacing_mm=2"], "now it would be {'spacing_mm': 2.0}"),
        ([write_msd_folder(tmp_path / "other", 5, shape=(9, 9, 9)), store], "holds 6 cases that"),
        ([msd, msd], "holds other files"),
    ):
        assert prepared(*arguments) == 2  # type: ignore[arg-type]
        assert named in capsys.readouterr().err
        assert (store / "index.jsonl").read_bytes() == index
    write_msd_folder(msd, 7, shape=SHAPE)
    assert prepared(msd, store) == 0
    assert len(stores.open_index(str(store), {"spacing_mm": 1.0}).cases) == 7


def test_a_store_of_the_version_before_is_read(msd: Path, tmp_path: Path, here: None) -> None:
    """Its preprocess.json holds the settings alone; its index says the convention."""
    store = tmp_path / "store"
    assert prepared(msd, store) == 0
    (store / "preprocess.json").write_text('{"spacing_mm": 1.0}')
    assert len(stores.open_index(str(store), {"spacing_mm": 1.0}).cases) == 6


def test_a_label_corrected_in_place_is_noticed(tmp_path: Path, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    """By its time: `prepare` makes it anew, a manifest refuses to be used, a run refuses to go on."""
    data, store, run_dir = tmp_path / "data", tmp_path / "store", str(tmp_path / "run")
    write_brats_folder(data, 6, shape=SHAPE)
    for path in data.rglob("*_seg.nii.gz"):
        save(path.with_suffix(""), np.zeros(SHAPE, np.uint8), LPS)  # .nii: a changed voxel leaves the size alone
        path.unlink()
    assert prepared(data, store) == 0
    first = stores.open_index(str(store), {"spacing_mm": 1.0})
    spec.write_config(spec.build(settings(), run_dir, str(data), ""))
    manifests.write(scan.open_manifest(str(data)), str(tmp_path / "m.jsonl"))

    label = data / "BraTS2021_00003" / "BraTS2021_00003_seg.nii"
    content = bytearray(label.read_bytes())
    content[-7] = 4
    label.write_bytes(content)
    assert prepared(data, store) == 0
    second = stores.open_index(str(store), {"spacing_mm": 1.0})
    changed = [a.id for a, b in zip(first.cases, second.cases, strict=True) if a.object != b.object]
    assert changed == ["BraTS2021_00003"]
    case = second.cases[3]
    assert 4 in np.unique(Source(str(store), second.convention, 1.0).load(case).truth_xyz())
    with pytest.raises(UserError, match=r"files of case BraTS2021_00003 .* changed since"):
        scan.open_manifest(str(tmp_path / "m.jsonl"))
    with pytest.raises(UserError, match=r"begun on other data .*; 1 cases changed, such as BraTS2021_00003"):
        spec.build(settings(), run_dir, str(data), "")


def test_what_did_not_change_is_not_read_again(msd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the file whose time alone differs is, and it changes nothing."""
    known = str(tmp_path / "known.jsonl")
    found = scan.open_manifest(str(msd))
    manifests.write(found, known)
    os.utime(msd / "labelsTr/BRATS_002.nii.gz", ns=(1, 1))
    read: list[str] = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: (read.append(uri), real(uri))[1])
    for data in (str(msd), known):
        read.clear()
        assert scan.open_manifest(data, known=known) == found
        assert sorted(Path(uri).name for uri in read if uri.endswith(".gz")) == ["BRATS_002.nii.gz"] * 2
    manifests.write(scan.open_manifest(known), known)
    read.clear()
    assert scan.open_manifest(known) == found
    assert not [uri for uri in read if uri.endswith(".gz")]


def test_an_object_changed_on_s3_is_noticed(msd: Path, s3_server: str) -> None:
    """By its ETag, of the one listing."""
    for path in msd.rglob("*.*"):
        storage.write_bytes(f"{s3_server}/data/{path.relative_to(msd).as_posix()}", path.read_bytes())
    known = f"{s3_server}/m.jsonl"
    manifests.write(scan.open_manifest(f"{s3_server}/data"), known)
    label = f"{s3_server}/data/labelsTr/BRATS_002.nii.gz"
    content = bytearray(storage.read_bytes(label))
    content[-9] ^= 1
    storage.write_bytes(label, bytes(content))
    with pytest.raises(UserError, match="files of case BRATS_002"):
        scan.open_manifest(known)


def test_real_cases_have_a_recipe_of_their_own(
    msd: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's 4 mm are for phantoms: other data get `dynunet`, which is told, or one that is named, by option or by
    the cluster's environment."""
    monkeypatch.delenv("RAYTRAIN_BRATS_RECIPE")
    base = ["--data", str(msd), "--store", str(tmp_path / "store")]
    assert prepare.main([*base[:3], str(tmp_path / "fine")]) == 0
    told = capsys.readouterr()
    assert "dynunet: dynunet, 1 mm, patch 128^3" in told.out
    assert "no --recipe is given: dynunet, the default for real cases" in told.err
    assert recipes.recipe_for("", str(msd), "") == recipes.recipe_for("", "", str(tmp_path / "fine")) == "dynunet"
    assert recipes.recipe_for("segresnet", str(msd), "") == "segresnet" and recipes.recipe_for("", "", "") == "demo"
    capsys.readouterr()
    assert prepare.main([*base, "--recipe", "demo"]) == 0
    told = capsys.readouterr()
    assert "demo: segresnet, 4 mm, patch 32^3, 36 epochs" in told.out
    assert "warning: voxels of 4 mm are coarser than the scans' own (1 x 1 x 1 mm in BRATS_001)" in told.err
    monkeypatch.setenv("RAYTRAIN_BRATS_RECIPE", "demo")
    assert prepare.main(base) == 0
    monkeypatch.delenv("RAYTRAIN_BRATS_RECIPE")
    state(msd, synthetic={"seed": 0})
    assert prepare.main([*base[:3], str(tmp_path / "phantoms")]) == 0


def test_voxels_as_fine_as_the_scans_need_no_warning(msd: Path) -> None:
    """By either route."""
    found = spec.open_cases(settings(), str(msd))
    assert recipes.warnings(settings(), *found) == []
    (told,) = recipes.warnings(settings("preprocess.spacing_mm=1.5"), *found)
    assert "coarser" in told


def test_identity_is_that_of_the_convention_read_by(msd: Path) -> None:
    """`article` on MSD's files is another data set than `msd`."""
    manifest, source = spec.open_cases(settings("data.convention=article"), str(msd))
    assert source.convention == "article"
    both = {manifests.dataset_identity(manifest.cases, {}, name) for name in ("msd", "article")}
    assert len(both) == 2
    assert dataclasses.replace(manifest, convention="msd") == scan.open_manifest(str(msd))


def test_a_run_begun_before_identities_told_the_meaning_goes_on(msd: Path, tmp_path: Path) -> None:
    """The same data are its own, as long as nothing is read otherwise by now; other channels are other data."""
    chosen = config.load("demo", ["data.patch_xyz=[16,16,16]"])
    found, run = scan.open_manifest(str(msd)), tmp_path / "run"
    rows = [[c.id, c.bytes, c.sha256, c.fold] for c in found.cases]
    text = json.dumps([rows, spec.preprocessing(chosen)], sort_keys=True)
    earlier = hashlib.sha256(text.encode()).hexdigest()[:16]
    new = spec.build(chosen, str(run), str(msd), "")
    spec.write_config(dataclasses.replace(new, dataset_identity=earlier))
    spec.build(chosen, str(run), str(msd), "")  # is not refused

    about = json.loads((msd / "dataset.json").read_text())
    turned = {"0": "T1", "1": "T1Gd", "2": "T2", "3": "FLAIR"}
    (msd / "dataset.json").write_text(json.dumps(about | {"modality": turned}))
    with pytest.raises(UserError, match="was begun on other data"):
        spec.build(chosen, str(run), str(msd), "")
