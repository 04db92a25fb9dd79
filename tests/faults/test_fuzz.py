"""A slice of the campaign of mutants, small enough for every day; `scripts/fuzz` is the whole of it.

And what the campaign itself is worth: it finds every check that is taken away, and its second reader is right.
"""

import gzip
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from raytrain_brats.data import gunzip, nifti
from scripts import fuzz
from scripts.fuzz_files import good, read
from scripts.fuzz_mutants import DAMAGE, FAULTS, LABELS, mutant


def test_mutants_are_refused_or_sound_and_good_files_are_not_refused(tmp_path: Path) -> None:
    """20,000 mutants and 500 good files, all families, through the command itself."""
    assert fuzz.main(["--mutants", "20000", "--seed", "2", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "fuzz.md").read_text()
    assert "| mutants | 20,000 |" in text
    assert "| good files refused | 0 |" in text
    assert all(f"| {reason} | " in text for reason in set(nifti.REASONS) - {"missing", "changed", "range"})


@pytest.mark.campaign
def test_the_whole_campaign_with_another_seed(tmp_path: Path) -> None:
    """105,000 mutants other than those of docs/benchmarks/fuzz.md."""
    assert fuzz.main(["--seed", "3", "--out", str(tmp_path)]) == 0


def _unchecked(content: bytes, wanted: int) -> Any:
    """Gzip as nibabel reads it: as much as is wanted, never the end."""
    found = b""
    for piece in gunzip._pieces(content):
        found += piece
        if len(found) >= wanted:
            return np.frombuffer(found[:wanted], np.uint8)
    raise gunzip.WrongLength("")


def _only_first(real: Callable[..., bool]) -> Callable[..., bool]:
    """libdeflate told to stop after the first member, and its word taken."""

    def first(content: bytes, whole: Any) -> bool:
        return any(real(content[:end], whole) for end in range(len(content), max(18, len(content) - 60), -1))

    return first


TAKEN_AWAY = {
    "extensions": (nifti, "_check_extensions", lambda *_: None),
    "shape and affine of the label": (nifti, "_same_grid", lambda *_: None),
    "label values": (nifti, "_label", lambda array, allowed: array.astype(np.uint8)),
    "end of the stream": (gunzip, "unpack", _unchecked),
    "what follows the stream": (gunzip, "_by_libdeflate", _only_first(gunzip._by_libdeflate)),
    "singular affines": (nifti.np.linalg, "det", lambda _: 1.0),
    "bounds of an image": (nifti.math, "isfinite", lambda _: True),
}


@pytest.mark.parametrize("name", TAKEN_AWAY)
def test_a_check_taken_away_is_missed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the campaign would pass a decoder that had lost it."""
    monkeypatch.setattr(*TAKEN_AWAY[name])
    assert fuzz.run((1, "fault", range(600)))["failures"]


def test_the_same_number_is_the_same_mutant_and_every_fault_is_drawn() -> None:
    """A finding can be repeated from its seed and number; no named fault is dead code."""
    first, again = ([mutant(5, number, "fault") for number in range(800)] for _ in range(2))
    assert [(m.image, m.label) for m in first] == [(m.image, m.label) for m in again]
    assert {m.name for m in first} == {*FAULTS, *DAMAGE, *LABELS}


def test_the_second_reader_agrees_with_nibabel_on_good_files() -> None:
    """300 good files: no faults, nibabel's voxels (rounded once where scaled) and affine."""
    for number in range(300):
        file = good(random.Random(number))
        peer, reading = nib.Nifti1Image.from_bytes(file.plain), read(file.plain)
        assert reading.faults == []
        expected = np.asarray(peer.dataobj, np.float64).reshape(*peer.shape[:3], 4)
        assert np.array_equal(reading.voxels_xyzc, expected) or np.array_equal(
            reading.voxels_xyzc, expected.astype(np.float32)
        )
        assert np.allclose(reading.affine, peer.affine, atol=5e-3)  # half turns: a square root near 0
        assert np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(file.label)).dataobj).max() <= 3


def test_a_finding_is_reported_with_the_command_that_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A crash of the decoder fails the campaign, by name and number, and `--only` shows it again."""

    def crash(*_: Any) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr(nifti, "_check_extensions", crash)
    options = ["--mutants", "40", "--good", "4", "--jobs", "1", "--seed", "9", "--out", str(tmp_path)]
    assert fuzz.main(options) == 1
    assert "not a refusal" in capsys.readouterr().err
    assert fuzz.main(["--seed", "9", "--only", "0", "--family", "good"]) == 1
    assert "IndexError: out of range" in capsys.readouterr().out
    assert "**FAILED**" in (tmp_path / "fuzz.md").read_text()
