"""The one place that knows what label values and modality names mean; everything else works on WT, TC, ET.

In: label voxels of a named convention; the names that a dataset.json gives to labels and modalities.
Out: region masks, and back; the convention and the modality order that such names state.

WT = whole tumour, TC = tumour core, ET = enhancing tumour (Menze et al. 2015, doi 10.1109/TMI.2014.2377694).
The values were checked on real files: in MSD Task01, label 3 enhances (T1gd/T1 = 1.65), label 2 does not (0.88).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raytrain_brats.errors import UserError

REGIONS = ("WT", "TC", "ET")
MODALITIES = ("FLAIR", "T1w", "T1gd", "T2w")
"""In the order that everything behind the decoder has them; that of MSD Task01."""

EDEMA, CORE, ENHANCING, CYST, CAVITY = "edema", "core", "enhancing", "cyst", "cavity"
_IN_REGION = {"WT": {EDEMA, CORE, ENHANCING, CYST}, "TC": {CORE, ENHANCING, CYST}, "ET": {ENHANCING}}


@dataclass(frozen=True)
class Convention:
    """What the values of a data set's label files mean, from its year on.

    `tissue`: {value: tissue}; `words`: {value: the data set's own word}; `own`: regions that its challenge scores
    beside WT, TC and ET, as {region: values}. `sets`: whose files follow it.
    """

    tissue: Mapping[int, str]
    words: Mapping[int, str]
    sets: str
    own: Mapping[str, tuple[int, ...]]

    def value(self, tissue: str) -> int:
        """The value of a tissue. Raises KeyError."""
        return {name: value for value, name in self.tissue.items()}[tissue]


def _convention(
    sets: str, rows: dict[int, tuple[str, str]], own: dict[str, tuple[int, ...]] | None = None
) -> Convention:
    words = {0: "background"} | {value: word for value, (_, word) in rows.items()}
    return Convention({value: tissue for value, (tissue, _) in rows.items()}, words, sets, own or {})


_POST_TREATMENT = {1: (CORE, "NETC"), 2: (EDEMA, "SNFH"), 3: (ENHANCING, "ET"), 4: (CAVITY, "RC")}
_KNOWN: dict[str, Convention] = {
    "msd": _convention(
        "MSD Task01_BrainTumour",
        {1: (EDEMA, "edema"), 2: (CORE, "non-enhancing tumor"), 3: (ENHANCING, "enhancing tumour")},
        {"ED": (1,), "NET": (2,)},
    ),
    "brats2017_2021": _convention(
        "BraTS 2017 to 2021, FeTS, UCSF-PDGM, UPENN-GBM", {1: (CORE, "NCR"), 2: (EDEMA, "ED"), 4: (ENHANCING, "ET")}
    ),
    "brats2023": _convention(
        "BraTS 2023 GLI, SSA, MET, MEN, PED; 2024 GoAT", {1: (CORE, "NCR"), 2: (EDEMA, "ED"), 3: (ENHANCING, "ET")}
    ),
    "brats2024_gli": _convention(
        "BraTS 2024 GLI, post-treatment", _POST_TREATMENT, {"NETC": (1,), "SNFH": (2,), "RC": (4,)}
    ),
    "brats2024_met": _convention("BraTS MET from 2024 on", _POST_TREATMENT, {"RC": (4,)}),
    "brats2024_ped": _convention(
        "BraTS PED from 2024 on",
        {1: (ENHANCING, "ET"), 2: (CORE, "NET"), 3: (CYST, "CC"), 4: (EDEMA, "ED")},
        {"NET": (2,), "CC": (3,), "ED": (4,)},
    ),
    "article": _convention(  # ET = 2 on MSD's files: a known mistake (Project-MONAI/tutorials issue 1355)
        "the AWS article's and MONAI's reading of MSD's files",
        {1: (EDEMA, "edema"), 2: (ENHANCING, "enhancing tumour"), 3: (CORE, "non-enhancing tumor")},
    ),
}
CONVENTIONS = tuple(_KNOWN)


def known(convention: str) -> Convention:
    """Raises UserError for a name that is none."""
    if convention not in _KNOWN:
        raise UserError(f"label convention {convention!r} is not known; choose one of {', '.join(CONVENTIONS)}")
    return _KNOWN[convention]


def allowed_values(convention: str) -> tuple[int, ...]:
    """Every value that a label file of this convention may hold."""
    return tuple(sorted({0, *known(convention).tissue}))


def names(convention: str) -> dict[int, str]:
    """What each value means, in the data set's own words."""
    return dict(sorted(known(convention).words.items()))


def described(convention: str) -> str:
    """A convention as messages show it: its name and what its values mean."""
    words = ", ".join(f"{value} {word}" for value, word in names(convention).items() if value)
    return f"{convention} ({words})"


def regions(convention: str) -> dict[str, tuple[int, ...]]:
    """{region: its label values}: WT, TC, ET, then those that the convention's own challenge scores too."""
    tissue = known(convention).tissue
    three = {r: tuple(v for v, t in tissue.items() if t in within) for r, within in _IN_REGION.items()}
    return three | dict(known(convention).own)


def regions_of_network(convention: str) -> tuple[str, ...]:
    """The regions that masks of WT, TC and ET determine: not a cavity, which is none of them, nor a cyst, which they do
    not tell from core."""
    table = region_table(convention).T
    kinds = {value: tuple(table[value]) for value in known(convention).tissue}
    background = (False,) * len(REGIONS)

    def determined(values: tuple[int, ...]) -> bool:
        inside = {kinds[value] for value in values}
        return background not in inside and inside.isdisjoint(kinds[v] for v in kinds if v not in values)

    return tuple(region for region, values in regions(convention).items() if determined(values))


def region_table(convention: str) -> npt.NDArray[np.bool_]:
    """(3, 256) bool: whether label value v lies in WT, TC, ET. Index it with uint8 labels."""
    table = np.zeros((3, 256), bool)
    for row, region in zip(table, REGIONS, strict=True):
        row[list(regions(convention)[region])] = True
    return table


def to_regions(label: npt.NDArray[np.uint8], convention: str) -> npt.NDArray[np.bool_]:
    """(3, *shape) bool masks of WT, TC, ET from label values of any shape."""
    return region_table(convention)[:, label]


def from_regions(masks: npt.NDArray[np.bool_], convention: str) -> npt.NDArray[np.uint8]:
    """Label values from (3, *shape) masks; the innermost region wins, so ET outside TC still counts as ET.

    Tissues that WT, TC and ET do not tell apart come as one: a cyst as core, a resection cavity as background.
    """
    label = np.zeros(masks.shape[1:], np.uint8)
    for mask, tissue in zip(masks, (EDEMA, CORE, ENHANCING), strict=True):
        label[mask] = known(convention).value(tissue)
    return label


def comparable(first: str, second: str) -> bool:
    """Whether WT, TC and ET of two conventions are the same tissue, so that one's network may be scored on the other.

    They are, whatever the values, but for `article`, which takes another tissue for the enhancing one.
    """
    return (first == "article") == (second == "article")


_TISSUES = (  # the first that fits: "surrounding non-enhancing FLAIR hyperintensity" is no core
    ("", r"^(background|bg|none|clear label)$"),
    (CAVITY, r"resect|cavit|\brc\b"),
    (EDEMA, r"edema|snfh|hyperintens|infiltrat|invaded|\bed\b"),
    (CORE, r"non.?enhanc|necro|\b(ncr|net|netc|nec|nc|nenh)\b|^(tumou?r )?core$"),
    (CYST, r"cyst|\bcc\b"),
    (ENHANCING, r"enhanc|active|\b(et|aet)\b"),
)
_REGION_WORDS = (
    ("", r"non.?enhanc"),  # "non-enhancing tumor core" is a tissue
    ("WT", r"whole|\bwt\b"),
    ("TC", r"tumou?r core|\btc\b"),
    ("ET", r"enhanc|\bet\b"),
)


def stated_convention(stated: Any, where: str) -> str | None:
    """The convention whose table the `labels` of a dataset.json states; None when it states nothing.

    MSD writes {"1": "edema"}, nnU-Net {"edema": 1} or, by region, {"whole tumor": [1, 2, 3]}.
    Raises UserError when a name is not understood, or when no convention fits the table.
    """
    if not stated:
        return None
    try:
        by_name = {k: v for k, v in stated.items() if not str(k).isdigit()} or {n: int(v) for v, n in stated.items()}
        values = {str(name): _whole(value) for name, value in by_name.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: its `labels` are no table of values and names; mend them") from error
    listed = ", ".join(f"{'/'.join(map(str, v))} {name}" for name, v in values.items())
    by_region = {name: r for name in values if (r := _first(_REGION_WORDS, name))}
    if not (any(len(v) > 1 for v in values.values()) and sorted(by_region.values()) == sorted(REGIONS)):
        by_region = {}
    tissue: dict[int, str] = {}
    for name, (value, *more) in values.items():
        if name in by_region:
            continue
        found = _first(_TISSUES, name)
        if found is None or more or (found == "") != (value == 0):
            raise UserError(
                f"{where}: the label {value} {name!r} is not understood; name it edema, core or enhancing, or by "
                "the data set's own word"
            )
        tissue |= {value: found} if value else {}
    if by_region:  # what is named beside them, such as a resection cavity, tells conventions of equal regions apart
        asked = {region: set(values[name]) for name, region in by_region.items()}
        used = {value for named in values.values() for value in named} - {0}
        fitting = [
            c
            for c in CONVENTIONS
            if all(set(regions(c)[r]) == asked[r] for r in REGIONS)
            and used == set(known(c).tissue)
            and tissue.items() <= known(c).tissue.items()
        ]
    else:
        fitting = [c for c in CONVENTIONS if known(c).tissue == tissue]
    if not fitting:
        every = "; ".join(described(c) for c in CONVENTIONS if c != "article")
        raise UserError(f"{where}: its `labels` say {listed}, which is no convention known here: {every}")
    return fitting[0]


def _whole(value: Any) -> list[int]:
    given = value if isinstance(value, list) else [value]
    whole = [int(v) for v in given]
    if not whole or any(isinstance(v, float) and v != int(v) for v in given):
        raise ValueError("no whole number")
    return whole


def _first(words: tuple[tuple[str, str], ...], name: str) -> str | None:
    return next((what for what, pattern in words if re.search(pattern, name.strip().lower().replace("_", " "))), None)


_SPELLINGS = (  # of what is left without signs
    r"(t2w?)?flair(t2w?)?|t2f|fla",
    r"(native)?t1(w|n|native|pre|weighted|wpre|noncontrast|precontrast)?",
    r"t1w?(weighted)?(gd|gad|gadolinium|ce|c|kv|km|post|postgd|postcontrast|contrast|contrastenhanced|pc|gde)|(gd|ce|c)t1w?",
    r"t2(w|weighted)?",
)


def modality(name: str) -> int | None:
    """Which of MODALITIES a name means, in any usual spelling; None when it is not understood."""
    if "*" in name:  # T2* is another sequence than T2
        return None
    bare = re.sub(r"[^a-z0-9]", "", name.lower())
    return next((n for n, pattern in enumerate(_SPELLINGS) if re.fullmatch(pattern, bare)), None)


def stated_modalities(stated: Any, where: str) -> tuple[int, ...] | None:
    """Which channel holds each of MODALITIES, by a dataset.json's `modality` ({"0": "FLAIR", ...}) or `channel_names`.

    None when nothing is stated. Raises UserError when a name is not understood, or when the four are not there once.
    """
    if not stated:
        return None
    try:
        rows = stated.items() if isinstance(stated, Mapping) else enumerate(stated)
        channels = {int(channel): str(name) for channel, name in rows}
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: its modalities are no table of channels and names; mend them") from error
    found = {channel: modality(name) for channel, name in channels.items()}
    unknown = [channels[channel] for channel, which in found.items() if which is None]
    if unknown and len(channels) == len(MODALITIES):  # other numbers are another task's
        raise UserError(
            f"{where}: modality {unknown[0]!r} is not understood; name it as one of {', '.join(MODALITIES)}"
        )
    by_modality = {which: channel for channel, which in found.items()}
    each = set(range(len(MODALITIES)))
    if not found.keys() == by_modality.keys() == each:  # a modality that stands twice leaves another one out
        listed = ", ".join(channels.values())
        raise UserError(f"{where}: it states the modalities {listed}; {', '.join(MODALITIES)} are needed, each once")
    return tuple(by_modality[number] for number in sorted(each))
