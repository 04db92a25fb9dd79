"""The prepared cases on storage: one Parquet object a case, and an index. Runs in data tasks and the driver.

In: prepared cases.
Out: `objects/<key>-<bytes>-<sha256>.parquet`, `index.jsonl` (a manifest whose cases name their objects).

Measured against blosc2, zarr, npy and others: a row per volume with zstd binary columns is smaller than the .nii.gz
and reads whole in 12 ms; finer bricks gain nothing for patches of 128^3. The key is a hash of the files' content and
of the preprocessing, so equal content is stored once. As an object's name also holds its size and checksum, and an
object is put whole or not at all, a listing of names tells a second run what is there.
"""

import dataclasses
import hashlib
import io
import json
import re
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raytrain_brats import storage
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Case, Manifest
from raytrain_brats.data.nifti import InvalidCase, Volume, decode_case
from raytrain_brats.data.nifti import decode as decode_file
from raytrain_brats.data.preprocess import Geometry, Prepared, preprocess
from raytrain_brats.errors import UserError
from raytrain_brats.labels import allowed_values, described

FORMAT = 1
_ABOUT, _MAKER = "preprocess.json", "raytrain-brats prepare"
Codec = Literal["zstd", "lz4"]
_OBJECT = re.compile(r"objects/(?P<key>[0-9a-f]{32})-(?P<bytes>[0-9]+)-(?P<sha256>[0-9a-f]{64})\.parquet")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where prepared cases come from: NIfTI files (preprocessed now) or store objects; one `load` for both."""

    root: str
    convention: str
    spacing_mm: float

    def load(self, case: Case) -> Prepared:
        """Raises InvalidCase for a case that cannot be used, OSError when storage fails."""
        if case.object:
            try:
                (content,) = storage.read_checked([storage.join(self.root, case.object)], case.object_sha256)
            except FileNotFoundError as error:
                raise InvalidCase("missing", f"{case.object}; run `prepare` again", case.object) from error
            except storage.ChangedError as error:
                detail = f"{case.object} differs from its checksum; run `prepare --verify`"
                raise InvalidCase("changed", detail, case.object) from error
            return decode(content, verified=True)
        return preprocess(self.volume(case), self.spacing_mm)

    def volume(self, case: Case) -> Volume:
        """The case as its NIfTI files have it. Raises as `load` does."""
        paths = manifests.case_files(case)
        uris = [storage.join(self.root, path) for path in paths]
        try:
            files = storage.read_checked(uris, case.sha256 or None, case.bytes)
        except FileNotFoundError as error:
            gone = str(error.filename or error)
            file = next((path for path, uri in zip(paths, uris, strict=True) if uri == gone), "")
            raise InvalidCase("missing", file or gone, file) from error
        except storage.ChangedError as error:
            if fault := self._damaged(paths):
                detail = f"{fault.detail} ({fault.reason}), since the manifest was written"
                raise InvalidCase("changed", detail, fault.file) from error
            raise InvalidCase("changed", f"{error}, by the manifest") from error
        images = len(case.images)
        label = files[images] if case.label else None
        return decode_case(files[:images], label, allowed_values(self.convention), paths, case.channels or None)

    def _damaged(self, paths: tuple[str, ...]) -> InvalidCase | None:
        """Why the first damaged file cannot be decoded: the manifest has one checksum for all files of a case."""
        for path in paths:
            try:
                decode_file(storage.read_bytes(storage.join(self.root, path)), path)
            except InvalidCase as error:
                return error
            except OSError:  # removed since it was read
                return None
        return None


def binary_column(array: npt.NDArray[Any]) -> pa.Array:
    """One binary value holding the array's bytes, without copying them."""
    data = pa.py_buffer(np.ascontiguousarray(array))
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def binary_value(table: pa.Table, column: str, dtype: Any) -> npt.NDArray[Any]:
    """The one value of a binary column as a flat, read-only array, without copying it."""
    offsets, data = table.column(column).chunk(0).buffers()[1:]
    start, end = np.frombuffer(offsets, np.int64)[table.column(column).chunk(0).offset :][:2]
    return np.frombuffer(data, np.uint8)[start:end].view(dtype)


