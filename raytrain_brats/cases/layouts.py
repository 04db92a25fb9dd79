"""From file names to cases: MSD and nnU-Net by dataset.json; BraTS, UCSF-PDGM, UPENN-GBM by names. Runs in the driver.

In: a `storage.Listing`, and what a dataset.json states.
Out: a `Found`: the cases, and every NIfTI file that is part of none, with the cause. No file is read.

Names by family and year: docs/data.md.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

from raytrain_brats.cases.dataset_json import Row, Stated
from raytrain_brats.data.manifest import Case, Skipped
from raytrain_brats.errors import UserError
from raytrain_brats.labels import MODALITIES, modality
from raytrain_brats.storage import Listing

MODALITY, LABEL, UNREADABLE, UNKNOWN = "missing modality", "no label", "cannot be read", "name not known"
TWICE, UNUSED, UNLISTED, OUTSIDE, OTHER = "there twice", "not needed", "not listed", "outside", "other convention"
QUARANTINED = {MODALITY: "missing", LABEL: "missing", UNREADABLE: "missing", OUTSIDE: "missing"}
"""Reason code (docs/refusals.md) of a case that is skipped for this cause."""

NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_LABELS = {"seg": 0, "segm": 0, "tumor_segmentation": 0, "automated_approx_segm": 1}  # 1: where no expert drew
_FILE = re.compile(
    r"(?:(?P<stem>.+?)[_-])?(?P<kind>flair|t2f|t1n|t1ce|t1c|t1gd|t1|t2w|t2|" + "|".join(_LABELS) + r")(?P<bias>_bias)?"
    r"\.nii(?:\.gz)?",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"(?P<stem>.+)_(?P<channel>\d{4})\.nii(?:\.gz)?", re.IGNORECASE)
_OF_2023 = {"t2f", "t1n", "t1c", "t2w"}


@dataclass(frozen=True)
class Family:
    """Cases whose ids begin alike; `subject` is the part of the id without the time point."""

    name: str
    id: re.Pattern[str]
    conventions: tuple[str, ...]
    """Those that the name allows; label values decide between them."""
    may_be_stated: tuple[str, ...] = ()
    """Others that a user may state."""


def _family(name: str, pattern: str, *conventions: str, may_be_stated: tuple[str, ...] = ()) -> Family:
    return Family(name, re.compile(pattern, re.IGNORECASE), conventions, may_be_stated)


_FAMILIES = (
    _family("BraTS 2017 to 2021", r"(?P<subject>(brats\d\d|brats20\d\d|fets20\d\d)_.+)", "brats2017_2021"),
    _family("BraTS 2024 GLI", r"(?P<subject>BraTS-GLI-\d+)-[1-9]\d\d", "brats2024_gli"),
    # A 4 in these may be the enhancing tumour of renamed files of 2021 rather than the resection cavity of 2024
    _family("BraTS 2023 GLI", r"(?P<subject>BraTS-GLI-\d+)-0\d\d", "brats2023", may_be_stated=("brats2024_gli",)),
    _family("BraTS MET", r"(?P<subject>BraTS-MET-\d+)-\d+", "brats2023", "brats2024_met"),
    _family("BraTS PED", r"(?P<subject>BraTS-PED-\d+)-\d+", "brats2023", "brats2024_ped"),
    _family("BraTS 2023", r"(?P<subject>BraTS-(SSA|MEN|GoAT|MEN-RT)-\d+)(-\d+)?", "brats2023"),
    _family("UCSF-PDGM", r"(?P<subject>UCSF-PDGM-\d+)(_FU\d+d)?", "brats2017_2021"),
    _family("UPENN-GBM", r"(?P<subject>UPENN-GBM-\d+)_\d+", "brats2017_2021"),
)
_BY_SUFFIX = (  # other ids: by the endings of their files' names
    Family("BraTS 2017 to 2021 (by the files' endings)", re.compile(""), ("brats2017_2021",)),
    Family("BraTS 2023 (by the files' endings)", re.compile(""), ("brats2023",)),
)


@dataclass(frozen=True)
class Found:
    """`candidates`: the conventions that the names of all cases allow; `tests`: cases without labels, for `predict`."""

    layout: str
    cases: tuple[Case, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    candidates: tuple[str, ...] = ()
    tests: tuple[Case, ...] = ()


@dataclass
class _Group:
    """The files of one case, as they are found."""

    id: str
    family: Family
    folder: str
    files: dict[int, str] = field(default_factory=dict)  # by number of modality
    labels: dict[int, str] = field(default_factory=dict)  # by preference: an expert's first
    unreadable: dict[str, str] = field(default_factory=dict)
    twice: list[tuple[str, str]] = field(default_factory=list)
    endings: set[str] = field(default_factory=set)


def subject_of(case_id: str) -> str:
    """The patient: the id without its time point, where the family has one."""
    matches = (family.id.fullmatch(case_id) for family in _FAMILIES)
    return next((match["subject"] for match in matches if match), case_id)


def stem(path: str) -> str:
    """A NIfTI file's name without its folder and ending."""
    return NIFTI.sub("", path.rsplit("/", 1)[-1])


