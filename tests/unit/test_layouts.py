"""Every layout that brain-tumour data come in, by tiny files of the real names: found, in order, with their meaning."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytrain_brats import index, storage
from raytrain_brats.cases import folds, layouts, scan
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Case, Manifest
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.store import Source
from raytrain_brats.errors import UserError
from raytrain_brats.labels import to_regions
from tests.support.cases import REAL, make_arrays, save, write_brats_folder, write_msd_folder

SHAPE = (10, 9, 8)
OLD = ("_flair", "_t1", "_t1ce", "_t2", "_seg")
NEW = ("-t2f", "-t1n", "-t1c", "-t2w", "-seg")
VALUES = {  # by convention: the values of background, oedema, core, enhancing
    "msd": (0, 1, 2, 3),
    "brats2017_2021": (0, 2, 1, 4),
    "brats2023": (0, 2, 1, 3),
    "brats2024_gli": (0, 2, 1, 3),
    "brats2024_ped": (0, 4, 2, 1),
}


def write_case(
    folder: Path,
    name: str,
    endings: tuple[str, ...] = OLD,
    convention: str = "brats2017_2021",
    ext: str = ".nii.gz",
    extra: int | None = None,
) -> Path:
    """Four 3D modalities FLAIR, T1w, T1gd, T2w and a label as <name><ending>; `extra`: a value for one voxel."""
    image, label = make_arrays(SHAPE, seed=sum(name.encode()))
    label = np.array(VALUES[convention], np.uint8)[label]
    if extra is not None:
        label[1, 1, 1] = extra
    for channel, ending in enumerate(endings[:4]):
        save(folder / f"{name}{ending}{ext}", image[..., channel])
    if len(endings) > 4:
        save(folder / f"{name}{endings[4]}{ext}", label)
    return folder


def check(found: Manifest, case: Case) -> None:
    """The case's channels and tissues are those that `write_case` drew."""
    image, label = make_arrays(SHAPE, seed=sum(case.id.encode()))
    volume = Source(found.root, found.convention, 1.0).volume(case)
    assert np.array_equal(volume.image_cxyz, np.moveaxis(image, 3, 0))
    assert volume.label_xyz is not None
    assert np.array_equal(to_regions(volume.label_xyz, found.convention), to_regions(label, "msd"))


@pytest.mark.parametrize(
    ("name", "endings", "convention", "subject"),
    [
        ("Brats17_TCIA_101_1", OLD, "brats2017_2021", "Brats17_TCIA_101_1"),
        ("Brats18_2013_0_1", OLD, "brats2017_2021", "Brats18_2013_0_1"),
        ("BraTS19_CBICA_AAB_1", OLD, "brats2017_2021", "BraTS19_CBICA_AAB_1"),
        ("BraTS20_Training_001", OLD, "brats2017_2021", "BraTS20_Training_001"),
        ("BraTS2021_00000", OLD, "brats2017_2021", "BraTS2021_00000"),
        ("FeTS2022_01341", OLD, "brats2017_2021", "FeTS2022_01341"),
        ("BraTS-GLI-00000-000", NEW, "brats2023", "BraTS-GLI-00000"),
        ("BraTS-SSA-00002-000", NEW, "brats2023", "BraTS-SSA-00002"),
        ("BraTS-MET-00002-000", NEW, "brats2023", "BraTS-MET-00002"),
        ("BraTS-MEN-00004-000", NEW, "brats2023", "BraTS-MEN-00004"),
        ("BraTS-GoAT-00000", NEW, "brats2023", "BraTS-GoAT-00000"),
        ("BraTS-GLI-00005-100", NEW, "brats2024_gli", "BraTS-GLI-00005"),
        (
            "UCSF-PDGM-0004",
            ("_FLAIR", "_T1", "_T1c", "_T2", "_tumor_segmentation"),
            "brats2017_2021",
            "UCSF-PDGM-0004",
        ),
        (
            "UCSF-PDGM-0429_FU003d",
            ("_FLAIR", "_T1", "_T1c", "_T2", "_tumor_segmentation"),
            "brats2017_2021",
            "UCSF-PDGM-0429",
        ),
    ],
)
@pytest.mark.parametrize("ext", [".nii.gz", ".nii"])
def test_each_family_by_its_names(
    tmp_path: Path, name: str, endings: tuple[str, ...], convention: str, subject: str, ext: str
) -> None:
    """Convention (with its year), subject without the time point, channels in order; packed and unpacked."""
    write_case(tmp_path / "deep" / "er" / name, name, endings, convention, ext)
    found = scan.open_manifest(str(tmp_path))
    (case,) = found.cases
    assert (found.convention, case.id, case.subject, found.skipped) == (convention, name, subject, ())
    check(found, case)


