"""Label conventions: the only place where a value means a tissue."""

from typing import get_args

import numpy as np
import pytest

from raytrain_brats import labels
from raytrain_brats.config import Data
from raytrain_brats.errors import UserError
from raytrain_brats.labels import CONVENTIONS, allowed_values, from_regions, region_table, to_regions
from tests.support import ROOT


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_regions_come_back_as_labels(convention: str) -> None:
    """Labels -> WT, TC, ET -> labels is the identity, but for values outside the regions (resection cavity)."""
    values = np.array(allowed_values(convention), np.uint8)
    label = np.random.RandomState(0).choice(values, (5, 6, 7))
    regions = to_regions(label, convention)
    whole, core, enhancing = regions

    assert regions.shape == (3, 5, 6, 7)
    assert regions.dtype == bool
    tissue = labels.known(convention).tissue
    expected = label.copy()
    for value, name in tissue.items():  # what three regions cannot tell apart
        expected[label == value] = {"cavity": 0, "cyst": 2}.get(name, value)
    assert np.array_equal(from_regions(regions, convention), expected)
    assert (enhancing <= core).all()
    assert (core <= whole).all()
    assert 0 < enhancing.sum() < core.sum() < whole.sum() < label.size


@pytest.mark.parametrize(
    ("convention", "regions"),
    [
        ("msd", {1: "100", 2: "110", 3: "111"}),
        ("brats2017_2021", {1: "110", 2: "100", 3: "000", 4: "111"}),
        ("brats2023", {1: "110", 2: "100", 3: "111"}),
        ("brats2024_gli", {1: "110", 2: "100", 3: "111", 4: "000"}),
        ("brats2024_met", {1: "110", 2: "100", 3: "111", 4: "000"}),
        ("brats2024_ped", {1: "111", 2: "110", 3: "110", 4: "100"}),
        ("article", {1: "100", 2: "111", 3: "110"}),
    ],
)
def test_each_value_means_what_its_convention_says(convention: str, regions: dict[int, str]) -> None:
    """WT, TC, ET of every value, as facts/data.md has it: in MSD files ET is 3; 0 and unknown values are nothing."""
    table = region_table(convention)
    assert {value: "".join(str(int(bit)) for bit in table[:, value]) for value in regions} == regions
    assert not np.delete(table, list(regions), axis=1).any()
    assert set(allowed_values(convention)) - {0} <= set(regions)


def test_inconsistent_regions_give_the_innermost() -> None:
    """A network may say ET where it does not say TC: ET wins, so that no enhancing voxel is lost."""
    regions = np.array([[0, 1, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0]], bool)
    assert from_regions(regions, "msd").tolist() == [3, 1, 2, 0]


def test_an_unknown_convention_is_the_users_mistake() -> None:
    """The message names the wrong word and the right ones."""
    for function in (allowed_values, region_table):
        with pytest.raises(UserError, match="'brats' is not known; choose one of msd"):
            function("brats")
    assert labels.REGIONS == ("WT", "TC", "ET")


@pytest.mark.parametrize(
    ("stated", "convention"),
    [
        ({"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}, "msd"),
        ({"0": "background", "1": "necrotic and non-enhancing tumor core", "2": "edema", "3": "ET"}, "brats2023"),
        ({"0": "background", "1": "NCR/NET", "2": "ED", "4": "GD-enhancing tumor"}, "brats2017_2021"),
        ({"0": "background", "1": "NETC", "2": "SNFH", "3": "ET", "4": "RC"}, "brats2024_gli"),
        ({"0": "background", "1": "ET", "2": "NET", "3": "CC", "4": "ED"}, "brats2024_ped"),
        ({"background": 0, "edema": 1, "core": 2, "ET": 3}, "msd"),
        ({"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}, "msd"),
        ({"background": 0, "whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": 3}, "brats2023"),
        ({"background": 0, "WT": [1, 2, 3], "TC": [1, 3], "ET": [3], "resection cavity": 4}, "brats2024_gli"),
        ({"background": 0, "WT": [1, 2, 3, 4], "TC": [1, 2, 3], "ET": [1], "NET": 2}, "brats2024_ped"),
        ({"WT": [1, 2, 3], "TC": [2, 3], "enhancing": [3], "non-enhancing tumor core": [2]}, "msd"),
        ({"0": "background", "1": "edema", "2": "enhancing tumour", "3": "necrosis"}, "article"),
        ({}, None),
        (None, None),
    ],
)  # fmt: skip
def test_names_decide_the_convention(stated: object, convention: str | None) -> None:
    """The words of MSD, of each BraTS year and of nnU-Net (by value and by region) name the same tissues."""
    assert labels.stated_convention(stated, "dataset.json") == convention


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"0": "background", "1": "tumour"}, "'tumour' is not understood"),
        ({"0": "edema", "1": "background"}, "not understood"),
        ({"0": "background", "1": "ET", "2": "core", "3": "edema"}, "no convention known here: msd"),
        ({"WT": [1, 2, 3], "TC": [2, 3], "ET": [3], "necrosis": 1}, "no convention known here: msd"),
        ({"WT": [1, 2, 3], "TC": [1, 3], "ET": [3], "RC": 5}, "no convention known here: msd"),
        ({"edema": 1.7, "core": 2, "enhancing": 3}, "no table"),
        ([1], "no table"),
        ({"a": "b"}, "no table"),
    ],
)
def test_names_that_say_no_known_meaning_are_refused(stated: object, named: str) -> None:
    """Nothing is guessed: the file and the name that is not understood are told."""
    with pytest.raises(UserError, match=f"dataset.json: .*{named}"):
        labels.stated_convention(stated, "dataset.json")


def test_modalities_in_usual_spellings() -> None:
    """Whatever the case and signs; FLAIR, T1w, T1gd, T2w by number."""
    for number, words in enumerate(
        (
            "FLAIR flair T2-FLAIR t2f T2w_FLAIR",
            "T1 t1w T1n T1-weighted native_T1",
            "T1gd t1Gd T1ce t1c T1-Gd T1wCE T1_post_contrast T1C",
            "T2 t2w T2-weighted",
        )
    ):
        assert {labels.modality(word) for word in words.split()} == {number}
    assert labels.modality("PD") is None
    assert labels.modality("T2*") is None  # another sequence
    assert labels.stated_modalities({"0": "T1w", "1": "t1gd", "2": "T2w", "3": "FLAIR"}, "x") == (3, 0, 1, 2)
    for stated, named in (
        ({"0": "PD", "1": "T1", "2": "T2", "3": "FLAIR"}, "'PD' is not understood"),
        ({"0": "MRI"}, "MRI; FLAIR, T1w, T1gd, T2w are needed"),  # MSD Task02
        ({"0": "T1", "1": "T1", "2": "T2", "3": "FLAIR"}, "each once"),
        ({"0": "FLAIR"}, "each once"),
        ({"a": "FLAIR"}, "no table"),
    ):
        with pytest.raises(UserError, match=f"dataset.json: .*{named}"):
            labels.stated_modalities(stated, "dataset.json")


def test_docs_and_recipes_know_every_convention() -> None:
    """The table of docs/data.md and the setting `data.convention` name them all."""
    text = (ROOT / "docs" / "data.md").read_text()
    assert not [name for name in CONVENTIONS if f"`{name}`" not in text]
    assert get_args(Data.model_fields["convention"].annotation) == ("auto", *CONVENTIONS)
