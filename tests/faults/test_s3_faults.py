"""S3 that lies: what arrives is what was sent, or an error; spoilt answers are asked for again, and no others.

A real proxy spoils the answers of a real S3 server on this machine (`scripts/s3_proxy.py`).
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator

import boto3
import pytest
from botocore.config import Config

from raytrain_brats import s3, storage
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.store import Source
from scripts import s3_faults
from tests.support.proxies import FaultyProxy

CONTENT = os.urandom(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FAULTS = ("503", "reset", "truncated", "short", "flip", "trickle")


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """S3 by way of a proxy that spoils nothing yet. Objects: `summed` has a checksum stored, `plain` has an MD5 as its
    ETag, `parts` has neither."""
    bucket = s3_server.removeprefix("s3://")
    bare = boto3.client("s3", config=Config(request_checksum_calculation="when_required"))
    boto3.client("s3").put_object(Bucket=bucket, Key="summed", Body=CONTENT)
    bare.put_object(Bucket=bucket, Key="plain", Body=CONTENT)
    upload = {"Bucket": bucket, "Key": "parts", "UploadId": ""}
    upload["UploadId"] = bare.create_multipart_upload(Bucket=bucket, Key="parts")["UploadId"]
    part = bare.upload_part(**upload, PartNumber=1, Body=CONTENT)
    bare.complete_multipart_upload(**upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]})
    made = FaultyProxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    monkeypatch.setattr(s3, "FLOOR_WINDOW_S", 0.4)
    monkeypatch.delenv(s3.PATIENCE, raising=False)
    s3.client.cache_clear()
    yield made
    made.close()


READS: dict[str, tuple[Callable[[str], bytes], str, int]] = {  # how, what, requests when nothing goes wrong
    "checked": (lambda root: storage.read_checked([f"{root}/parts"], SHA256, len(CONTENT))[0], "parts", 1),
    "by the checksum stored": (lambda root: storage.read_bytes(f"{root}/summed"), "summed", 1),
    "by the ETag": (lambda root: storage.read_bytes(f"{root}/plain"), "plain", 1),
    "by a second read": (lambda root: storage.read_bytes(f"{root}/parts"), "parts", 3),
    "the tail": (lambda root: CONTENT[:-1000] + storage.read_tail(f"{root}/summed", 1000), "summed", 3),
}


@pytest.mark.parametrize("how", READS)
def test_a_spoilt_answer_is_asked_for_again(proxy: FaultyProxy, s3_server: str, how: str) -> None:
    """Every kind of fault, against every way in which a read knows what should have arrived."""
    read, _, usual = READS[how]
    assert read(s3_server) == CONTENT
    assert len(proxy.log) == usual
    for fault in FAULTS:
        proxy.log.clear()
        proxy.next = [fault]
        assert read(s3_server) == CONTENT, fault
        assert proxy.count(fault) == 1
        assert len(proxy.log) <= 2 * usual, f"{fault}: {proxy.log}"
    proxy.next = ["short", "short"]  # cut at the same place: two reads agree
    assert read(s3_server) == CONTENT
    assert proxy.count("short") == 2 and proxy.next == []


@pytest.mark.parametrize("how", READS)
def test_a_line_that_always_alters_is_an_error_not_a_changed_object(
    proxy: FaultyProxy, s3_server: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Each read comes with another bit flipped: the object is not blamed, and no wrong byte is handed on."""
    monkeypatch.setattr(s3, "HICCUP_S", 0.6)
    proxy.always = "flip"
    read, name, _ = READS[how]
    with pytest.raises(s3.OutageError, match=name):
        read(s3_server)


def test_a_changed_object_is_told_after_two_reads_that_agree(proxy: FaultyProxy, s3_server: str) -> None:
    """By its size or by its checksum, also when one of the reads is spoilt; on a local disk after one."""
    uri = f"{s3_server}/parts"
    for sha256, size, told in ((SHA256, 5, "300,000 bytes instead of 5"), ("0" * 64, 300_000, "another checksum")):
        for fault in ("", "503", "flip", "short"):
            proxy.log.clear()
            proxy.next = [fault] if fault else []
            with pytest.raises(storage.ChangedError, match=f"parts: {told}"):
                storage.read_checked([uri], sha256, size)
            assert len(proxy.log) <= {"": 3, "503": 4}.get(fault, 5)
    with pytest.raises(storage.ChangedError, match="parts: 300,000 bytes instead of 5"):
        storage.read_checked([uri], None, 5)


