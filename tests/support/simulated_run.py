"""Runs that never happened: their events and rows as `train` would write them, and the truth about each second."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
Action = tuple[str, float, float]
BATCH = 4
KEYS = ("productive", "data wait", "checkpoint", "validation", "other")
DRIVER_ENDS = ("driver killed", "interrupt", "interrupt saved", "finish")


@dataclass
class Run:
    """Call `group` for every worker group; then `events`, `rows` and `truth()`."""

    now: float = 1e6
    events: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    spent: Counter[str] = field(default_factory=Counter)
    """Seconds by cause, as far as they are decided."""
    marks: list[tuple[int, Counter[str] | None]] = field(default_factory=list)
    """Committed checkpoints: samples, and seconds by cause; None when a crash swallowed the event."""
    dead: tuple[list[tuple[str, float, float]], float, str] | None = None
    """The last group that died: (cause, from, to) since its last mark, time of its last kept row, cause of the rest."""
    up: bool = False
    generation: int = 0
    seen: int = 0
    pause: float = 60.0

    def event(self, kind: str, **facts: Any) -> None:
        about = {"event": kind, "time": self.now, "mono_s": self.now, "host": "h", "pid": 1}
        self.events.append(about | facts)

    def group(self, actions: list[Action], end: str, start_s: float = 2.0, world_size: int = 2) -> None:
        """One worker group: it does `actions` (kind, seconds, seconds of waiting for data), then ends."""
        if not self.up:
            self.spent["stopped"] += self.pause if self.events else 0.0
            self.now += self.pause if self.events else 0.0
            self.event("launch", total_samples=400, route="store", cases_train=8, cases_val=2)
        self.up = end not in DRIVER_ENDS
        self._spend("recovery", start_s)
        self._decide(end)
        self.generation += 1
        self._spend("recovery", start_s)
        if end == "stillborn":
            self.event("failure", generation=self.generation, rank=0, error="RuntimeError: it died")
            self.dead = ([], self.now, "recovery")
            return
        for rank in range(world_size):
            self.event("worker", generation=self.generation, rank=rank, world_size=world_size, node="n", device="cpu")
        self._life = _Life(self, start_s, world_size)
        for action in actions:
            self._life.do(*action)
        self._life.end(end)

    def _spend(self, cause: str, seconds: float) -> None:
        self.now += seconds
        self.spent[cause] += seconds

    def _decide(self, end: str) -> None:
        """The controller chooses where to go on; what the group before did after that is lost."""
        if end == "damaged" and self.marks and (lost := self.marks[-1][1]) is not None:
            self.marks.pop()
            thrown_away = {cause: seconds for cause, seconds in lost.items() if cause != "validation"}  # scores stay
            self.spent.subtract(thrown_away)
            self.spent["redone"] += sum(thrown_away.values())
        kept = self.marks[-1][0] if self.marks else 0
        lost_rows = [row for row in self.rows if row["samples_seen"] > kept]
        last_row = self.rows[-1]["time"] if self.rows else None
        self._settle("redone", last_row or 0.0)
        self.rows = [row for row in self.rows if row["samples_seen"] <= kept]
        about = {"checkpoint": f"c-{kept}" if kept else None, "redone_steps": len(lost_rows), "last_row": last_row}
        self.event("group", generation=self.generation + 1, samples_seen=kept, **about)
        self.seen = kept

    def _settle(self, lost: str, last_row: float) -> None:
        tail, kept_until, rest = self.dead or ([], 0.0, "")
        for cause, start, end in tail:
            if cause == "recovery":
                name = cause
            elif end <= kept_until and lost == "redone":
                name = cause if cause in KEYS[:2] else "unrecorded"
            else:
                name = lost if end <= last_row else rest
            self.spent["validation" if cause == "validation" else name] += end - start
        self.dead = None

    def truth(self) -> dict[str, float]:
        """Seconds by cause when no other group follows."""
        self._settle("unsaved", self.rows[-1]["time"] if self.rows else 0.0)
        return {cause: seconds for cause, seconds in self.spent.items() if abs(seconds) > 1e-9}


class _Life:
    """What one worker group does from its first batch on."""

    def __init__(self, run: Run, start_s: float, world_size: int) -> None:
        self.run, self.start_s, self.world_size = run, start_s, world_size
        self.began = self.mark = run.now
        self.tail: list[tuple[str, float, float]] = []
        self.flying: Row | None = None
        self.begun = False
        self.seen_at_mark = run.seen

    def do(self, kind: str, seconds: float, wait_s: float) -> None:
        run = self.run
        if kind == "step":
            self._pass("data wait" if self.begun else "recovery", wait_s)
            if not self.begun:
                self._begin()
            self._pass("productive", seconds)
            self._row(wait_s, seconds + wait_s)
        elif kind == "checkpoint" and run.seen > self.seen_at_mark:
            self._commit()
            self._pass("checkpoint", wait_s)
            spent = Counter({key: sum(b - a for cause, a, b in self._since_mark() if cause == key) for key in KEYS})
            self.flying = {"seen": run.seen, "mark": run.now, "spent": spent, "stall": wait_s, "seconds": seconds}
            self.mark, self.seen_at_mark = run.now, run.seen
        elif kind == "commit":
            self._commit()
        elif kind == "validate":
            self._pass("validation", seconds)
            dice = dict.fromkeys(("WT", "TC", "ET"), min(0.9, 0.3 + run.seen / 500))
            about = {"dice": dice, "hd95_mm": dict.fromkeys(dice, 4.0), "cases": 2, "seconds": seconds}
            run.event("validation", samples_seen=run.seen, generation=run.generation, **about)
        elif kind == "idle":
            self._pass("other" if self.begun else "recovery", seconds)

    def _begin(self) -> None:
        """The first batch is there: what was before is start-up."""
        for cause, start, end in self.tail:
            self.run.spent[cause] += end - start
        self.tail, self.began, self.mark = [], self.run.now, self.run.now

    def _since_mark(self) -> list[tuple[str, float, float]]:
        return [item for item in self.tail if item[1] >= self.mark]

    def _pass(self, cause: str, seconds: float) -> None:
        self.tail.append((cause, self.run.now, self.run.now + seconds))
        self.run.now += seconds

    def _row(self, wait_s: float, step_s: float) -> None:
        run, low = self.run, self.run.seen
        run.seen += BATCH
        about = {"step": low // BATCH, "samples_seen": run.seen, "positions": [low, run.seen], "bad": 0, "lr": 1e-3}
        about |= {"world_size": self.world_size, "generation": run.generation, "loss": 4 / (4 + run.seen**0.5)}
        run.rows.append(about | {"wait_s": wait_s, "step_s": step_s, "time": run.now})
        if not self.begun:
            parts = {"detect_s": 0.6, "reschedule_s": self.start_s - 0.6, "import_s": self.start_s}
            parts |= {"first_batch_s": wait_s, "first_step_s": step_s - wait_s}
            about = {"generation": run.generation, "world_size": self.world_size, "began": self.began}
            run.event("recovered", total_s=sum(parts.values()), **about, **parts)
        self.begun = True

    def _commit(self, told: bool = True) -> None:
        if flying := self.flying:
            run, spent = self.run, flying["spent"]
            run.marks.append((flying["seen"], spent if told else None))
            self.flying = None
            if told:
                about = {"samples_seen": flying["seen"], "name": f"c-{flying['seen']}", "bytes": 9}
                about |= {"stall_s": flying["stall"], "seconds": flying["seconds"], "generation": run.generation}
                names = {f"{key.replace(' ', '_')}_s": spent[key] for key in KEYS}
                run.event("checkpoint", mark=flying["mark"], spent=names, **about)
                run.spent.update(spent)
                self.tail = [item for item in self.tail if item[1] >= flying["mark"]]

    def end(self, how: str) -> None:
        """The group ends; whatever flies is not committed, unless its event alone is lost."""
        run = self.run
        if "saved" in how or how == "finish":
            self.do("checkpoint", 0.1, 0.1)
            self._commit()
        silent = self.flying if how == "event lost" else None
        if silent:
            self._commit(told=False)
        kept_until = max([0.0, *(r["time"] for r in run.rows if silent and r["samples_seen"] <= silent["seen"])])
        rest = "recovery" if run.up or not self.begun else "other"
        if how == "driver killed":  # nobody sees what came after the last sign of life
            alive = max(row["time"] for row in [*run.events, *run.rows])
            self.tail, run.now = [item for item in self.tail if item[2] <= alive], alive
        elif how != "alive":
            self.tail.append((rest, run.now, run.now + 1.5))
            run.now += 1.5
        if how in ("resize saved", "resize"):
            run.event("resize", saved="saved" in how, seconds=1.0)
        elif how in ("kill", "event lost", "damaged"):
            run.event("failure", generation=run.generation, rank=0, error="RuntimeError: worker died")
        elif how.startswith("interrupt") or how == "finish":
            run.event(how.split()[0], samples_seen=run.seen)
        run.dead = (self.tail, kept_until, rest)