def _parts(path: str) -> tuple[str, str]:
    """(folder, name); some programs unpack into a folder `x_flair.nii` that holds the file: its name counts then."""
    *folders, name = path.split("/")
    if folders and NIFTI.search(folders[-1]):
        *folders, name = folders
    return "/".join(folders), name


def by_names(listing: Listing, need_labels: bool, convention: str | None = None, root_name: str = "") -> Found:
    """Cases of four 3D files, by the files' names; `convention` where the user states one.

    `root_name` is the listed folder's own name: the id of a case whose files are called `flair.nii.gz` and so on.
    Raises UserError where cases of two conventions lie in one folder and none is stated.
    """
    groups, strange, skipped = _grouped(listing, root_name)
    alone = [path for group in groups if not group.files and not group.unreadable for path in group.labels.values()]
    cases, families = [], []
    for group in groups:
        if not group.files and not group.unreadable:
            continue
        if wrong := _wrong(group, need_labels, strange + alone):
            skipped.append(wrong)
            continue
        label = group.labels[min(group.labels)] if need_labels else None
        images = tuple(group.files[number] for number in range(len(MODALITIES)))
        cases.append(_case(group.id, images, label, listing))
        families.append(group.family)
    skipped += [Skipped(path, UNKNOWN, "its name tells no modality") for path in strange]
    skipped += [Skipped(path, UNUSED, "a label without images of its name") for path in alone]
    layout = ", ".join(sorted({family.name for family in families}))
    others: list[Skipped] = []
    if need_labels:
        cases, families, others = _of_one_convention(cases, families, convention)
    candidates = {name for family in families for name in family.conventions}
    candidates = {name for name in candidates if all(name in family.conventions for family in families)}
    return Found(layout, tuple(cases), tuple(skipped + others), tuple(sorted(candidates)))


