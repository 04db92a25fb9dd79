"""Which checkpoint scored best, which one is kept as the best, and when a run gains no more. No network is trained."""

import time
from pathlib import Path

import pytest
import torch

from raytrain_brats import storage
from raytrain_brats.errors import UserError
from raytrain_brats.labels import REGIONS
from raytrain_brats.run import checkpoint, gains
from raytrain_brats.run.gains import Scored
from raytrain_brats.run.run_dir import RunDir
from tests.support.run_folders import checkpoints, validation


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gains, "READ_AGAIN_S", 0.0)


def save(run: Path, seen: int, generation: int = 1) -> str:
    state = {"samples_seen": seen, "bad_in_epoch": 0}
    return checkpoint.save(str(run), seen, generation, {"a": torch.ones(2)}, state).name


def keeper(run: Path, told: list[str] | None = None) -> gains.Keeper:
    """As a worker group has it; what it tells goes to `told`."""
    said = [] if told is None else told
    return gains.Keeper(str(run), lambda name, why: said.append(f"{name}: {why}"), said.append)


def damage(run: Path, seen: int) -> None:
    (run / "checkpoints" / f"{seen:012d}-g0001" / "tensors.safetensors").write_bytes(b"x")


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path: Path) -> None:
    """Whatever `keep` says, until a better one comes; of equal ones the first; one that was not validated never."""
    for number, dice in enumerate((0.5, 0.8, 0.8, None, 0.7, 0.9, 0.2, 0.3), 1):
        seen = 4 * number
        save(tmp_path, seen)
        if dice is not None:
            validation(tmp_path, seen, dice)
        checkpoint.prune(str(tmp_path), 2, 1, 0, keeper(tmp_path))
        best = {1: 4, 6: 24, 7: 24, 8: 24}.get(number, 8)
        assert checkpoints(tmp_path) == sorted({best, *range(max(4, seen - 4), seen + 1, 4)})
        assert gains.best_valid(str(tmp_path)).samples_seen == best


def test_a_best_checkpoint_that_is_damaged_leaves_its_place_to_the_next(tmp_path: Path) -> None:
    """By score, not by age; without any that was validated a person is told what to do."""
    for seen, dice in ((4, 0.6), (8, 0.9), (12, 0.5)):
        save(tmp_path, seen)
        validation(tmp_path, seen, dice)
    (tmp_path / "checkpoints" / f"{8:012d}-g0001" / "tensors.safetensors").write_bytes(b"x")
    assert gains.best_valid(str(tmp_path)).samples_seen == 4
    with pytest.raises(UserError, match="leave --best out, or train with"):
        gains.best_valid(str(tmp_path / "other"))