def test_ucsf_bias_corrected_files_are_not_mixed_in(tmp_path: Path) -> None:
    """UCSF-PDGM has each modality twice; the plain one is taken, the other told."""
    name, endings = "UCSF-PDGM-0004", ("_FLAIR", "_T1", "_T1c", "_T2", "_tumor_segmentation")
    folder = write_case(tmp_path / f"{name}_nifti", name, endings)
    save(folder / f"{name}_T1_bias.nii.gz", np.ones(SHAPE, np.int16))
    found = scan.open_manifest(str(tmp_path))
    check(found, found.cases[0])
    assert [(row.cause, row.path) for row in found.skipped] == [("not needed", f"{name}_nifti/{name}_T1_bias.nii.gz")]


def test_upenn_takes_the_experts_label_before_the_automatic_one(tmp_path: Path) -> None:
    """UPENN-GBM: images in one folder, labels in another; 147 were drawn by experts, the others by a program."""
    endings = ("_FLAIR", "_T1", "_T1GD", "_T2")
    for name in ("UPENN-GBM-00001_11", "UPENN-GBM-00001_21", "UPENN-GBM-00002_11"):
        write_case(tmp_path / "images_structural" / name, name, endings)
        label = np.array(VALUES["brats2017_2021"], np.uint8)[make_arrays(SHAPE, seed=sum(name.encode()))[1]]
        save(tmp_path / "automated_segm" / f"{name}_automated_approx_segm.nii.gz", label)
    save(tmp_path / "images_segm" / "UPENN-GBM-00002_11_segm.nii.gz", label)
    found = scan.open_manifest(str(tmp_path))
    assert [case.subject for case in found.cases] == ["UPENN-GBM-00001"] * 2 + ["UPENN-GBM-00002"]
    assert found.cases[2].label == "images_segm/UPENN-GBM-00002_11_segm.nii.gz"
    assert str(found.cases[0].label).startswith("automated_segm/")
    check(found, found.cases[2])


def test_time_points_of_a_subject_stay_on_one_side_of_every_fold(tmp_path: Path) -> None:
    """BraTS-GLI-00001-000 and -001 are one patient: never one in training and one held out."""
    for number in range(10):
        for point in range(2):
            name = f"BraTS-GLI-{number:05d}-{point:03d}"
            write_case(tmp_path / name, name, NEW, "brats2023")
    found = scan.open_manifest(str(tmp_path))
    assert len({case.subject for case in found.cases}) == 10
    for number in range(10):
        assert len({case.fold for case in found.cases if case.subject == f"BraTS-GLI-{number:05d}"}) == 1


def test_pediatric_values_decide_the_year_or_the_user_must(tmp_path: Path) -> None:
    """In 2023 PED 1 is core, from 2024 on it enhances; a 4 decides, else nothing is guessed."""
    name = "BraTS-PED-00001-000"
    write_case(tmp_path / "a" / name, name, NEW, "brats2024_ped")
    found = scan.open_manifest(str(tmp_path / "a"))
    assert found.convention == "brats2024_ped"
    check(found, found.cases[0])

    write_case(tmp_path / "b" / name, name, NEW, "brats2023")
    with pytest.raises(UserError, match=r"brats2023 \(1 NCR.*or brats2024_ped \(1 ET.*state which"):
        scan.open_manifest(str(tmp_path / "b"))
    found = scan.open_manifest(str(tmp_path / "b"), convention="brats2023")
    assert found.convention == "brats2023"
    check(found, found.cases[0])


