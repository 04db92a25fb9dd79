"""Label conventions: the only place where a value means a tissue."""

import numpy as np
import pytest

from raytrain_brats import labels
from raytrain_brats.errors import UserError
from raytrain_brats.labels import CONVENTIONS, allowed_values, from_regions, region_table, to_regions


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_regions_come_back_as_labels(convention: str) -> None:
    """Labels -> WT, TC, ET -> labels is the identity, but for values outside the regions (resection cavity)."""
    values = np.array(allowed_values(convention), np.uint8)
    label = np.random.RandomState(0).choice(values, (5, 6, 7))
    regions = to_regions(label, convention)
    whole, core, enhancing = regions

    assert regions.shape == (3, 5, 6, 7)
    assert regions.dtype == bool
    expected = np.where(label == 4, 0, label) if convention == "brats2024_gli" else label
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
