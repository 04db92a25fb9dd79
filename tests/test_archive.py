"""A tar from a stranger: plain files by plain names come out, all else is refused by name, damage is never the end."""

import gzip
import io
import os
import random
import tarfile
import time
from collections.abc import Callable
from typing import Any

import pytest

from raytrain_brats.data import archive
from raytrain_brats.data.archive import ArchiveError, Member

MEMBERS = {"T/imagesTr/a.nii.gz": os.urandom(1500), "T/dataset.json": b"{}", "T/empty": b"", "T/x": b"x" * 512}


def make_tar(build: Callable[[tarfile.TarFile], Any] | None = None, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """MEMBERS, then what `build` adds."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as tar:
        tar.addfile(entry("T", tarfile.DIRTYPE))
        for name, content in MEMBERS.items():
            add(tar, name, content)
        if build:
            build(tar)
    return sink.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, **values: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for key, value in values.items():
        setattr(made, key, value)
    return made


def add(tar: tarfile.TarFile, name: str, content: bytes, **values: Any) -> None:
    tar.addfile(entry(name, size=len(content), **values), io.BytesIO(content))


def with_header(name: str, **fields: bytes) -> bytes:
    """A plain file's header with some fields set by hand, and a sum that fits."""
    block = bytearray(entry(name).tobuf(tarfile.USTAR_FORMAT))
    places = {"size": (124, 12), "type": (156, 1), "name": (0, 100), "mode": (100, 8), "magic": (257, 8)}
    for key, value in fields.items():
        start, length = places[key]
        block[start : start + length] = value.ljust(length, b"\0")
    return summed(block)


def summed(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def listed(tar: bytes, start: int = 0) -> list[Member]:
    def read(offset: int, size: int) -> bytes:
        return tar[offset : offset + size]

    return list(archive.members(read, read, len(tar), start))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_plain_files_come_in_order_and_from_any_member_on(form: int) -> None:
    """Of every format, with the records that macOS and long names add; `end` of one is where a resume begins."""

    def build(tar: tarfile.TarFile) -> None:
        add(tar, "T/._y", b"", pax_headers={"LIBARCHIVE.xattr.com.apple": "A" * 2000, "mtime": "1.5"})
        add(tar, f"T/{'n' * 90}/{'m' * 120}" if form != tarfile.USTAR_FORMAT else "T/n", b"long", mode=0o6777)

    tar = make_tar(build, form)
    found = listed(tar)
    assert [tar[m.offset : m.offset + m.size] for m in found] == [*MEMBERS.values(), b"", b"long"]
    assert [m.name for m in found][:5] == [*MEMBERS, "T/._y"]
    for number, member in enumerate(found):
        assert listed(tar, member.end) == found[number + 1 :]


HOSTILE: dict[str, tuple[Callable[[tarfile.TarFile], Any], str]] = {
    "parent": (lambda t: add(t, "../evil", b"x"), "points out of"),
    "parent within": (lambda t: add(t, "T/imagesTr/../../evil", b"x"), "points out of"),
    "parent folder": (lambda t: t.addfile(entry("T/..", tarfile.DIRTYPE)), "points out of"),
    "absolute": (lambda t: add(t, "/tmp/evil", b"x"), "points out of"),
    "symbolic link": (lambda t: t.addfile(entry("T/l", tarfile.SYMTYPE, linkname="/etc")), "is a symbolic link"),
    "hard link": (lambda t: t.addfile(entry("T/l", tarfile.LNKTYPE, linkname="../../x")), "is a hard link"),
    "hard link with content": (
        lambda t: t.addfile(entry("T/l", tarfile.LNKTYPE, linkname="T/x", size=4), io.BytesIO(b"1234")),
        "is a hard link",
    ),
    "device": (lambda t: t.addfile(entry("T/d", tarfile.CHRTYPE, devmajor=1, devminor=3)), "is a device"),
    "block device": (lambda t: t.addfile(entry("T/d", tarfile.BLKTYPE)), "is a device"),
    "pipe": (lambda t: t.addfile(entry("T/p", tarfile.FIFOTYPE)), "is a pipe"),
    "contiguous": (lambda t: t.addfile(entry("T/c", tarfile.CONTTYPE)), "unknown kind"),
    "volume name": (lambda t: t.fileobj.write(with_header("T/v", type=b"V")), "unknown kind"),
    "sparse": (lambda t: t.fileobj.write(with_header("T/s", type=b"S", magic=b"ustar  ")), "is a sparse file"),
    "oversize": (lambda t: t.fileobj.write(with_header("T/big", size=b"00700000000")), "more than the 67,108,864"),
    "oversize base 256": (
        lambda t: t.fileobj.write(with_header("T/big", size=b"\x80" + (1 << 60).to_bytes(11, "big"))),
        "more than the 67,108,864",
    ),
    "negative size": (lambda t: t.fileobj.write(with_header("T/n", size=b"\xff" * 12)), "allowed|damaged"),
    "size that is no number": (lambda t: t.fileobj.write(with_header("T/n", size=b"zzzzzzzzzzz")), "is damaged"),
    "long name bomb": (lambda t: t.fileobj.write(with_header("T/n", type=b"L", size=b"00700000000")), "65,536 allowed"),
    "pax bomb": (lambda t: t.fileobj.write(with_header("T/n", type=b"x", size=b"00700000000")), "65,536 allowed"),
    "content beyond the end": (
        lambda t: t.fileobj.write(with_header("T/n", size=b"00000100000")),
        "cut off in the mid",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_data_set_needs_is_refused_by_name(kind: str) -> None:
    """What stood before it has come out; nothing after it does."""
    build, told = HOSTILE[kind]
    tar = make_tar(lambda t: (build(t), add(t, "T/after", b"x")))
    found = archive.members(lambda o, n: tar[o : o + n], lambda o, n: tar[o : o + n], len(tar))
    assert [next(found).name for _ in MEMBERS] == list(MEMBERS)
    with pytest.raises(ArchiveError, match=told):
        next(found)


@pytest.mark.parametrize("record", ["size", "GNU.sparse.major", "GNU.sparse.realsize"])
def test_extended_headers_cannot_change_a_files_content(record: str) -> None:
    """A record that tarfile would obey and we would not: two readers must not see two archives."""
    tar = make_tar(lambda t: add(t, "T/x2", b"x", pax_headers={record: "1"}), tarfile.PAX_FORMAT)
    with pytest.raises(ArchiveError, match="another size"):
        listed(tar)


def test_a_million_entries_end_at_the_cap() -> None:
    """Whether of plain files, folders or records; in seconds, and with no more read than the cap."""
    for header in (with_header("T/x"), with_header("T", type=b"5"), with_header("T", type=b"g")):
        asked = [0]

        def read(_: int, size: int, header: bytes = header, asked: list[int] = asked) -> bytes:
            asked[0] += 1
            return header[:size]

        began = time.process_time()
        with pytest.raises(ArchiveError, match="more than 20,000 entries"):
            list(archive.members(read, read, 1_000_000 * 512))
        assert asked[0] <= 3 * archive.MAX_HEADERS + 3 and time.process_time() - began < 10


def test_damage_is_never_taken_for_the_end() -> None:
    """Every bit of a header counts, every cut is noticed, and so is what follows the end mark."""
    tar = make_tar()
    whole = listed(tar)
    for member in whole[1:]:
        for bit in random.Random(0).sample(range(512 * 8), 100):
            altered = bytearray(tar)
            altered[member.offset - 512 + bit // 8] ^= 1 << bit % 8
            with pytest.raises(ArchiveError, match=f"header at byte {member.offset - 512:,} is damaged"):
                listed(bytes(altered))
    for cut in range(0, whole[-1].end, 256):
        with pytest.raises(ArchiveError, match="cut off"):
            listed(tar[:cut])
    assert listed(tar[: whole[-1].end + 512]) == whole
    with pytest.raises(ArchiveError, match="something follows its end mark"):
        listed(tar + b"more")


def test_a_header_damaged_on_the_way_is_read_again() -> None:
    """Two reads that agree are believed, not one."""
    tar = make_tar()
    altered = bytes(tar[:5]) + b"\1" + tar[6:]

    def again(offset: int, size: int) -> bytes:
        return tar[offset : offset + size]

    assert list(archive.members(lambda o, n: altered[o : o + n], again, len(tar))) == listed(tar)
    with pytest.raises(ArchiveError, match="header at byte 0 is damaged"):
        listed(altered)


def test_mutants_with_fitting_sums_break_nothing() -> None:
    """5,000 headers of random fields: a refusal or members within the archive, never another exception."""
    dice, tar, refused = random.Random(0), make_tar(form=tarfile.PAX_FORMAT), 0
    for _ in range(5000):
        altered = bytearray(tar)
        for _ in range(dice.randint(1, 6)):
            altered[512 + dice.choice([*range(157), *range(257, 512)])] = dice.randrange(256)
        altered[512:1024] = summed(altered[512:1024])
        try:
            for member in listed(bytes(altered)):
                assert 0 <= member.offset <= member.offset + member.size <= member.end <= len(tar)
        except ArchiveError:
            refused += 1
    assert 500 < refused < 5000


def test_a_gz_is_held_against_its_own_checksum() -> None:
    """Any flipped bit but those of the header's unused fields, any cut, and what follows; several members are one."""
    content = random.Random(0).randbytes(3000) + bytes(3000)
    packed = gzip.compress(content, mtime=0)
    assert archive.unpacked_size(packed) == 6000
    assert archive.unpacked_size(packed + packed) == 12000
    for bit in range(10 * 8, len(packed) * 8, 37):
        altered = bytearray(packed)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArchiveError, match="gzip stream"):
            archive.unpacked_size(bytes(altered))
    for wrong in (packed[:-1], packed[:50], b"", packed + b"x", b"no gzip at all"):
        with pytest.raises(ArchiveError):
            archive.unpacked_size(wrong)


def test_a_bomb_ends_at_its_ratio() -> None:
    """80 MB of zeros in 80 kB are refused; the label of an empty volume, 300 to 1 but small, is not."""
    with pytest.raises(ArchiveError, match="bytes unpack to more than 67,108,864"):
        archive.unpacked_size(gzip.compress(bytes(80_000_000)))
    assert archive.unpacked_size(gzip.compress(bytes(9_000_000))) == 9_000_000