@pytest.mark.parametrize(("extra", "convention"), [(None, "brats2023"), (4, "brats2024_met")])
def test_metastases_with_a_resection_cavity_are_those_of_2024(
    tmp_path: Path, extra: int | None, convention: str
) -> None:
    """MET names do not tell the year; the other values mean the same in both."""
    write_case(tmp_path, "BraTS-MET-00002-000", NEW, "brats2023", extra=extra)
    found = scan.open_manifest(str(tmp_path))
    assert found.convention == convention
    check(found, found.cases[0])


def test_glioma_of_both_years_in_one_folder_are_read_by_the_wider_table_when_it_is_stated(tmp_path: Path) -> None:
    """Values 1 to 3 mean the same in 2023 and 2024; a 4 in 2023 may be one of 2021, so it takes a word."""
    write_case(tmp_path, "BraTS-GLI-00001-000", NEW, "brats2023")
    write_case(tmp_path, "BraTS-GLI-00002-100", NEW, "brats2024_gli", extra=4)
    with pytest.raises(UserError, match="different label conventions"):
        scan.open_manifest(str(tmp_path))
    found = scan.open_manifest(str(tmp_path), convention="brats2024_gli")
    assert (found.convention, len(found.cases), found.skipped) == ("brats2024_gli", 2, ())
    for case in found.cases:
        check(found, case)


@pytest.mark.parametrize("name", ["BraTS-GLI-00001-000", "BraTS-MET-00001-000"])
def test_values_of_2021_under_names_of_2023_are_not_taken_for_a_cavity(tmp_path: Path, name: str) -> None:
    """Users rename files and keep the 4 for enhancing tumour: refused, whole or case by case."""
    write_case(tmp_path, name, NEW, "brats2017_2021")
    if "MET" in name:
        with pytest.raises(UserError, match=r"values \(\[0, 1, 2, 4\]\) it may be .*state which"):
            scan.open_manifest(str(tmp_path))
    else:
        found = scan.open_manifest(str(tmp_path))
        with pytest.raises(InvalidCase, match="label_values"):
            Source(found.root, found.convention, 1.0).volume(found.cases[0])


def test_two_conventions_in_one_folder_are_refused_or_chosen_from(tmp_path: Path) -> None:
    """4 enhances in one and does not exist in the other: both are named; a stated one takes its own, and tells."""
    write_case(tmp_path, "BraTS2021_00001")
    write_case(tmp_path, "BraTS-GLI-00000-000", NEW, "brats2023")
    with pytest.raises(UserError, match=r"different label conventions: .*brats2017_2021.*brats2023"):
        scan.open_manifest(str(tmp_path))
    found = scan.open_manifest(str(tmp_path), convention="brats2023")
    assert [case.id for case in found.cases] == ["BraTS-GLI-00000-000"]
    assert [(row.cause, row.case) for row in found.skipped] == [("other convention", "BraTS2021_00001")]


def test_images_of_two_conventions_are_segmented_together(tmp_path: Path) -> None:
    """Labels do not matter there."""
    write_case(tmp_path, "BraTS2021_00001")
    write_case(tmp_path, "BraTS-GLI-00000-000", NEW, "brats2023")
    assert image_ids(tmp_path) == ["BraTS-GLI-00000-000", "BraTS2021_00001"]


def test_a_convention_that_the_names_contradict_is_refused(tmp_path: Path) -> None:
    """Both are shown."""
    write_case(tmp_path, "BraTS2021_00001")
    with pytest.raises(UserError, match=r"brats2017_2021 \(1 NCR, 2 ED, 4 ET\), asked for is msd \(1 edema"):
        scan.open_manifest(str(tmp_path), convention="msd")
    with pytest.raises(UserError, match="'bratz' is not known"):
        scan.open_manifest(str(tmp_path), convention="bratz")


