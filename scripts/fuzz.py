"""Mutants of NIfTI files against the decoder, by a seed: `scripts/fuzz [--mutants N] [--only NUMBER]`.

In: how many mutants, a seed.
Out: fuzz.json and fuzz.md in `--out`; exit code 1 on any violation, each with the command that repeats it.

A mutant is refused, with a reason and the file at fault, or it is a sound file. Violations: any exception but Refused;
5 s of work; a named fault that is accepted, or given another reason or file; a good file refused, or one changed only
where the header says nothing to us; and an accepted mutant that is not exactly the voxels and the affine that the
standard sees in its bytes, read by `fuzz_files.read`, without faults, all of the gzip stream being sound by Python's
own reader.
"""

import argparse
import functools
import gzip
import json
import multiprocessing
import resource
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from raytrain_brats.data.nifti import InvalidCase, Volume, decode_case
from raytrain_brats.data.preprocess import preprocess
from scripts.chaos import progress
from scripts.chaos_campaign.outcome import measured
from scripts.fuzz_files import read
from scripts.fuzz_mutants import FAMILIES, LABELS, Mutant, mutant

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = (0, 1, 2, 3)
NAMES = ("image.nii", "label.nii")
HANG_S = 5.0
STEP = 500


class Hang(Exception):  # noqa: N818
    pass


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--mutants", type=int, default=105_000)
    parser.add_argument("--good", type=int, default=500, help="files that are no mutants")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this mutant alone, with what becomes of it")
    parser.add_argument("--family", choices=[*FAMILIES, "good"], help="for --only")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args(argv)
    if options.only is not None:
        verdict, about = judge(mutant(options.seed, options.only, options.family))
        print(f"{verdict}: {about}")
        return int(verdict == "violation")
    command = shlex.join(["scripts/fuzz", *(sys.argv[1:] if argv is None else argv)])
    work = functools.partial(campaign, options.seed, options.mutants, options.good, options.jobs)
    entry = measured(command, options.seed, work)
    write(options.out, entry)
    print(f"{'passed' if entry['passed'] else 'FAILED'} in {entry['duration_s']} s; {entry['figures']}")
    for failure in entry["failures"]:
        print(f"  {failure}", file=sys.stderr)
    return int(not entry["passed"])


def campaign(seed: int, mutants: int, good: int, jobs: int) -> dict[str, Any]:
    """Figures, tables and failures of so many mutants and good files."""
    steps: list[tuple[int, str | None, range]] = [
        (seed, "good", range(n, min(n + STEP, good))) for n in range(0, good, STEP)
    ]
    steps += [(seed, None, range(n, min(n + STEP, mutants))) for n in range(0, mutants, STEP)]
    if jobs == 1:
        return _summary(map(run, steps))
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return _summary(told(pool.imap_unordered(run, steps), len(steps)))


def told(parts: Iterable[dict[str, Any]], total: int) -> Iterable[dict[str, Any]]:
    tell = progress("fuzz")
    for number, part in enumerate(parts, 1):
        tell(number, total, f"{STEP} files each")
        yield part


def run(step: tuple[int, str | None, range]) -> dict[str, Any]:
    """Judge these numbers; counts, failures, the slowest, and the most memory of this process."""
    seed, family, numbers = step
    counts: Counter[tuple[str, str, str]] = Counter()
    failures, slowest_s = [], 0.0
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for number in numbers:
            case = mutant(seed, number, family)
            began = time.process_time()
            verdict, about = judge(case)
            slowest_s = max(slowest_s, time.process_time() - began)
            if verdict == "violation":
                again = f"scripts/fuzz --seed {seed} --only {number}" + (f" --family {family}" if family else "")
                failures.append(f"{case.family}, {case.name}: {about} (`{again}`)")
            counts[case.family, verdict, about.split(":")[0] if verdict == "refused" else ""] += 1
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"counts": counts, "failures": failures, "slowest_s": slowest_s, "peak_mb": peak_mb}


def judge(case: Mutant) -> tuple[str, str]:
    """("refused", reason: detail), ("same" or "other", ""), or ("violation", what)."""

    def stop(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)
    try:
        volume = decode_case([case.image], case.label, ALLOWED, NAMES)
        trouble = _prepared(case, volume)
    except InvalidCase as refusal:
        if case.family in ("good", "meaningless"):
            return "violation", f"a good file refused: {refusal}"
        if case.reasons and refusal.reason not in case.reasons:
            return "violation", f"reason {refusal}, not one of {case.reasons}"
        if refusal.file not in NAMES[int(case.name in LABELS) :] or not refusal.detail.startswith(refusal.file):
            return "violation", f"{refusal} names {refusal.file!r}"
        return "refused", f"{refusal.reason}: {refusal.detail}"
    except Hang:
        return "violation", f"more than {HANG_S} s of work"
    except Exception:  # noqa: BLE001 (which one it is, is the finding)
        return "violation", f"not a refusal: {traceback.format_exc(limit=-3)}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if case.reasons or trouble:
        return "violation", trouble or "a fault accepted in silence"
    return _compared(case, volume)


