"""What a run was made by, as a table: command, code, data, versions, hardware, hours, money.

In: a run's events and rows; its config.yaml.
Out: (name, value) in words; what no event says is left out.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def table(events: Sequence[Row], rows: Sequence[Row], about: Mapping[str, Any], up_s: float) -> list[tuple[str, str]]:
    """`about` is the content of config.yaml; `up_s` the seconds for which the run was up."""
    launches = [e for e in events if e["event"] == "launch"]
    last = launches[-1] if launches else {}
    workers = [e for e in events if e["event"] == "worker"]
    settings = about.get("config") if isinstance(about.get("config"), Mapping) else {}
    seed = (settings or {}).get("train", {}).get("seed")
    lines = [
        ("command", _each(e.get("command") for e in launches)),
        ("launches", str(len(launches)) if len(launches) > 1 else ""),
        ("recipe", str(last.get("recipe") or about.get("recipe") or "")),
        ("seed", "" if seed is None else str(seed)),
        ("data identity", str(last.get("dataset_identity") or about.get("identity") or "")),
        ("code", _each(_code(e) for e in launches)),
        ("folder", _each(_commit(e.get("folder")) for e in launches)),
        ("parts of one's own", _own(about.get("own_parts"))),
        ("versions", _each(_versions(e, workers) for e in launches)),
        ("devices", _counted(w.get("device") for w in _first_group(workers))),
        ("machines", _machines(workers, last)),
        ("peak GPU memory", _peak(events)),
        ("hours", _hours(rows, workers, up_s)),
        ("cost", _dollars(events)),
    ]
    return [(name, value) for name, value in lines if value]


def _each(values: Any) -> str:
    """Different ones, in order."""
    return "; then ".join(dict.fromkeys(value for value in values if value))


def _code(launch: Row) -> str:
    version, commit = launch.get("version"), _commit(launch.get("code"))
    return f"raytrain_brats {version}{', ' if commit else ''}{commit}" if version else commit


def _commit(found: Any) -> str:
    if not found:
        return ""
    return f"commit {found['commit'][:12]}{', with changes that are not committed' if found.get('dirty') else ''}"


def _own(found: Any) -> str:
    return "; ".join(f"{name} ({about['file']}, sha256 {about['sha256']})" for name, about in (found or {}).items())


def _versions(launch: Row, workers: Sequence[Row]) -> str:
    """The launch's, and CUDA and the driver as the workers that followed found them."""
    found = dict(launch.get("versions") or {})
    after = [w for w in workers if w["time"] >= launch["time"]]
    for name in ("cuda", "driver"):
        if values := dict.fromkeys(str(w[name]) for w in after if w.get(name)):
            found[name] = "/".join(values)
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _first_group(workers: Sequence[Row]) -> list[Row]:
    """The largest group's: what the run used at most."""
    by_group: dict[Any, list[Row]] = {}
    for worker in workers:
        by_group.setdefault(worker.get("generation"), []).append(worker)
    return max(by_group.values(), key=len, default=[])


def _counted(values: Any) -> str:
    times = Counter(str(value) for value in values if value)
    return ", ".join(f"{count} x {value}" for value, count in times.items())


def _machines(workers: Sequence[Row], launch: Row) -> str:
    """Hosts on which workers ran, by kind; the driver's where no worker says."""
    hosts = {w.get("host"): w["machine"] for w in workers if w.get("machine")}
    hosts = hosts or ({"": launch["machine"]} if launch.get("machine") else {})
    return _counted(_kind(machine) for machine in hosts.values())


def _kind(machine: Row) -> str:
    parts = [machine.get("kind"), machine.get("cpu"), f"{machine['cpus']} CPUs" if machine.get("cpus") else ""]
    parts += [f"{machine['memory_gb']:g} GB"] if machine.get("memory_gb") else []
    return ", ".join(str(part) for part in parts if part)


def _peak(events: Sequence[Row]) -> str:
    peaks = [e["gpu_peak_gb"] for e in events if e.get("gpu_peak_gb")]
    totals = [e["gpu_gb"] for e in events if e.get("gpu_gb")]
    of = f" of {max(totals):g}" if totals else ""
    return f"{max(peaks):.1f}{of} GB, of rank 0, by torch's own count" if peaks else ""


def _hours(rows: Sequence[Row], workers: Sequence[Row], up_s: float) -> str:
    in_steps = sum(row["step_s"] * row["world_size"] for row in rows) / 3600
    gpus = any(w.get("gpu_gb") for w in workers)
    return f"{up_s / 3600:.2f} up; {in_steps:.2f} {'GPU' if gpus else 'worker'} hours within steps" if rows else ""


def _dollars(events: Sequence[Row]) -> str:
    costs = [e["dollars"] for e in events if e["event"] == "cost"]
    return f"${sum(costs):,.2f}, by the prices given, while a driver ran" if costs else ""