def nested(folder: Path, inner: str) -> None:
    """Unpacked archives where each modality is a folder that ends in .nii, with the file in it."""
    write_case(folder, "BraTS2021_00001", ext=".nii")
    for path in sorted(folder.glob("*.nii")):
        path.rename(folder / "file")
        path.mkdir()
        (folder / "file").rename(path / inner.format(path.name))


@pytest.mark.parametrize("inner", ["{}", "0000_final.nii"])
def test_modality_folders_that_end_in_nii_are_seen_through(tmp_path: Path, inner: str) -> None:
    """Whatever the file in them is called, as Kaggle's copies have it."""
    nested(tmp_path / "BraTS2021_00001", inner)
    found = scan.open_manifest(str(tmp_path))
    check(found, found.cases[0])


def test_other_names_for_the_same_thing(tmp_path: Path) -> None:
    """Upper case, renamed folders, files called by modality alone, ids of one's own: all are taken."""
    write_case(tmp_path / "patient_A", "BraTS2021_00001")
    folder = write_case(tmp_path / "BRATS2021_00002", "BraTS2021_00002")
    for path in list(folder.iterdir()):
        path.rename(folder / path.name.upper())
    write_case(tmp_path / "p7", "Müller 7")
    write_case(tmp_path / "p8", "", tuple(ending[1:] for ending in OLD))
    found = scan.open_manifest(str(tmp_path))
    assert [case.id for case in found.cases] == ["BRATS2021_00002", "BraTS2021_00001", "Müller 7", "p8"]
    assert found.convention == "brats2017_2021" and found.skipped == ()
    assert [c.id for c in scan.scan(str(tmp_path / "p8")).cases] == ["p8"]  # the patient's folder itself


def nnunet(folder: Path, about: dict[str, Any], order: tuple[int, ...] = (0, 1, 2, 3)) -> Path:
    image, label = make_arrays(SHAPE, seed=sum(b"P1"))
    for number, channel in enumerate(order):
        save(folder / f"imagesTr/P1_{number:04d}.nii.gz", image[..., channel])
    save(folder / "labelsTr/P1.nii.gz", label)
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


