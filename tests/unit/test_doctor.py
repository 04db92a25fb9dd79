"""`doctor`: what a machine tells of itself is judged, each finding with its remedy; places are tried for real."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytrain_brats import doctor, s3, storage
from raytrain_brats.doctor import Args, Finding, Machine
from raytrain_brats.errors import UserError
from raytrain_brats.learn import convolution_check

VERSIONS = {"ray": "2.60.0", "torch": "2.13.0", "raytrain_brats": "0.1.0"}
GOOD = Machine("node", "3.11.7", VERSIONS, [], 16, 64 * 10**9, 32 * 10**9, 1_048_576, 1000.0)


def wrongs(findings: Any) -> list[str]:
    return [one.wrong for one in findings if one.wrong]


def test_a_sound_machine_has_no_finding() -> None:
    assert wrongs(doctor.judge(GOOD, GOOD, True, 1000.5)) == wrongs(doctor.judge(GOOD, GOOD, False, 0.0)) == []


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"python": "3.10.4"}, "Python 3.11 or later is needed"),
        ({"python": "3.12.1"}, "Python 3.12.1, here 3.11.7; install the same on all machines"),
        ({"versions": VERSIONS | {"ray": "2.59.0"}}, "ray 2.59.0, here 2.60.0; install the same"),
        ({"versions": {}}, "torch missing, here 2.13.0"),
        ({"unfit": ["scipy is missing (asked for: >=1.11)"]}, "scipy is missing"),
        ({"shared_bytes": 64 * 10**6}, "remount,size=20G"),
        ({"open_files": 20_000}, "ulimit -n 65536"),
        ({"time": 1020.0}, "set the clocks by NTP"),
        (
            {"card_faults": ["V100, sm_70: this torch was built for sm_80 only; install torch 2.8.0"]},
            "install torch 2.8.0",
        ),
    ],
)
def test_what_is_wrong_says_what_to_do(change: dict[str, Any], remedy: str) -> None:
    """One fault, one finding, with the remedy in it."""
    (told,) = wrongs(doctor.judge(replace(GOOD, **change), GOOD, True, 1000.0))
    assert remedy in told


def test_a_card_that_torch_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A V100 beside a torch of CUDA 13, as far as a machine without it can show."""
    card = convolution_check.Card("V100", (7, 0), ("sm_75", "sm_80"), "2.13.0", 91500)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(convolution_check, "card_of", lambda device: card)
    (fault,) = doctor._cards(16)[1]
    assert "sm_75, sm_80 only" in fault and "torch 2.8.0" in fault


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    (fault,) = doctor._cards(16)[1]
    assert "sees none of this machine's NVIDIA GPUs" in fault and "nvidia-smi" in fault


def test_this_machine_looks_at_itself() -> None:
    """Real versions, memory and limits; the packages fit, as the tests run with them."""
    found = Machine(**doctor.look())
    assert found.versions["ray"].startswith("2.60.") and found.unfit == [] and found.memory_bytes > 10**9
    assert abs(found.time - time.time()) < 5


def test_rights_on_s3_are_tried_one_by_one(s3_server: str) -> None:
    """A bucket that is there passes, and keeps nothing; one that is not names the right that was wanted."""
    s3.put(f"{s3_server}/data/a.nii.gz", b"x")
    places = [
        *doctor.of_place("run folder", f"{s3_server}/runs", True),
        *doctor.of_place("data", f"{s3_server}/data", False),
    ]
    assert wrongs(places) == [] and list(s3.list_below(s3_server)) == ["data/a.nii.gz"]
    put, _ = wrongs(doctor.of_place("run folder", "s3://no-such-bucket/runs", True))
    assert "s3:PutObject" in put
    assert "does not exist" in wrongs(doctor.of_place("data", f"{s3_server}/empty", False))[0]


def test_rights_that_are_missing_are_named(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A role that may write but not delete, and an S3 that ignores conditions: the first would fail after an hour."""

    def forbidden(uri: str) -> None:
        raise UserError(f"{uri}: S3 answers AccessDenied")

    put = s3.put
    with monkeypatch.context() as patch:
        patch.setattr(s3, "put", lambda uri, content, **_: put(uri, content))
        assert "ignores If-None-Match" in wrongs(doctor.of_place("run folder", f"{s3_server}/runs", True))[0]
    monkeypatch.setattr(s3, "delete", forbidden)
    assert "s3:DeleteObject" in wrongs(doctor.of_place("run folder", f"{s3_server}/runs", True))[0]


def test_a_clock_that_is_off_is_told_by_s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour ahead of the server's Date."""
    now = time.time
    monkeypatch.setattr(doctor, "time", SimpleNamespace(time=lambda: now() + 3600))
    with pytest.raises(UserError, match=r"clock is \+3[56]\d\d s from S3's; set it by NTP"):
        doctor._try_clock(f"{s3_server}/runs")


def test_room_for_run_and_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with less than the run or the data set weighs; nothing is made of a folder that is not there yet."""
    storage.write_bytes(str(tmp_path / "data" / "a.nii.gz"), b"x" * 1000)
    args = Args(run_dir=str(tmp_path / "r"), data=str(tmp_path / "data"), store=str(tmp_path / "s"))
    assert wrongs(doctor.of_room(args)) == [] and not (tmp_path / "r").exists()
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    assert len(wrongs(doctor.of_room(args))) == 2


def test_a_local_place_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert wrongs(doctor.of_place("run folder", str(tmp_path / "run"), True)) == [] and not (tmp_path / "run").exists()
    assert "cannot write" in wrongs(doctor.of_place("run folder", str(tmp_path / "file" / "run"), True))[0]


def test_the_exit_code_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """0 with all well; 1 with a finding, which is a line that begins with `wrong`."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    for name in ("RUN_DIR", "STORE", "DATA"):
        monkeypatch.delenv(f"RAYTRAIN_BRATS_{name}", raising=False)
    monkeypatch.setattr(doctor, "look", lambda: vars(GOOD))
    assert doctor.main([]) == 0
    monkeypatch.setattr(doctor, "judge", lambda *_: iter([Finding("clock", "mend it")]))
    capsys.readouterr()
    assert doctor.main([]) == 1
    assert "wrong  clock: mend it" in capsys.readouterr().out