def test_nothing_is_removed_while_scores_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage is no reason to take the best checkpoint for one that was never validated."""
    for seen in (4, 8, 12):
        save(tmp_path, seen)
        validation(tmp_path, seen, 0.9 if seen == 4 else 0.1)
    read = storage.read_bytes

    def away(uri: str) -> bytes:
        if uri.endswith(".csv"):
            raise OSError("the storage does not answer")
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", away)
    with pytest.raises(OSError, match="does not answer"):
        checkpoint.prune(str(tmp_path), 2, 1, 0, keeper(tmp_path))
    assert checkpoints(tmp_path) == [4, 8, 12]


def scores(*values: float) -> list[Scored]:
    return [Scored(10 * n, tuple((r, value) for r in REGIONS), frozenset("ab")) for n, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("found", "seen", "stops"),
    [
        (scores(0.5, 0.6, 0.6, 0.6), 40, True),
        (scores(0.5, 0.6, 0.6), 30, False),
        (scores(0.5, 0.6, 0.6, 0.61), 40, False),
        (scores(0.5, 0.6, 0.6, 0.6), 36, False),  # the last validation was of a group that is gone
        (scores(0.5, 0.4, 0.3), 30, True),
        ([], 40, False),
    ],
)
def test_patience_counts_samples_since_the_best_validation(found: list[Scored], seen: int, stops: bool) -> None:
    """20 samples; only validations up to where the run stands count, and only more Dice is a gain."""
    assert bool(gains.stalled(found, seen, 20)) == stops
    assert gains.stalled(found, seen, None) == ""


def test_means_over_other_cases_do_not_compare() -> None:
    """Four easy cases at first, all of them later: no reason to end, nor to keep the first checkpoint as the best."""
    few = Scored(10, tuple((r, 0.9) for r in REGIONS), frozenset("a"))
    more = [Scored(10 * n, tuple((r, 0.5 + n / 100) for r in REGIONS), frozenset("ab")) for n in range(2, 8)]
    assert gains.stalled([few, *more], 70, 20) == ""
    assert gains.stalled([few, *more], 10, 20) == ""
    worse = [Scored(each.samples_seen, tuple((r, 1 - v) for r, v in each.dice), each.cases) for each in more]
    assert gains.stalled([few, *worse], 70, 20)


def test_a_damaged_best_checkpoint_gives_way_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not kept for ever: the next best is, of those that are there; found when first chosen, and within the
    hour."""
    told: list[str] = []
    for seen, dice in ((4, 0.6), (8, 0.9), (12, 0.7), (16, 0.5), (20, 0.4)):
        save(tmp_path, seen)
        validation(tmp_path, seen, dice)
    damage(tmp_path, 8)
    keep = keeper(tmp_path, told)
    checkpoint.prune(str(tmp_path), 2, 1, 0, keep)
    assert checkpoints(tmp_path) == [12, 16, 20]
    assert told == [f"{8:012d}-g0001: tensors.safetensors differs from its checksum"]
    damage(tmp_path, 12)
    checkpoint.prune(str(tmp_path), 2, 1, 0, keep)
    assert checkpoints(tmp_path) == [12, 16, 20], "it was read whole a moment ago"
    clock = time.monotonic() + gains.WHOLE_S
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    for _ in range(2):
        checkpoint.prune(str(tmp_path), 2, 1, 0, keep)
    assert checkpoints(tmp_path) == [16, 20] and len(told) == 2


def test_one_bad_read_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of its bytes nor of its table: what came garbled is read again."""
    for seen, dice in ((4, 0.9), (8, 0.2), (12, 0.1)):
        save(tmp_path, seen)
        validation(tmp_path, seen, dice)
    read, garbled = storage.read_bytes, set[str]()

    def once(uri: str) -> bytes:
        if uri.endswith((".csv", ".safetensors")) and uri not in garbled:
            garbled.add(uri)
            return b"\xff" + read(uri)[:40]
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", once)
    told: list[str] = []
    checkpoint.prune(str(tmp_path), 2, 1, 0, keeper(tmp_path, told))
    assert checkpoints(tmp_path) == [4, 8, 12] and len(garbled) == 4 and told == []


@pytest.mark.parametrize(
    "content", [b"", b"case,dice_WT,dice_TC,dice_ET\n", b"\xff\x00", b"case,dice_WT,dice_TC,dice_ET\na,0.5,x,0.1\n",
                b"case,dice_WT,dice_TC,dice_ET\na,0.5,nan,0.1\n", b"case,dice_WT\na,0.5\n", b"\x00,\x00\n\x00"],
)  # fmt: skip
def test_a_damaged_table_is_no_missing_one(tmp_path: Path, content: bytes) -> None:
    """Its checkpoint might be the best: whoever asks for scores is told which file; a run that trains warns, once, and
    keeps the best of the others."""
    for seen, dice in ((4, 0.9), (8, 0.7), (12, 0.2), (16, 0.1)):
        save(tmp_path, seen)
        validation(tmp_path, seen, dice)
    where = RunDir(str(tmp_path)).validation(4)
    Path(where).write_bytes(content)
    for ask in (gains.history, gains.best_valid):
        with pytest.raises(UserError, match=f"{where} .*restore it, or remove it"):
            ask(str(tmp_path))
    told: list[str] = []
    keep = keeper(tmp_path, told)
    for _ in range(2):
        checkpoint.prune(str(tmp_path), 2, 1, 0, keep)
    assert checkpoints(tmp_path) == [8, 12, 16] and len(told) == 1 and where in told[0]
    Path(where).unlink()
    assert gains.best_valid(str(tmp_path)).samples_seen == 8
    assert gains.scored(str(tmp_path), 4) is None