LABELS = {"background": 0, "edema": 1, "non-enhancing": 2, "enhancing": 3}
CHANNELS = {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"}


@pytest.mark.parametrize(
    "about",
    [
        {"channel_names": CHANNELS, "labels": LABELS, "numTraining": 1, "file_ending": ".nii.gz"},
        {
            "modality": CHANNELS,
            "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
            "training": [{"image": "./imagesTr/P1.nii.gz", "label": "./labelsTr/P1.nii.gz"}],
        },
        {
            "modality": CHANNELS,
            "training": [
                {"image": [f"imagesTr/P1_{n:04d}.nii.gz" for n in range(4)], "label": "labelsTr/P1.nii.gz", "fold": 3}
            ],
        },
    ],
    ids=["v2", "v1", "listed"],
)
def test_nnunet_raw_data_by_its_own_channel_order(tmp_path: Path, about: dict[str, Any]) -> None:
    """v1 and v2, and MONAI's lists: numbered channels are put in our order by the names that dataset.json gives."""
    found = scan.open_manifest(str(nnunet(tmp_path, about, (1, 2, 3, 0))))
    (case,) = found.cases
    assert (found.convention, case.id, case.fold, found.skipped) == ("msd", "P1", 3 if "fold" in str(about) else 0, ())
    check(found, case)


def test_numbered_channels_without_names_are_refused(tmp_path: Path) -> None:
    """nnU-Net's BraTS has T1 first, MSD FLAIR: nothing is guessed."""
    rows = [{"image": "imagesTr/P1.nii.gz", "label": "labelsTr/P1.nii.gz"}]
    with pytest.raises(UserError, match=r"nothing says which modality .*channel_names"):
        scan.open_manifest(str(nnunet(tmp_path, {"training": rows})))


def test_monai_lists_by_the_files_names(tmp_path: Path) -> None:
    """MONAI's BraTS lists have flair, t1ce, t1, t2: the names decide, not the order."""
    write_case(tmp_path / "Data/BraTS2021_00006", "BraTS2021_00006", convention="msd")
    images = [f"Data/BraTS2021_00006/BraTS2021_00006_{kind}.nii.gz" for kind in ("flair", "t1ce", "t1", "t2")]
    rows = [{"fold": 0, "image": images, "label": "Data/BraTS2021_00006/BraTS2021_00006_seg.nii.gz"}]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": rows}))
    found = scan.open_manifest(str(tmp_path))
    assert found.cases[0].id == "BraTS2021_00006"
    check(found, found.cases[0])


def test_the_folder_above_a_data_set_is_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder above Task01_BrainTumour works; above two data sets, both are named."""
    write_msd_folder(tmp_path / "Task01_BrainTumour", 5, shape=SHAPE)
    found = scan.open_manifest(str(tmp_path))
    assert found.root == str(tmp_path / "Task01_BrainTumour") and len(found.cases) == 5
    write_msd_folder(tmp_path / "Task02", 5, shape=SHAPE)
    assert index.main(["--data", str(tmp_path), "--out", str(tmp_path / "m.jsonl")]) == 2
    assert "holds 2 data sets (Task01_BrainTumour, Task02)" in capsys.readouterr().err


def test_a_dataset_json_may_name_absolute_paths_below_itself(tmp_path: Path) -> None:
    """As some tools write them; what lies elsewhere is not taken, and told."""
    write_msd_folder(tmp_path / "data", 2, shape=SHAPE)
    path = tmp_path / "data" / "dataset.json"
    rows = json.loads(path.read_text())["training"]
    rows[0] = {kind: str(tmp_path / "data" / rows[0][kind][2:]) for kind in rows[0]}
    path.write_text(json.dumps({"training": [*rows, {"image": "/elsewhere/x.nii.gz", "label": "/elsewhere/y.nii.gz"}]}))
    found = scan.open_manifest(str(tmp_path / "data"))
    assert [case.images[0] for case in found.cases] == ["imagesTr/BRATS_001.nii.gz", "imagesTr/BRATS_002.nii.gz"]
    assert [(row.cause, row.path) for row in found.skipped] == [("outside", "/elsewhere/x.nii.gz")]


def test_folds_of_nnunet_and_of_fets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """splits_final.json gives the folds, partitioning_1.csv whole sites; what does not fit the cases is refused."""
    write_brats_folder(tmp_path / "data", 6, shape=SHAPE)
    names = [f"BraTS2021_{number:05d}" for number in range(6)]
    splits = [
        {"train": [n for n in names if n not in held], "val": held} for held in (names[:2], names[2:5], names[5:])
    ]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    base = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "m.jsonl"), "--folds"]
    assert index.main([*base, str(tmp_path / "splits_final.json")]) == 0
    assert [case.fold for case in manifests.read(str(tmp_path / "m.jsonl")).cases] == [0, 0, 1, 1, 1, 2]

    sites = "Partition_ID,Subject_ID\n" + "".join(f"{n // 2},{name}\n" for n, name in enumerate(names))
    (tmp_path / "partitioning_1.csv").write_text(sites)
    capsys.readouterr()
    for without in (base[:-1], [*base, str(tmp_path / "partitioning_1.csv")]):
        assert index.main(without) == 2  # stated folds are not lost unasked
        assert "has folds that somebody stated" in capsys.readouterr().err
    assert index.main([*base, str(tmp_path / "splits_final.json")]) == 0
    assert index.main([*base, str(tmp_path / "partitioning_1.csv"), "--overwrite"]) == 0
    assert [case.fold for case in manifests.read(str(tmp_path / "m.jsonl")).cases] == [0, 0, 1, 1, 2, 2]

    capsys.readouterr()
    for content, named in (
        (json.dumps(splits[:2]), "1 cases stand in none of its folds, such as BraTS2021_00005"),
        (json.dumps([*splits, {"train": [], "val": names[:1]}]), "BraTS2021_00000 is held out twice"),
        ("{}", "neither nnU-Net's splits_final.json"),
    ):
        (tmp_path / "splits_final.json").write_text(content)
        assert index.main([*base, str(tmp_path / "splits_final.json")]) == 2
        assert named in capsys.readouterr().err
    assert index.main([*base, str(tmp_path / "none.json")]) == 2


def test_folds_that_tear_a_patient_apart_are_refused(tmp_path: Path) -> None:
    """Two time points of one subject in two folds would leak the held-out patient into training."""
    for point in ("000", "001"):
        write_case(tmp_path / "data", f"BraTS-GLI-00001-{point}", NEW, "brats2023")
    ids = [f"BraTS-GLI-00001-{point}" for point in ("000", "001")]
    (tmp_path / "s.json").write_text(json.dumps([{"val": [name]} for name in ids]))
    with pytest.raises(UserError, match="BraTS-GLI-00001-000, BraTS-GLI-00001-001 are one patient in several folds"):
        folds.dealt(scan.open_manifest(str(tmp_path / "data")), str(tmp_path / "s.json"))


def test_folds_that_part_copies_of_a_case_are_refused(tmp_path: Path) -> None:
    """The same files under two patients' names: held out under one, trained on under the other."""
    names = ("BraTS2021_00000", "BraTS2021_00001")
    cases = tuple(Case(name, name, ("image",), "label", 1, sha256="same") for name in names)
    (tmp_path / "s.json").write_text(json.dumps([{"val": [name]} for name in names]))
    with pytest.raises(UserError, match="BraTS2021_00000, BraTS2021_00001 are the same files in several folds"):
        folds.dealt(Manifest("/data", "brats", "brats2017_2021", cases), str(tmp_path / "s.json"))


def image_ids(*uris: Path) -> list[str]:
    return [case.id for _, case in scan.scan_images([str(uri) for uri in uris])[0]]


def test_ways_to_hand_images_to_predict(tmp_path: Path) -> None:
    """A case folder, its four files, 4D files in any letter case, folders of them, an MSD folder with its test list."""
    folder = write_case(tmp_path / "brats" / "BraTS2021_00001", "BraTS2021_00001")
    assert image_ids(folder) == image_ids(tmp_path / "brats") == ["BraTS2021_00001"]
    files = [folder / f"BraTS2021_00001{ending}.nii.gz" for ending in OLD[3::-1]]
    ((root, case),), _ = scan.scan_images([str(path) for path in files])
    assert (root, case.label) == (str(folder), None)
    assert [layouts.stem(path) for path in case.images] == [f"BraTS2021_00001{ending}" for ending in OLD[:4]]

    msd = write_msd_folder(tmp_path / "msd", 2, shape=SHAPE)
    save(msd / "imagesTs" / "BRATS_485.nii.gz", make_arrays(SHAPE)[0])
    about = json.loads((msd / "dataset.json").read_text())
    (msd / "dataset.json").write_text(json.dumps(about | {"test": ["./imagesTs/BRATS_485.nii.gz"]}))
    assert image_ids(msd) == ["BRATS_002", "BRATS_001", "BRATS_485"]
    assert image_ids(msd / "imagesTs") == ["BRATS_485"]
    upper = tmp_path / "upper" / "SCAN.NII.GZ"
    upper.parent.mkdir()
    upper.write_bytes((msd / "imagesTs" / "BRATS_485.nii.gz").read_bytes())
    assert image_ids(upper) == image_ids(upper.parent) == ["SCAN"]
    for name in ("p1", "p2"):
        save(tmp_path / "nested" / name / "scan.nii.gz", make_arrays(SHAPE)[0])
    assert image_ids(tmp_path / "nested") == ["p1_scan", "p2_scan"]


def test_images_of_a_data_set_have_its_channel_order_also_one_by_one(tmp_path: Path) -> None:
    """imagesTr and single files of it are read as the dataset.json above says; numbered files need it."""
    folder = write_msd_folder(tmp_path / "msd", 2, shape=SHAPE)
    about = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(about | {"modality": CHANNELS}))
    for uri in (folder, folder / "imagesTr", folder / "imagesTr" / "BRATS_001.nii.gz"):
        assert {case.channels for _, case in scan.scan_images([str(uri)])[0]} == {(3, 0, 1, 2)}
    about = {"channel_names": CHANNELS, "labels": LABELS}
    raw = nnunet(tmp_path / "raw", about, (1, 2, 3, 0))
    assert image_ids(raw / "imagesTr") == ["P1"]
    storage.delete(str(raw / "dataset.json"))
    with pytest.raises(UserError, match="which modality each number is"):
        image_ids(raw / "imagesTr")


