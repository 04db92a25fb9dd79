"""Break it on purpose, by a seed: `scripts/chaos core|ray|goodput|controls|bits|storm|all`.

In: which sections, how much of each, a seed.
Out: chaos.json and chaos.md in `--out`; exit code 1 on any violation, on a control that is not found, and when the
kills missed what they were to hit. The draws follow the seed; the moments are real time and differ from run to run.
"""

import argparse
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.chaos_campaign import outcome

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("core", "ray", "goodput", "controls", "bits", "storm")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("sections", nargs="+", choices=(*SECTIONS, "all"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=1000, help="of core")
    parser.add_argument("--flips", type=int, default=10_000, help="of bits")
    parser.add_argument("--changes", type=int, default=48, help="of storm")
    parser.add_argument("--goodput-minutes", type=float, default=20.0, help="of goodput; a kill every ten")
    parser.add_argument("--ray-kills", type=int, default=50, help="of ray")
    parser.add_argument("--sizes", type=int, nargs="+", default=range(1, 9), help="of storm: numbers of workers")
    parser.add_argument("--control", action="append", help="only this one; may be repeated")
    parser.add_argument("--minutes", type=float, default=120.0, help="core stops (and fails) when it takes longer")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--scratch", type=Path, help="where the runs go; kept, else a temporary folder")
    options = parser.parse_intermixed_args(argv)
    scratch = options.scratch or Path(tempfile.mkdtemp(prefix="chaos-"))
    failed = False
    command = shlex.join(["scripts/chaos", *(sys.argv[1:] if argv is None else argv)])
    for name in SECTIONS if "all" in options.sections else options.sections:
        folder = scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        work = run_section(name, folder, options, progress(name))
        entry = outcome.measured(command, options.seed, work)
        outcome.write(options.out, {name: entry})
        print(f"{name}: {'passed' if entry['passed'] else 'FAILED'} in {entry['duration_s']} s; {entry['figures']}")
        for failure in entry["failures"]:
            print(f"  {failure}", file=sys.stderr)
        failed |= not entry["passed"]
    if not options.scratch and not failed:
        shutil.rmtree(scratch, ignore_errors=True)
    elif failed:
        print(f"the runs are left in {scratch}", file=sys.stderr)
    return int(failed)


def run_section(
    name: str, folder: Path, options: argparse.Namespace, told: Callable[[int, int, str], None]
) -> Callable[[], dict[str, Any]]:
    """What measures a section. Imported late: `--help` needs no torch."""
    if name == "core":
        from scripts.chaos_campaign import core

        return lambda: core.section(folder, options.seed, options.kills, options.minutes, told)
    if name in ("ray", "goodput"):
        from scripts.chaos_campaign import under_ray

        if name == "goodput":
            return lambda: under_ray.goodput(folder, options.seed, options.goodput_minutes, told)
        return lambda: under_ray.section(folder, options.seed, options.ray_kills, told)
    if name == "controls":
        from scripts.chaos_campaign import controls

        return lambda: controls.section(folder, options.seed, options.control, told)
    if name == "bits":
        from scripts.chaos_campaign import bits

        return lambda: bits.section(folder, options.seed, options.flips, told)
    from scripts.chaos_campaign import storm

    return lambda: storm.section(folder, options.seed, options.changes, told, tuple(options.sizes))


def progress(name: str) -> Callable[[int, int, str], None]:
    """A bar on a terminal; a plain line every 20 s else."""
    began, last = time.monotonic(), [time.monotonic()]

    def told(done: int, total: int, text: str) -> None:
        seconds = time.monotonic() - began
        line = f"{name}: {done:,} of {total:,}, {text}, {seconds:.0f} s"
        if sys.stdout.isatty():
            bar = "#" * (30 * done // max(1, total))
            print(f"\r[{bar:<30}] {line}\033[K", end="\n" if done >= total else "", flush=True)
        elif time.monotonic() - last[0] > 20 or done >= total:
            last[0] = time.monotonic()
            print(line, flush=True)

    return told


if __name__ == "__main__":
    sys.exit(main())