def _grouped(listing: Listing, root_name: str) -> tuple[list[_Group], list[str], list[Skipped]]:
    """(files by case, NIfTI files whose names match no pattern, what else is skipped)."""
    groups: dict[tuple[str, str], _Group] = {}
    strange, skipped = [], []
    for path in [*listing.files, *listing.unreadable]:
        folder, name = _parts(path)
        match = _FILE.fullmatch(name)
        if match is None:
            if path in listing.unreadable:
                skipped.append(Skipped(path, UNREADABLE, f"it {listing.unreadable[path]}"))
            elif NIFTI.search(path):
                strange.append(path)
            continue
        case_id = match["stem"] or folder.rsplit("/", 1)[-1] or root_name
        family = next((f for f in _FAMILIES if f.id.fullmatch(case_id)), None)
        key = ("", case_id) if family else (folder, case_id)
        group = groups.setdefault(key, _Group(case_id, family or _BY_SUFFIX[0], folder))
        kind = match["kind"].lower()
        group.endings.add(kind)
        if match["bias"]:
            skipped.append(Skipped(path, UNUSED, "the file without _bias is taken"))
        elif path in listing.unreadable:
            group.unreadable[path] = listing.unreadable[path]
        else:
            number = _LABELS[kind] if kind in _LABELS else modality(kind)
            assert number is not None, f"labels.py has no modality for {kind}, which this pattern takes"
            places = group.labels if kind in _LABELS else group.files
            if (first := places.setdefault(number, path)) != path:
                group.twice.append((first, path))
    _name_apart(list(groups.values()))
    for group in groups.values():
        if group.family is _BY_SUFFIX[0] and group.endings & _OF_2023:
            group.family = _BY_SUFFIX[1]
    return sorted(groups.values(), key=lambda group: group.id), strange, skipped


def _name_apart(groups: list[_Group]) -> None:
    """Add the folder to the ids of cases that have the same name in several folders."""
    by_id = defaultdict(list)
    for group in groups:
        by_id[group.id].append(group)
    for same in by_id.values():
        for group in same if len(same) > 1 else ():
            group.id = "_".join([*group.folder.split("/"), group.id])


def _wrong(group: _Group, need_labels: bool, strange: list[str]) -> Skipped | None:
    """Why a group of files is no case that can be used."""
    if group.unreadable:
        path, why = next(iter(group.unreadable.items()))
        more = f", as {len(group.unreadable) - 1} more of its files" if len(group.unreadable) > 1 else ""
        hint = "; fetch it (git annex get, datalad get)" if "link" in why else ""
        return Skipped(path, UNREADABLE, f"{path} {why}{more}{hint}", group.id)
    if group.twice:
        return Skipped(group.twice[0][1], TWICE, f"as {group.twice[0][0]} and {group.twice[0][1]}; keep one", group.id)
    of_2023 = group.family.conventions[0] != "brats2017_2021"
    endings = ("t2f", "t1n", "t1c", "t2w") if of_2023 else ("flair", "t1", "t1ce", "t2")
    sign = "-" if of_2023 else "_"
    if missing := [ending for number, ending in enumerate(endings) if number not in group.files]:
        files = ", ".join(f"{group.id}{sign}{ending}.nii.gz" for ending in missing)
        return Skipped(group.folder or group.id, MODALITY, f"lacks {files}", group.id)
    if need_labels and not group.labels:
        wanted, beside = f"{group.id}{sign}seg.nii.gz", [path for path in strange if _parts(path)[0] == group.folder]
        hint = f"; if {beside[0]} is it, rename it so" if beside else ""
        return Skipped(group.folder or group.id, LABEL, f"lacks {wanted}{hint}", group.id)
    return None


def _of_one_convention(
    cases: list[Case], families: list[Family], convention: str | None
) -> tuple[list[Case], list[Family], list[Skipped]]:
    """Those whose labels follow one convention; the others are skipped when it was stated, else UserError is raised."""
    known = [family for family in families if family not in _BY_SUFFIX]
    possible = {family: (*family.conventions, *family.may_be_stated) for family in known}
    if convention and (not known or any(convention in names for names in possible.values())):
        fit = [family in _BY_SUFFIX or convention in possible[family] for family in families]
        rest = [(case, family) for case, family, keep in zip(cases, families, fit, strict=True) if not keep]
        skipped = [Skipped(c.images[0], OTHER, f"{f.conventions[0]}, not {convention}", c.id) for c, f in rest]
        kept = [(c, f) for c, f, keep in zip(cases, families, fit, strict=True) if keep]
        stated = Family("stated", re.compile(""), (convention,))
        return [c for c, _ in kept], [stated] * len(kept), skipped
    first = {family: case.id for case, family in reversed(list(zip(cases, families, strict=True)))}
    if first and not set.intersection(*(set(family.conventions) for family in first)):
        kinds = "; ".join(
            f"{families.count(family)} of {family.name} (such as {case}: {' or '.join(family.conventions)})"
            for family, case in first.items()
        )
        raise UserError(
            f"the folder holds cases of different label conventions: {kinds}; give a folder for each, or say which are "
            f"wanted: index --convention, --set data.convention={families[0].conventions[0]}"
        )
    return cases, families, []