def encode(prepared: Prepared, codec: Codec = "zstd") -> bytes:
    """The Parquet object of a prepared case; the same case and codec always give the same bytes."""
    sink, plain = io.BytesIO(), {"use_dictionary": False, "write_statistics": False}  # voxels hold no repeated values
    pq.write_table(to_table(prepared), sink, compression=codec, write_page_checksum=True, **plain)
    return sink.getvalue()


def to_table(prepared: Prepared) -> pa.Table:
    """A prepared case as one row of bytes and a description."""
    image, label, native = prepared.image_czyx, prepared.label_zyx, prepared.native_label_xyz
    about: dict[str, Any] = {"format": FORMAT, "dtype": image.dtype.name, "shape_czyx": image.shape}
    about |= {"labelled": label is not None, "native_labelled": native is not None}
    about |= {"mean": prepared.mean, "std": prepared.std, "geometry": dataclasses.asdict(prepared.geometry)}
    about |= {"foreground_counts": prepared.foreground_counts, "label_voxels": prepared.label_voxels}
    nothing = np.zeros(0, np.uint8)
    columns: dict[str, Any] = {"image": binary_column(image)}
    columns["label"] = binary_column(nothing if label is None else label)
    columns["native_label"] = binary_column(nothing if native is None else native.T)
    return pa.table(columns | {"foreground": binary_column(prepared.foreground), "about": [json.dumps(about)]})


def decode(content: bytes, verified: bool = False) -> Prepared:
    """The prepared case of a Parquet object, its pages' checksums compared unless the whole was `verified` already.

    Raises InvalidCase("changed") for anything else.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=not verified)
        return from_table(file.read(use_threads=False))
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError) as error:
        raise InvalidCase("changed", f"not a store object of format {FORMAT}: {error}") from error


def from_table(table: pa.Table) -> Prepared:
    """The prepared case of `to_table`, as views into the table. Raises what NumPy and json raise for anything else."""
    about = json.loads(table.column("about")[0].as_py())
    if about["format"] != FORMAT:
        raise ValueError(f"format {about['format']}")
    shape = tuple(about["shape_czyx"])
    geometry = Geometry(**{key: _tuples(value) for key, value in about["geometry"].items()})
    native = None
    if about["native_labelled"]:
        native = binary_value(table, "native_label", np.uint8).reshape(geometry.native_shape[::-1]).T
    label = binary_value(table, "label", np.uint8).reshape(shape[1:]) if about["labelled"] else None
    counts = _tuples(about["foreground_counts"])
    voxels = about.get("label_voxels")
    if voxels is None:  # an object of an earlier version
        voxels = [] if label is None else [int(np.count_nonzero(label == value)) for value, _ in counts]
    return Prepared(
        binary_value(table, "image", np.dtype(about["dtype"])).reshape(shape),
        label,
        tuple(about["mean"]),
        tuple(about["std"]),
        geometry,
        binary_value(table, "foreground", np.int32),
        counts,
        native,
        tuple(voxels),
    )


def key(case: Case, preprocessing: dict[str, Any], convention: str) -> str:
    """Name of a case's object: a hash of the files' content, the preprocessing and the label convention."""
    about = [FORMAT, case.sha256, list(case.channels), preprocessing, manifests.meaning(convention)]
    text = json.dumps(about, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def put(store: str, source: Source, case: Case, preprocessing: dict[str, Any], codec: Codec = "zstd") -> Case:
    """Prepare one case into the store; the case, with its object. Raises InvalidCase."""
    content = encode(source.load(case), codec)
    checksum = hashlib.sha256(content).hexdigest()
    name = f"objects/{key(case, preprocessing, source.convention)}-{len(content)}-{checksum}.parquet"
    storage.write_bytes(storage.join(store, name), content)
    return with_object(case, name)


def with_object(case: Case, name: str) -> Case:
    """The case as the store's index has it; `name` is that of its object."""
    found = _OBJECT.fullmatch(name)
    assert found, name
    return dataclasses.replace(case, object=name, object_sha256=found["sha256"])