def test_one_modality_alone_is_told_what_it_lacks(tmp_path: Path) -> None:
    """A single _flair file is a quarter of a case."""
    folder = write_case(tmp_path / "BraTS2021_00001", "BraTS2021_00001")
    with pytest.raises(UserError, match=r"missing modality in 1, such as BraTS2021_00001 .*_t1\.nii\.gz"):
        image_ids(folder / "BraTS2021_00001_flair.nii.gz")


@pytest.mark.skipif(not REAL.exists(), reason="the real MSD crops are not here")
def test_real_crops_as_msd_and_as_brats_2021(tmp_path: Path) -> None:
    """Real MSD cases written as BraTS 2021 files: the same channels and tissues by either layout."""
    msd = scan.open_manifest(str(REAL / "Task01_BrainTumour_crops"))
    assert msd.convention == "msd" and len(msd.cases) == 2
    for number, case in enumerate(msd.cases):
        volume, name = Source(msd.root, "msd", 1.0).volume(case), f"BraTS2021_{number:05d}"
        for channel, ending in enumerate(OLD[:4]):
            save(tmp_path / name / f"{name}{ending}.nii.gz", volume.image_cxyz[channel], volume.affine)
        label = np.array(VALUES["brats2017_2021"], np.uint8)[volume.label_xyz]
        save(tmp_path / name / f"{name}_seg.nii.gz", label, volume.affine)
    brats = scan.open_manifest(str(tmp_path))
    assert brats.convention == "brats2017_2021"
    for ours, theirs in zip(msd.cases, brats.cases, strict=True):
        a, b = Source(msd.root, "msd", 1.0).volume(ours), Source(brats.root, "brats2017_2021", 1.0).volume(theirs)
        assert np.array_equal(a.image_cxyz, b.image_cxyz)
        assert a.label_xyz is not None and b.label_xyz is not None
        assert np.array_equal(to_regions(a.label_xyz, "msd"), to_regions(b.label_xyz, "brats2017_2021"))


def test_channels_that_nothing_states_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4D images are read in MSD's order then; `index` and `predict` say that this is an assumption."""
    data = write_msd_folder(tmp_path / "data", 2, shape=SHAPE)
    about = json.loads((data / "dataset.json").read_text())
    turned = {"0": "FLAIR", "1": "T1", "2": "T1ce", "3": "T2"}
    for channels, assumed in ((turned, []), ({}, ["BRATS_001", "BRATS_002"])):
        (data / "dataset.json").write_text(json.dumps(about | {"modality": channels}))
        assert sorted(scan.unstated(scan.scan_images([str(data)])[0])) == assumed
        assert sorted(scan.unstated(scan.scan_images([str(data / "imagesTr")])[0])) == assumed
        assert index.main(["--data", str(data), "--out", str(tmp_path / "m.jsonl")]) == 0
        assert ("modalities not stated" in capsys.readouterr().out) == bool(assumed)
    shutil.copytree(data / "imagesTr", tmp_path / "bare")
    assert len(scan.unstated(scan.scan_images([str(tmp_path / "bare")])[0])) == 2
