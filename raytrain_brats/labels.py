"""The one place that knows label conventions; everything else works on the regions WT, TC, ET.

In: label voxels of a named convention.
Out: region masks, and back.

WT = whole tumour, TC = tumour core, ET = enhancing tumour (Menze et al. 2015, doi 10.1109/TMI.2014.2377694).
The values were checked on real files: in MSD Task01, label 3 enhances (T1gd/T1 = 1.65), label 2 does not (0.88).
"""

import numpy as np
import numpy.typing as npt

from raytrain_brats.errors import UserError

REGIONS = ("WT", "TC", "ET")

# convention -> (oedema, necrotic or non-enhancing core, enhancing, other values that may stand in a file)
_VALUES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "msd": (1, 2, 3, ()),
    "brats2017_2021": (2, 1, 4, ()),
    "brats2023": (2, 1, 3, ()),
    "brats2024_gli": (2, 1, 3, (4,)),  # 4 = resection cavity, outside the three regions
    "article": (1, 3, 2, ()),  # the AWS article and MONAI's tutorials: ET = 2 on MSD files, a known mistake
}
CONVENTIONS = tuple(_VALUES)


def _values(convention: str) -> tuple[int, int, int, tuple[int, ...]]:
    if convention not in _VALUES:
        raise UserError(f"label convention {convention!r} is not known; choose one of {', '.join(CONVENTIONS)}")
    return _VALUES[convention]


def allowed_values(convention: str) -> tuple[int, ...]:
    """Every value that a label file of this convention may hold."""
    oedema, core, enhancing, other = _values(convention)
    return tuple(sorted({0, oedema, core, enhancing, *other}))


def names(convention: str) -> dict[int, str]:
    """What each value means, in the words of MSD's dataset.json."""
    oedema, core, enhancing, other = _values(convention)
    words = {0: "background", oedema: "edema", core: "non-enhancing tumor", enhancing: "enhancing tumour"}
    return dict(sorted((words | dict.fromkeys(other, "other")).items()))


def region_table(convention: str) -> npt.NDArray[np.bool_]:
    """(3, 256) bool: whether label value v lies in WT, TC, ET. Index it with uint8 labels."""
    oedema, core, enhancing, _ = _values(convention)
    table = np.zeros((3, 256), bool)
    table[0, [oedema, core, enhancing]] = True
    table[1, [core, enhancing]] = True
    table[2, enhancing] = True
    return table


def to_regions(label: npt.NDArray[np.uint8], convention: str) -> npt.NDArray[np.bool_]:
    """(3, *shape) bool masks of WT, TC, ET from label values of any shape."""
    return region_table(convention)[:, label]


def from_regions(regions: npt.NDArray[np.bool_], convention: str) -> npt.NDArray[np.uint8]:
    """Label values from (3, *shape) masks; the innermost region wins, so ET outside TC still counts as ET."""
    oedema, core, enhancing, _ = _values(convention)
    whole, inner, enhances = regions
    label = np.zeros(whole.shape, np.uint8)
    label[whole] = oedema
    label[inner] = core
    label[enhances] = enhancing
    return label
