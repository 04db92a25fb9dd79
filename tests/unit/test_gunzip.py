"""Unpacking gives exactly the wanted bytes or says why not; buffers are used again, and never while they are viewed."""

import gzip
import random
import struct
import threading
import time
import zlib

import pytest
import torch

from raytrain_brats.data import gunzip
from raytrain_brats.data.gunzip import Damaged, WrongLength, head, take, unpack

PLAIN = bytes(random.Random(3).choices(range(9), k=300_000))
PACKED = gzip.compress(PLAIN, 6, mtime=0)


def checked_header(wrong: int = 0) -> bytes:
    start = PACKED[:3] + b"\2" + PACKED[4:10]
    return start + struct.pack("<H", zlib.crc32(start) & 0xFFFF ^ wrong) + PACKED[10:]


GOOD = {
    "one member": PACKED,
    "members": b"".join(gzip.compress(PLAIN[i : i + 65280], 1) for i in range(0, len(PLAIN), 65280)),
    "an empty member first": gzip.compress(b"") + PACKED,
    "zeros after it": PACKED + bytes(512),
    "name and comment": PACKED[:3] + b"\x18" + PACKED[4:10] + b"a.nii\0said\0" + PACKED[10:],
    "header checksum": checked_header(),
    "stored": gzip.compress(PLAIN, 0),
}
BAD = {
    "crc": (PACKED[:-8] + b"\1\2\3\4" + PACKED[-4:], Damaged),
    "length": (PACKED[:-4] + struct.pack("<I", len(PLAIN) + 1), Damaged),
    "cut": (PACKED[:-3], Damaged),
    "byte after it": (PACKED + b"\n", Damaged),
    "byte after zeros": (PACKED + bytes(9) + b"x", Damaged),
    "header checksum": (checked_header(1), Damaged),
    "reserved flag": (PACKED[:3] + b"\x20" + PACKED[4:], Damaged),
    "reserved flag of a later member": (gzip.compress(b"") + PACKED[:3] + b"\x20" + PACKED[4:], Damaged),
    "more": (PACKED + gzip.compress(b"x"), WrongLength),
    "twice": (PACKED + PACKED, WrongLength),
    "less": (gzip.compress(PLAIN[:-1]), WrongLength),
    "far too little": (gzip.compress(b"x"), WrongLength),
}


@pytest.fixture(params=["libdeflate", "zlib"])
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the `deflate` package hides the C functions zlib does the work, with the same results."""
    if request.param == "zlib":
        monkeypatch.setattr(gunzip, "LIBDEFLATE", None)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("content", GOOD.values(), ids=list(GOOD))
def test_sound_files_are_unpacked_whole(content: bytes) -> None:
    """One member or many, named, padded or stored: the same bytes."""
    assert unpack(content, len(PLAIN)).tobytes() == PLAIN
    assert head(content, 352) == PLAIN[:352]


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize(("content", "error"), BAD.values(), ids=list(BAD))
def test_everything_else_is_told_apart(content: bytes, error: type[Exception]) -> None:
    """A damaged stream is not one of another length."""
    with pytest.raises(error):
        unpack(content, len(PLAIN))


def test_many_members_take_time_by_their_number() -> None:
    """A hostile file of 10^5 empty members costs a fraction of a second; by the square of their number it was 36 s."""
    content, began = gzip.compress(b"", mtime=0) * 100_000, time.process_time()
    assert head(content, 352) == b""
    assert time.process_time() - began < 10


@pytest.mark.parametrize("name", ["one member", "members", "stored"])
def test_the_fast_library_is_the_one_that_works(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the C functions are found, and zlib is not asked about ordinary files, of one member or more."""
    monkeypatch.setattr(gunzip, "_by_zlib", None)
    assert unpack(GOOD[name], len(PLAIN)).tobytes() == PLAIN


def test_a_buffer_is_used_again_only_when_nobody_views_it() -> None:
    """A slice, a reversed view, a memoryview or a tensor each keep it; after the last one it is the next one's."""
    size = gunzip.SMALL_BYTES + 5
    for view in (lambda b: b[7:9], lambda b: b.reshape(1, -1)[:, ::-1], memoryview, torch.from_numpy):
        first = take(size)
        address = first.ctypes.data
        kept = view(first)
        del first
        second = take(size)
        assert second.ctypes.data != address
        del kept, second
        assert address in [buffer.ctypes.data for buffer in (take(size), take(size))]


def test_each_thread_has_its_own_buffers() -> None:
    """A thread never unpacks into what another one keeps, though nobody views that any more."""
    addresses: list[int] = []
    mine = take(5 << 20).ctypes.data
    thread = threading.Thread(target=lambda: addresses.append(take(5 << 20).ctypes.data))
    thread.start()
    thread.join()
    assert addresses != [mine]
    assert take(5 << 20).ctypes.data == mine


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of ever other sizes leave no more than KEPT_BYTES behind."""
    monkeypatch.setattr(gunzip, "KEPT_BYTES", 40 << 20)
    monkeypatch.setattr(gunzip, "_KEPT", gunzip._Kept())
    for megabytes in (2, 5, 11, 23, 37, 3, 17):
        take(megabytes << 20)
    assert sum(buffer.size for buffer in gunzip._KEPT.buffers) <= 40 << 20
    assert len(gunzip._KEPT.buffers) > 1


def test_small_and_large_buffers_are_not_mistaken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A label does not sit in a buffer of an image's size, where it would pin it."""
    monkeypatch.setattr(gunzip, "_KEPT", gunzip._Kept())
    large = take(64 << 20).ctypes.data
    assert take(4 << 20).ctypes.data != large
    assert take(40 << 20).ctypes.data == large