def test_a_case_is_not_refused_for_a_bit_flipped_on_the_way(proxy: FaultyProxy, s3_server: str) -> None:
    """By either route a spoilt read is repeated; `changed` is said of what is really otherwise in the bucket."""
    digest = hashlib.sha256(CONTENT * 2).hexdigest()
    raw = Case("x", "x", ("parts",), "plain", 2 * len(CONTENT), digest)
    stored = Case("x", "x", ("x",), None, 1, "1", object="parts", object_sha256=SHA256)
    source = Source(s3_server, "msd", 1.0)
    for case, verdict in ((raw, "gzip_damaged|not_nifti|size"), (stored, "not a store object")):
        for fault in FAULTS:
            proxy.next = [fault]
            with pytest.raises(
                InvalidCase, match=verdict
            ):  # the bytes got through to the decoder, which they are not for
                source.load(case)
    storage.write_bytes(f"{s3_server}/parts", CONTENT[::-1])
    for case in (raw, stored):
        with pytest.raises(InvalidCase, match="changed"):
            source.load(case)


def test_what_would_be_the_same_again_is_asked_once(
    proxy: FaultyProxy, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing object is no outage; and botocore adds no tries of its own to ours."""
    for call in (storage.read_bytes, lambda uri: storage.read_checked([uri], SHA256)):
        proxy.log.clear()
        with pytest.raises(FileNotFoundError):
            call(f"{s3_server}/nothing")
        assert len(proxy.log) == 1
    proxy.log.clear()
    proxy.next = ["503"] * 3
    assert storage.read_bytes(f"{s3_server}/plain") == CONTENT
    assert [asked.fault for asked in proxy.log] == ["503", "503", "503", ""]
    monkeypatch.setattr(s3, "HICCUP_S", 0)
    proxy.log.clear()
    proxy.always = "503"
    with pytest.raises(s3.OutageError, match="plain"):
        storage.read_bytes(f"{s3_server}/plain")
    assert len(proxy.log) == 1


def test_a_trickle_is_given_up_and_a_slow_body_is_not(
    proxy: FaultyProxy, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten bytes a second never time out; 200 kB a second are slow, but come to an end."""
    proxy.next = ["slow"]
    assert storage.read_bytes(f"{s3_server}/plain") == CONTENT
    assert len(proxy.log) == 1
    proxy.always = "trickle"
    monkeypatch.setattr(s3, "HICCUP_S", 0.5)
    began = time.monotonic()
    with pytest.raises(s3.OutageError, match=r"plain: only \d\d bytes a second"):
        storage.read_bytes(f"{s3_server}/plain")
    assert time.monotonic() - began < 60


def test_writes_get_through(proxy: FaultyProxy, s3_server: str) -> None:
    """Puts and swaps of lost and refused answers end once each."""
    for number, fault in enumerate(("503", "reset", "503", "reset", "reset")):
        proxy.next = [fault]
        storage.write_bytes(f"{s3_server}/new", CONTENT[:number])
        proxy.next = ["", "reset"]
        assert storage.swap(f"{s3_server}/swapped", str(number - 1).encode() if number else None, str(number).encode())
    assert storage.read_bytes(f"{s3_server}/new") == CONTENT[:4]


RAISED = {"503": 0.10, "reset": 0.04, "truncated": 0.04, "short": 0.04, "flip": 0.04}  # so that few requests have all


def test_whatever_is_read_is_what_was_written() -> None:
    """Indexed, prepared and loaded by both routes: no case differs, and few requests more than needed are made."""
    found = s3_faults.reads(12, RAISED, seed=1, epochs=4)
    assert set(found["faults"]) == set(s3_faults.WORDS.values())
    assert found["cases_loaded"] == 12 + 4 * 24 and found["cases_that_differ"] == 0
    assert 1 < found["request_amplification"] < 1.7


@pytest.mark.campaign
def test_a_whole_prepare_and_training_over_s3_that_lies() -> None:
    """On Ray, by both routes: the store and the losses are those of an undisturbed run, bit for bit."""
    found = s3_faults.measure(8, RAISED, seed=1)
    assert set(found["faults"]) == set(s3_faults.WORDS.values())
    assert found["objects_prepared"] == 8 and found["steps_trained"] == 12  # 6 cases x 4 patches in batches of 4, twice
    assert found["objects_that_differ"] == found["cases_set_aside"] == found["samples_without_weight"] == 0
    assert found["greatest_difference_of_a_loss"] == 0
    assert found["read_amplification"] < 1.7