def objects(store: str) -> dict[str, str]:
    """{key: name} of the objects whose size is the one in their name; no content is read."""
    found: dict[str, str] = {}
    for name, size in storage.list_files(storage.join(store, "objects")).items():
        if (match := _OBJECT.fullmatch(f"objects/{name}")) and int(match["bytes"]) == size:
            found.setdefault(match["key"], match[0])  # two where library versions compress differently: either will do
    return found


def intact(store: str, name: str) -> bool:
    """Whether the content of an object is that of its name."""
    try:
        content = storage.read_bytes(storage.join(store, name))
    except FileNotFoundError:
        return False
    return f"-{hashlib.sha256(content).hexdigest()}." in name


@dataclasses.dataclass(frozen=True)
class About:
    """A store's preprocessing and label convention; `data`: where its cases came from."""

    preprocess: dict[str, Any]
    convention: str
    data: str


def begun(store: str) -> About | None:
    """What `prepare` recorded in this folder when it began; None in an empty one.

    Raises UserError when the folder holds other files, or when the record is damaged.
    """
    where = storage.join(store, _ABOUT)
    try:
        about = json.loads(storage.read_bytes(where))
        if about.get("maker") == _MAKER:
            return About(dict(about["preprocess"]), str(about["convention"]), str(about["data"]))
        index = manifests.read(storage.join(store, "index.jsonl"))  # an earlier version recorded the settings alone
        return About(about, index.convention, "")
    except (FileNotFoundError, NotADirectoryError):
        others = [
            name for name in storage.list_files(store) if not name.startswith("objects/") and name != storage.PROBE
        ]
        if others:
            raise UserError(f"{store} holds other files ({others[0]}); give an empty or new folder") from None
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is damaged; give an empty or new folder") from error


def begin(store: str, about: About) -> None:
    """Record what is being prepared here, before any object is put; first remove an index of other settings."""
    where = storage.join(store, _ABOUT)
    text = json.dumps(
        {"maker": _MAKER} | dataclasses.asdict(about) | manifests.meaning(about.convention), indent=1
    ).encode()
    if storage.exists(where) and storage.read_bytes(where) != text:
        # In this order: a kill between the two must not leave an index whose objects have other settings.
        storage.delete(storage.join(store, "index.jsonl"))
    storage.write_bytes(where, text)


def write_index(store: str, manifest: Manifest, preprocessing: dict[str, Any]) -> None:
    """Make the store usable; the last thing `prepare` does."""
    begin(store, About(preprocessing, manifest.convention, manifest.root))
    manifests.write(dataclasses.replace(manifest, root=store), storage.join(store, "index.jsonl"))


def open_index(store: str, preprocessing: dict[str, Any], convention: str = "auto") -> Manifest:
    """The store's manifest. Raises UserError when it is no finished store, or one prepared otherwise."""
    store = storage.normal(store)
    try:
        about, manifest = begun(store), manifests.read(storage.join(store, "index.jsonl"))
    except UserError as error:
        raise UserError(f"{store} is not a finished store; make it with `raytrain-brats prepare` ({error})") from error
    if about is None:
        raise UserError(f"{store} is not a finished store; make it with `raytrain-brats prepare`")
    if about.preprocess != preprocessing:
        raise UserError(
            f"store {store} was prepared with {about.preprocess}, the recipe wants {preprocessing}; "
            "prepare another store, or set the recipe's `preprocess` section alike"
        )
    if convention not in ("auto", manifest.convention):
        raise UserError(
            f"store {store} was prepared as {described(manifest.convention)}, data.convention says "
            f"{described(convention)}; leave it at auto, or prepare another store"
        )
    return dataclasses.replace(manifest, root=store)  # the store may have been moved


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
