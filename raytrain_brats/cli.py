"""Parse options, show progress and report errors: what all commands share.

In: a command's options class and its work.
Out: parsed options; progress; the exit code: 0 done, 1 failed, 2 a mistake in the request, 130 Ctrl-C, 141 when whoever
read what it prints has gone.
"""

import contextlib
import difflib
import io
import os
import re
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, TypeVar

import tyro
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from raytrain_brats import interrupt, messages, storage
from raytrain_brats.data.manifest import Skipped
from raytrain_brats.errors import RunFailed, UserError

Options = TypeVar("Options")
T = TypeVar("T")
MOST_NAMED = 10
_ENDLESS = 100_000
READER_GONE = 141
"""As a shell says of a program that SIGPIPE has ended."""
LINE_S = 10.0
"""Seconds between two lines of progress where there is no terminal to draw a bar on."""

Uri = Annotated[str, tyro.conf.arg(metavar="URI", help_behavior_hint="")]
"""A local path or s3://; "" when not given."""
Workers = Annotated[str, tyro.conf.arg(metavar="MIN:MAX", help_behavior_hint="")]
Changes = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")]
"""Settings of a recipe to change; the option may be given several times."""


def default(given: str, name: str) -> str:
    """What was given, else the environment's RAYTRAIN_BRATS_<name>: how a cluster's YAML gives places to every job."""
    return given or os.environ.get(f"RAYTRAIN_BRATS_{name}", "")


def run_folder(given: str) -> str:
    """The run folder given, else RAYTRAIN_BRATS_RUN_DIR, as `storage.normal` has it. Raises UserError without one."""
    if not (run_dir := default(given, "RUN_DIR")):
        raise UserError("no run folder given; name one with --run-dir (local or s3://)")
    return storage.normal(run_dir)


def cases_from(data: str, store: str) -> tuple[str, str]:
    """(data, store), one of them at most; options win over the environment. Raises UserError when both are given.

    A cluster's environment names the data and the place of a store, which counts once it is finished.
    """
    if data and store:
        raise UserError("--data and --store are two ways to give the cases; give one")
    if data or store:
        return data, store
    data, store = default("", "DATA"), default("", "STORE")
    if data and store and not storage.exists(storage.join(storage.normal(store), "index.jsonl")):
        print(
            f"{store} is no finished store yet: the scans of {data} are preprocessed while they are read. "
            "`python -m raytrain_brats.prepare` does that once and for all",
            file=sys.stderr,
        )
        store = ""
    return ("" if store else data), store


def progress(rows: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Hand the rows on; a bar with the time left on a terminal, a plain line now and then elsewhere."""
    if sys.stdout.isatty():
        from rich.progress import track

        yield from track(rows, what, total)
        return
    began = printed_s = time.monotonic()
    for number, row in enumerate(rows, 1):
        yield row
        now = time.monotonic()
        if now - printed_s >= LINE_S and number < total:
            printed_s = now
            left_s = (now - began) / number * (total - number)
            print(f"{what}: {number:,} of {total:,}, about {span(left_s)} left", flush=True)


def span(seconds: float) -> str:
    """A time in words, of two digits at least: 45 s, 12 min, 3.2 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Pace:
    """How long 1,000 cases take, from the first ten. Where several are done at once, the first of each process are left
    out, which take its start along, and as many follow as are done at once, since those end together."""

    def __init__(self, at_once: int) -> None:
        self._at_once, self._due = at_once, at_once + max(10, at_once)
        self._began, self._done, self._first_s = time.monotonic(), 0, 0.0
        self.told = False
        """Whether `add` has given the estimate."""

    def add(self) -> str:
        """One more case is done; the estimate, once, else ""."""
        self._done += 1
        if self._done == self._at_once:
            self._first_s = time.monotonic()
        if self._done != self._due:
            return ""
        self.told = True
        return self.estimate()

    def estimate(self) -> str:
        """By the cases done so far; "" where ten were not."""
        if self._done < 10:
            return ""
        before = self._at_once if self._done >= self._due else 0
        since = self._first_s if before else self._began
        each_s = (time.monotonic() - since) / (self._done - before)
        return (
            f"about {span(1000 * each_s)} for 1,000 cases at this rate ({each_s:.1f} s a case, {self._at_once} at once)"
        )


def show_refused(refused: list[dict[str, str]]) -> None:
    """A table of the cases that were set aside, the first twenty: {case, uri, reason, detail}."""
    if refused:
        table = Table("case", "reason", "detail", title=f"{len(refused)} cases set aside")
        for row in refused[:20]:
            table.add_row(row["case"], row["reason"], row["detail"])
        show(table)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process with 1; `piped` knows what this is


def show(table: Table) -> None:
    """Print a table without truncation: on a terminal long names wrap, elsewhere lines are long."""
    for column in table.columns:
        column.overflow = "fold"
    console = _Console()
    if not console.is_terminal:
        room = console.options.update(width=_ENDLESS)
        console = _Console(width=max(console.width, Measurement.get(console, room, table).maximum))
    console.print(table)


def show_skipped(skipped: Sequence[Skipped], strict: bool = False) -> None:
    """What a scan did not take: counted by cause, up to ten by name. Raises UserError when `strict`."""
    if not skipped:
        return
    for cause, count in Counter(row.cause for row in skipped).items():
        rows = [row for row in skipped if row.cause == cause]
        print(f"not taken, {cause}: {count}", file=sys.stderr)
        for row in rows[:MOST_NAMED]:
            print("  " + " ".join(f"{row.case or row.path}: {row.detail}".splitlines()), file=sys.stderr)
        if count > MOST_NAMED:
            print(f"  and {count - MOST_NAMED} more", file=sys.stderr)
    if strict:
        raise UserError(f"--strict: {len(skipped)} cases or files of the folder would not be used, as named above")


def choose(program: str, kind: str, given: list[str], choices: dict[str, str]) -> int | str:
    """The first of what was given, if it is one of the choices {name: what it does}; else the exit code, after a
    message."""
    name = given[0] if given else "--help"
    if name in choices:
        return name
    if name in ("-h", "--help"):
        version = " [--version]" if kind == "command" else ""
        print(f"usage: {program}{version} {kind.upper()} [--help] ...\n")
        print("\n".join(f"  {choice:{max(map(len, choices))}} {what}" for choice, what in choices.items()))
        return 0
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(choices)}"
    print(f"error: {kind} {name!r} is not known; {hint}", file=sys.stderr)
    return 2