def listed(stated: Stated, listing: Listing, need_labels: bool) -> Found:
    """The cases of an MSD or nnU-Net folder. Raises UserError where its dataset.json contradicts itself."""
    rows, tests, layout = list(stated.training or ()), list(stated.test), "MSD"
    if stated.training is None:
        rows, tests, layout = _rows_of_folders(listing, "Tr"), _rows_of_folders(listing, "Ts"), "nnU-Net"
    cases, skipped = _cases(stated, rows, listing, need_labels)
    test_cases, test_skipped = _cases(stated, tests, listing, False)
    if len({case.id for case in cases}) != len(cases):
        raise UserError(f"{stated.where} lists a case twice; every image must have a name of its own")
    taken = {path for case in (*cases, *test_cases) for path in (*case.images, case.label)}
    named = taken | {row.path for row in (*skipped, *test_skipped)}
    named |= {row.label for row in rows} | {path for row in rows for path in _images(row, stated, listing)[0]}
    for path in (path for path in listing.files if NIFTI.search(path) and path not in named):
        if not path.startswith(("imagesTs/", "labelsTs/")):
            skipped.append(Skipped(path, UNLISTED, f"{stated.where} does not name it"))
    loose = [path for path in listing.unreadable if path not in named]
    skipped += [Skipped(path, UNREADABLE, f"it {listing.unreadable[path]}") for path in loose]
    return Found(layout, tuple(cases), tuple(skipped), (), tuple(test_cases))


def _rows_of_folders(listing: Listing, which: str) -> list[Row]:
    """nnU-Net v2 lists no cases: they are the files of imagesTr and labelsTr."""
    stems: dict[str, str] = {}
    for path in [*listing.files, *listing.unreadable]:
        folder, _, name = path.rpartition("/")
        if folder == f"images{which}" and NIFTI.search(name):
            match = _NUMBERED.fullmatch(name)
            stems.setdefault(match["stem"] if match else stem(name), name[-7:] if name.endswith(".gz") else name[-4:])
    return [
        Row((f"images{which}/{name}{ending}",), f"labels{which}/{name}{ending}", "", None)
        for name, ending in stems.items()
    ]


def _cases(stated: Stated, rows: list[Row], listing: Listing, need_labels: bool) -> tuple[list[Case], list[Skipped]]:
    cases, skipped = [], []
    all_stated = all(row.fold is not None for row in rows)
    for row in rows:
        images, channels = _images(row, stated, listing)
        name = _name(row, images)
        label = row.label if need_labels else None
        wanted = [*images, label] if label else images
        lost = [path for path in wanted if path not in listing.files]
        if outside := [path for path in lost if path.startswith(("/", "../"))]:
            skipped.append(Skipped(outside[0], OUTSIDE, f"{stated.where} names {outside[0]}, outside its folder", name))
        elif unreadable := [path for path in lost if path in listing.unreadable]:
            detail = f"{unreadable[0]} {listing.unreadable[unreadable[0]]}"
            skipped.append(Skipped(unreadable[0], UNREADABLE, detail, name))
        elif lost:
            cause = LABEL if lost == [label] else MODALITY
            skipped.append(Skipped(lost[0], cause, f"{lost[0]} is listed, but not there", name))
        else:
            case = _case(name, images, label, listing, channels, row.subject)
            cases.append(Case(**vars(case) | {"fold": row.fold if all_stated else 0}))
    return cases, skipped


