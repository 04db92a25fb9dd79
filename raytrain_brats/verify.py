"""Prove that a run applied every sample once, in order: `raytrain-brats verify --run-dir URI`.

In: a run folder; nothing else, least of all what the run remembers of its order.
Out: exit code 0 when every position was applied once, in order, with the very samples that the seed asks for; else 1
and the first row that differs. Also where the time went, by the run's events, which prove nothing.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

from raytrain_brats import books
from raytrain_brats.cli import Uri, entry, run_folder
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.sampler import Sampler, fingerprint
from raytrain_brats.errors import RunFailed
from raytrain_brats.reporting import goodput
from raytrain_brats.run import checkpoint, spec
from raytrain_brats.run.run_dir import RunDir


@dataclass(frozen=True)
class Args:
    """Derive every position's case and crop again from the seed, and compare with what the workers wrote down."""

    run_dir: Uri = ""
    """The run; by default RAYTRAIN_BRATS_RUN_DIR."""


def work(args: Args) -> None:
    run_dir = run_folder(args.run_dir)
    run = spec.open_run(run_dir)
    spec.check_order(run_dir, run)
    manifest = manifests.read(RunDir(run_dir).manifest)
    meant = spec.preprocessing(run.config), run.convention
    if not manifests.is_dataset_identity(run.dataset_identity, manifest.cases, *meant):
        raise RunFailed(f"{run_dir}/manifest.jsonl is not the data that config.yaml names ({run.dataset_identity})")
    cases, _ = manifest.split(run.config.data.fold)
    sampler, rows = spec.sampler_of(run.config, len(cases), run.earlier_epochs), books.read_rows(run_dir)
    for number, row in enumerate(rows):
        if wrong := difference(row, number, sampler, cases):
            raise RunFailed(f"{run_dir}/metrics, row {number + 1}: {wrong}")
    applied = rows[-1]["samples_seen"] if rows else 0
    found, damaged = checkpoint.newest_valid(run_dir)
    if damaged:
        raise RunFailed(f"checkpoint {damaged[0][0]}: {damaged[0][1]}")
    if found and found.samples_seen > applied:
        raise RunFailed(f"checkpoint {found.name} holds more samples than the {applied:,} of metrics/")
    groups, sizes = {row["generation"] for row in rows}, sorted({row["world_size"] for row in rows})
    print(
        f"{applied:,} of {sampler.total:,} positions applied in {len(rows):,} steps: each once, in order, with the "
        f"seed's own samples; {len(groups)} worker groups, of {', '.join(map(str, sizes))} workers"
    )
    if events := books.read_events(run_dir):
        print(time_line(goodput.time_breakdown(events, rows)))


def time_line(spent: goodput.TimeBreakdown) -> str:
    """Every cause that took time, in per cent of the wall time."""
    shares = [f"{cause} {seconds / spent.wall_s:.1%}" for cause, seconds in spent.parts().items() if seconds > 0]
    goodput = "not recorded" if math.isnan(spent.goodput) else f"{spent.goodput:.1%}"
    return f"goodput {goodput} (steps that were kept / time up); wall time {spent.wall_s:,.0f} s: {', '.join(shares)}"


def difference(row: dict[str, Any], step: int, sampler: Sampler, cases: tuple[Case, ...]) -> str:
    """What is wrong with the row of a step; an empty string when nothing is."""
    low, high = step * sampler.global_batch, (step + 1) * sampler.global_batch
    expected = {"step": step, "positions": [low, high], "samples_seen": high}
    if high > sampler.total:
        return f"the run ends at {sampler.total:,}"
    samples = [sampler.sample(position) for position in range(low, high)]
    ids = ["" if s.case is None else cases[s.case].id for s in samples]
    expected["samples"] = sum(fingerprint(s.position, i, s.seed) for s, i in zip(samples, ids, strict=True))
    wrong = [f"{key} is {row.get(key)}, the seed says {v}" for key, v in expected.items() if row.get(key) != v]
    return "; ".join(wrong)


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "verify", argv)


if __name__ == "__main__":
    sys.exit(main())