def _prepared(case: Mutant, volume: Volume) -> str:
    """What is wrong with preprocessing what was decoded; it may refuse by its own rules, but no good file as it is."""
    edges_mm = np.linalg.norm(volume.affine[:3, :3], axis=0)
    try:
        prepared = preprocess(volume, float(edges_mm.max()))
    except InvalidCase as refusal:
        unchanged = case.family in ("good", "meaningless") and np.ptp(edges_mm) < 1e-3
        return f"a good file refused by preprocessing: {refusal}" if unchanged else ""
    return "" if np.isfinite(prepared.image_czyx.astype(np.float64)).all() else "prepared voxels that are not finite"


def _compared(case: Mutant, volume: Volume) -> tuple[str, str]:
    """An accepted file against the standard's reading of it."""
    if case.image[:2] == b"\x1f\x8b":
        try:
            unpacked = gzip.decompress(case.image)
        except Exception as error:  # noqa: BLE001
            return "violation", f"accepted a gzip stream that Python does not: {error}"
        if unpacked != (case.plain or case.good.plain):
            return "violation", "accepted other bytes than were packed"
    reading = read(case.plain or case.good.plain)
    if reading.faults or reading.voxels_xyzc is None or reading.affine is None:
        return "violation", f"accepted with {reading.faults}"
    if not np.array_equal(volume.image_cxyz, np.moveaxis(reading.voxels_xyzc, 3, 0)):
        return "violation", "other voxels than the standard reads"
    if not np.allclose(volume.affine, reading.affine, rtol=1e-4, atol=5e-3):
        return "violation", f"affine {volume.affine.tolist()}, the standard reads {reading.affine.tolist()}"
    original = read(case.good.plain)
    assert original.affine is not None
    assert original.voxels_xyzc is not None
    same = np.array_equal(original.affine, reading.affine) and np.array_equal(original.voxels_xyzc, reading.voxels_xyzc)
    if case.family == "meaningless" and not same:
        return "violation", "a field that was taken for meaningless is not"
    return "same" if same else "other", ""


def _summary(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    counts: Counter[tuple[str, str, str]] = Counter()
    failures, slowest_s, peak_mb = [], 0.0, 0.0
    for part in parts:
        counts.update(part["counts"])
        failures += part["failures"]
        slowest_s, peak_mb = max(slowest_s, part["slowest_s"]), max(peak_mb, part["peak_mb"])

    def total(family: str, verdict: str | None = None) -> int:
        return sum(n for (f, v, _), n in counts.items() if f == family and verdict in (None, v))

    reasons: Counter[str] = Counter()
    for (_, _, reason), number in counts.items():
        reasons[reason] += number
    del reasons[""]
    figures = {
        "mutants": sum(map(total, FAMILIES)),
        "violations": len(failures),
        "good files": total("good"),
        "good files refused": total("good", "refused") + total("good", "violation"),
        "slowest, CPU s": round(slowest_s, 3),
        "memory of a process at most, MB": round(peak_mb),
    }
    families = [
        {"family": family, "mutants": total(family), "refused": total(family, "refused"),
         "accepted, content as before": total(family, "same"), "accepted, another valid file": total(family, "other"),
         "violations": total(family, "violation")}
        for family in FAMILIES
    ]  # fmt: skip
    given = [{"reason": reason, "mutants": number} for reason, number in reasons.most_common()]
    return {"figures": figures, "tables": {"By family:": families, "Reasons given:": given}, "failures": failures}


def write(folder: Path, entry: dict[str, Any]) -> None:
    """fuzz.json and fuzz.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fuzz.json").write_text(json.dumps(entry, indent=1) + "\n")
    lines = [
        "# Mutants of NIfTI files\n",
        "Made by `scripts/fuzz`, which says what counts as a violation; the same figures are in `fuzz.json`.\n",
        f"**{'passed' if entry['passed'] else 'FAILED'}** | `{entry['command']}` | seed {entry['seed']} | "
        f"{entry['date']} | {entry['duration_s']:,} s | {entry['machine']}, load average {entry['load_average'][0]} "
        f"at the start, {entry['load_average'][1]} at the end\n",
        "| figure | value |\n|---|---|",
        *(f"| {name} | {value:,} |" for name, value in entry["figures"].items()),
        "",
    ]
    for name, rows in entry["tables"].items():
        if rows:
            lines += [f"{name}\n", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
            lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows] + [""]
    lines += [f"- {failure}" for failure in entry["failures"][:20]]
    (folder / "fuzz.md").write_text("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