def _images(row: Row, stated: Stated, listing: Listing) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(the case's files, the order of channels in a single one): four 3D files come in the order of MODALITIES."""
    images, channels = row.images, stated.channels or ()
    if len(images) == 1 and images[0] not in listing.files:
        ending = NIFTI.search(images[0])
        if ending is None:
            return images, channels
        numbered = tuple(f"{images[0][: ending.start()]}_{number:04d}{ending[0]}" for number in range(4))
        if not any(path in listing.files or path in listing.unreadable for path in numbered):
            return images, () if channels == tuple(range(4)) else channels
        images = numbered
    if len(images) == 1:
        return images, () if channels == tuple(range(4)) else channels
    if len(images) != len(MODALITIES):
        raise UserError(f"{stated.where}: {images[0]} is one of {len(images)} images; {len(MODALITIES)} are needed")
    by_name = [modality(match["kind"]) if (match := _FILE.fullmatch(_parts(path)[1])) else None for path in images]
    if sorted(n for n in by_name if n is not None) == [0, 1, 2, 3]:
        return tuple(images[by_name.index(number)] for number in range(4)), ()
    if not channels:
        raise UserError(
            f'{stated.where}: nothing says which modality {images[0]} and the others are; add "channel_names", such as '
            '{"0": "FLAIR", "1": "T1w", "2": "T1gd", "3": "T2w"}'
        )
    return tuple(images[channel] for channel in channels), ()


def _name(row: Row, images: tuple[str, ...]) -> str:
    """A case's id: its 4D file's name, or what the names of its four files share."""
    name = images[0].rsplit("/", 1)[-1]
    match = (_NUMBERED.fullmatch(name) or _FILE.fullmatch(name)) if len(images) > 1 else None
    return (match["stem"] if match else "") or stem(row.images[0])


def loose(listing: Listing, stated: Stated | None) -> Found:
    """For `predict`: NIfTI files that belong to no known layout are 4D images, or channels numbered as nnU-Net does.

    `stated`: the dataset.json of the folder or of the one above, if any: it says what the channels are.
    """
    numbered: dict[str, str] = {}
    single = []
    for path in (path for path in listing.files if NIFTI.search(path)):
        if match := _NUMBERED.fullmatch(path):
            numbered.setdefault(match["stem"], NIFTI.search(path)[0])  # type: ignore[index]
        else:
            single.append(path)
    if numbered and stated is None:
        raise UserError(
            f"{next(iter(numbered))}_0000 and the others: no dataset.json in the folder or above it says which "
            "modality each number is; give the data set's folder, or name the files _flair, _t1, _t1ce, _t2"
        )
    rows = [Row((path,), None, "", None) for path in (*single, *(f"{name}{end}" for name, end in numbered.items()))]
    about = stated or Stated("", None, None, None, (), False)
    cases, skipped = _cases(about, rows, listing, False)
    ids = defaultdict(list)
    for case in cases:
        ids[case.id].append(case)
    named = [
        Case(**vars(c) | {"id": NIFTI.sub("", c.images[0]).replace("/", "_")}) if len(ids[c.id]) > 1 else c
        for c in cases
    ]
    broken = [Skipped(path, UNREADABLE, f"it {why}") for path, why in listing.unreadable.items()]
    return Found("4D images", tuple(named), (*skipped, *broken))


def _case(
    name: str,
    images: tuple[str, ...],
    label: str | None,
    listing: Listing,
    channels: tuple[int, ...] = (),
    subject: str = "",
) -> Case:
    files = [listing.files[path] for path in (*images, *([label] if label else []))]
    versions = tuple(f"{size}:{version}" for size, version in files)
    size = sum(size for size, _ in files)
    return Case(name, subject or subject_of(name), images, label, size, channels=channels, versions=versions)
