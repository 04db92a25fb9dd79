"""Count what a whole tree of processes costs, from outside it (Linux's /proc).

In: the root's process id; points in time (time.monotonic, which all processes of a machine share).
Out: CPU seconds (user and system) by kind of process between two points, page faults, peak memory.

A process of its own reads the tree ten times a second, so neither its work nor anybody's forgetting to ask is counted
in; what a process spends in the last tenth before it ends is missed. Memory is PSS: pages that several processes share
(the object store, libraries) count once.
"""

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections import defaultdict
from pathlib import Path
from typing import Any

EVERY_S = 0.1
MEMORY_EVERY = 10
"""Reading PSS walks all pages of a process: not at every sample."""
_TICKS = os.sysconf("SC_CLK_TCK")


class Meter:
    """Reads the tree of the calling process while the `with` block lasts."""

    def __init__(self) -> None:
        self._samples: list[dict[str, Any]] = []

    def __enter__(self) -> "Meter":
        command = [sys.executable, "-S", str(Path(__file__)), str(os.getpid())]
        self._file = tempfile.TemporaryFile("w+")  # no pipe: it fills up, and the meter would stand
        self._process = subprocess.Popen(command, stdout=self._file, stdin=subprocess.PIPE)
        while not os.fstat(self._file.fileno()).st_size:  # its first look, which on a busy machine may take a while
            if self._process.poll() is not None:
                raise RuntimeError(f"the meter ended with exit code {self._process.returncode}")
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(b"end")  # a word: processes forked meanwhile keep a pipe from closing
        self._file.seek(0)
        self._samples = [json.loads(line) for line in self._file]
        self._file.close()

    def spent(self, begin: float, end: float, what: str = "cpu_s") -> dict[str, float]:
        """CPU seconds (or `faults`) by kind of process between two points in time, interpolated."""
        low, high = self._at(begin, what), self._at(end, what)
        spent = {kind: high[kind] - low.get(kind, 0.0) for kind in high}
        return {kind: round(value, 3) for kind, value in sorted(spent.items(), key=lambda s: -s[1]) if value > 0}

    def peak_mb(self) -> dict[str, float]:
        """Memory of the tree by kind of process when it was largest in all."""
        return max((s["pss_mb"] for s in self._samples if "pss_mb" in s), key=lambda m: sum(m.values()), default={})

    def _at(self, moment: float, what: str) -> dict[str, float]:
        times = [sample["time"] for sample in self._samples]
        right = min(max(1, bisect_left(times, moment)), len(times) - 1)
        before, after = self._samples[right - 1], self._samples[right]
        share = min(1.0, max(0.0, (moment - before["time"]) / (after["time"] - before["time"])))
        old, new = before[what], after[what]  # a kind seen once is there for ever
        return {kind: old.get(kind, 0.0) + share * (new[kind] - old.get(kind, 0.0)) for kind in new}


def _tree(root: int) -> dict[int, list[str]]:
    """The fields of /proc/PID/stat after the name, of the root and all below it, but this process."""
    stats: dict[int, list[str]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                stats[int(entry)] = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
    tree, found = {}, [root]
    while found:
        pid = found.pop()
        if pid in stats:
            tree[pid] = stats[pid]
            found += [child for child, fields in stats.items() if int(fields[1]) == pid]
    return tree


def _kind(pid: int, root: int) -> str:
    """What a process is, in a word: Ray's processes say it in their title."""
    if pid == root:
        return "driver"
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
    if ray := re.match(r"ray::(\w+)", words):
        return ray[1]
    for known in (
        "gcs_server",
        "raylet/raylet",
        "dashboard/agent",
        "runtime_env/agent",
        "default_worker",
        "log_monitor",
    ):
        if known in words:
            return known.rpartition("/")[2]
    return "worker" if "python" in words else Path(words.split(" ")[0] or "other").name


def _pss_mb(pid: int) -> float:
    try:
        found = re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    except OSError:
        return 0.0
    return int(found[1]) / 1e3 if found else 0.0


def _watch(root: int) -> None:
    """Print samples until something is said or the root is gone; one more at the end, two at least."""
    last: dict[tuple[int, str], tuple[float, float]] = {}
    cpu_s, faults = defaultdict[str, float](float), defaultdict[str, float](float)
    number, ending = 0, False
    while os.path.exists(f"/proc/{root}"):
        sample: dict[str, Any] = {"time": time.monotonic()}
        memory = defaultdict[str, float](float)
        for pid, fields in _tree(root).items():
            kind = _kind(pid, root)
            now = ((int(fields[11]) + int(fields[12])) / _TICKS, float(fields[7]))
            before = last.get((pid, fields[19]), now if number == 0 else (0.0, 0.0))
            cpu_s[kind] += now[0] - before[0]
            faults[kind] += now[1] - before[1]
            last[pid, fields[19]] = now
            if number % MEMORY_EVERY == 0:
                memory[kind] += _pss_mb(pid)
        sample |= {"cpu_s": cpu_s, "faults": faults} | ({"pss_mb": memory} if memory else {})
        print(json.dumps(sample), flush=True)
        number += 1
        if ending:
            return
        ending = bool(select.select([0], [], [], EVERY_S)[0])


if __name__ == "__main__":
    _watch(int(sys.argv[1]))
