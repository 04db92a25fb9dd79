"""Ctrl-C and SIGTERM end a command soon whenever they come: one line, one exit code, nothing left running.

In: signals, from the first import of a command on; how long the work at hand may take to end by itself.
Out: KeyboardInterrupt in the main thread; where that does not end the process in time, its end and its children's.

Python runs a handler between two of its own instructions in the main thread. While that thread is inside Ray's start
or an import, for seconds or for minutes, no handler runs, and an exception would be raised in the middle of another
library's code. So a thread is notified of the signals too, by the pipe that Python's signal module writes to at once.
"""

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

EXIT_CODE = 130
GRACE_S = 8.0
"""How long our own work may take to clean up."""
_TWICE_S = 1.0
"""A signal this soon after the first is the same one: `timeout` and terminals send it to a process and to its group."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _State:
    installed = printed = raised = False
    grace_s = 0.0
    """0: end at once, there is nothing of ours to clean up."""
    depth = 0
    ours: Sequence[signal.Signals] = ()
    first, deadline = 0.0, math.inf
    started: frozenset[tuple[int, str]] = frozenset()
    """Processes below this one when the signal came: workers of a Ray that is shut down lose their parents."""


_state = _State()
_hearing = threading.Lock()


def install() -> None:
    """Take over SIGINT and SIGTERM for this process, unless they are ignored or have other handlers.

    For commands alone: a program that imports the package keeps its own handlers.
    """
    if _state.installed or threading.current_thread() is not threading.main_thread():
        return
    ours = [s for s in _SIGNALS if signal.getsignal(s) in (signal.SIG_DFL, signal.default_int_handler)]
    hearing, notify = os.pipe()
    os.set_blocking(notify, False)
    signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
    _state.ours = ours
    again()
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_watch, args=(hearing,), name="interrupt", daemon=True).start()
    _state.installed = True


def again() -> None:
    """Take the signals back from a library that has put handlers of its own, as Ray does when it starts."""
    for number in _state.ours:
        signal.signal(number, _raise)


def installed() -> bool:
    return _state.installed


@contextlib.contextmanager
def gracefully(grace_s: float = GRACE_S) -> Iterator[None]:
    """Within, a signal raises KeyboardInterrupt, and the process has this long to end by itself; 0: it ends at once."""
    before, _state.grace_s = _state.grace_s, grace_s
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1
        _state.grace_s = before


def allow(seconds: float) -> None:
    """After a signal: the process may take so long from now on."""
    if _state.raised:
        _state.deadline = time.monotonic() + seconds


def leave() -> int:
    """Say that a command was interrupted, once, and end this process where that is a command's; else the exit code."""
    if not _state.depth:  # else the enclosing command says it
        if _state.installed:
            _end()
        print("interrupted", file=sys.stderr)
    return EXIT_CODE


def _raise(number: int, frame: Any) -> None:
    if _state.grace_s and not _state.raised:
        _state.raised = True
        _hear()  # or the thread might, later, take back what is allowed meanwhile
        raise KeyboardInterrupt


def _forget() -> None:
    """In a forked child, which has no such thread: its signals are not ours."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        if signal.getsignal(number) is _raise:
            signal.signal(number, signal.SIG_DFL)


def _watch(hearing: int) -> None:
    while True:
        if select.select([hearing], [], [], 0.2 if _state.first else None)[0]:
            poll = {n for n in os.read(hearing, 64) if n in _SIGNALS and signal.getsignal(n) is _raise}
            if poll and not _hear() and time.monotonic() > _state.first + _TWICE_S:
                _state.deadline = 0.0
        if time.monotonic() >= _state.deadline:
            _end()


def _hear() -> bool:
    """Note the first signal; whether this is it."""
    with _hearing:  # main thread and watcher hear of it at once: the second must not take back what `allow` set
        if _state.first:
            return False
        _state.first = time.monotonic()
        _state.deadline = _state.first + _state.grace_s
    _state.started = frozenset(_descendants(os.getpid()) if _state.grace_s else ())
    return True


def _end() -> None:
    """End this process and all that it started, such as a Ray of its own."""
    if not _state.printed:
        _state.printed = True
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        shown = b"\x1b[?25h" if os.isatty(2) else b""  # a bar hides the cursor
        with contextlib.suppress(OSError):
            os.write(2, shown + b"interrupted\n")
    ended: set[tuple[int, str]] = set()
    while new := _descendants(os.getpid()) - ended:  # stopped first, so that none starts another meanwhile
        for pid, _ in new:
            _send(pid, signal.SIGSTOP)
        ended |= new
    for pid, since in ended | _state.started:
        if _began(pid)[1] == since:
            _send(pid, signal.SIGKILL)
    os._exit(EXIT_CODE)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def _began(pid: int) -> tuple[int, str]:
    """(parent, when it began in the kernel's ticks) of a process; (0, "") when there is none."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(facts[1]), facts[19]
    except (OSError, ValueError, IndexError):
        return 0, ""


def _descendants(root: int) -> set[tuple[int, str]]:
    """(number, when it began) of processes below this one; none where there is no /proc."""
    children: dict[int, list[tuple[int, str]]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        parent, since = _began(pid := int(folder.name))
        children.setdefault(parent, []).append((pid, since))
    found, todo = set[tuple[int, str]](), [root]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo += [pid for pid, _ in below]
    return found