def entry(
    options: type[Options],
    work: Callable[[Options], object],
    name: str,
    argv: list[str] | None,
    program: str = "raytrain-brats",
) -> int:
    """Parse and work; a user's mistake is one line on standard error, never a traceback. `name` may be empty."""
    return piped(lambda: _entry(options, work, name, argv, program))


def piped(command: Callable[[], int]) -> int:
    """The exit code of a command; READER_GONE, without a word, when nobody reads what it prints any more: `| head`."""
    try:
        code = command()
        try:
            print(end="", flush=True)
        except BrokenPipeError:
            raise
        except OSError:  # of other faults, such as a full disk, Python itself tells at its end
            pass
        return code
    except BrokenPipeError:
        if not (gone := _unread()):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in gone:  # Python writes what is left at its end, and would complain
            os.dup2(nowhere, number)
        return READER_GONE


def _unread() -> list[int]:
    """Of standard output and standard error those whose reader has gone."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return [number for number, found in poll.poll(0) if found & (select.POLLERR | select.POLLHUP)]


def _entry(
    options: type[Options], work: Callable[[Options], object], name: str, argv: list[str] | None, program: str
) -> int:
    messages.show()
    captured, program = io.StringIO(), f"{program} {name}".rstrip()
    try:
        with contextlib.redirect_stderr(captured):
            parsed = tyro.cli(options, prog=program, args=argv)
    except SystemExit as stop:
        if stop.code:
            # tyro draws a box: a title, the message, a hint at the full help
            plain = re.sub("[│╭╮╰╯─|]|-{5,}", " ", captured.getvalue()).splitlines()
            _, *message = [line.strip() for line in plain if line.strip()]
            text = " ".join(message).partition("For full helptext")[0].strip()
            print(f"error: {text}; see {program} --help", file=sys.stderr)
        return int(stop.code or 0)
    try:
        with interrupt.gracefully():
            work(parsed)
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except (RunFailed, OSError) as error:
        if isinstance(error, BrokenPipeError) and _unread():
            raise
        print(f"failed: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return interrupt.leave()
    except Exception as error:
        if os.environ.get("RAYTRAIN_BRATS_VERBOSE"):
            raise
        text = f"{type(error).__name__}: {_one_line(error)}"[:600]
        print(f"failed: {text}; RAYTRAIN_BRATS_VERBOSE=1 shows where", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    # What Ray hands back from a task is of the error's own class, but prints a traceback; `cause` is the error.
    return " ".join(str(getattr(error, "cause", error)).splitlines())
