"""How far a command is: a bar with the time left on a terminal, plain lines now and then elsewhere."""

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from raytrain_brats import cli
from tests.support.commands import environment

ROWS = """
import sys, time
from raytrain_brats.cli import progress

def rows():
    for number in range(20):
        time.sleep(0.1)
        yield number

sys.exit(list(progress(rows(), "preparing", 20)) != list(range(20)))
"""


def on_terminal(code: str, columns: int) -> str:
    """What Python code prints on a terminal of so many columns, without colours and movements."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(columns)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # the other end was closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode())


def test_a_terminal_gets_a_bar_with_the_time_left() -> None:
    """rich draws what is done, in per cent, and a time left that becomes known and shrinks."""
    text = on_terminal(ROWS, columns=80)
    assert "preparing" in text and "100%" in text
    assert re.search(r"[1-9][0-9]?%.* 0:00:0[1-9]", text), text


def test_elsewhere_a_line_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain lines, no more often than every LINE_S, with the number done and the time left; none for quick work."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def rows(count: int, each_s: float) -> Iterator[int]:
        for number in range(count):
            clock[0] += each_s
            yield number

    assert list(cli.progress(rows(5, 0.5), "preparing", 5)) == list(range(5))
    assert capsys.readouterr().out == ""
    assert list(cli.progress(rows(2560, 1 / 64), "preparing", 2560)) == list(range(2560))
    assert capsys.readouterr().out.splitlines() == [
        "preparing: 640 of 2,560, about 30 s left",
        "preparing: 1,280 of 2,560, about 20 s left",
        "preparing: 1,920 of 2,560, about 10 s left",
    ]


def test_the_pace_is_known_after_ten_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time: ten after the first, whose process had to start. Three at once: thirteen, those three left out.
    Fewer cases: what they took, at the end."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def said(count: int, at_once: int, start_s: float, each_s: float) -> tuple[list[tuple[int, str]], str]:
        pace, told = cli.Pace(at_once), []
        clock[0] += start_s
        for number in range(1, count + 1):
            clock[0] += each_s if (number - 1) % at_once == 0 else 0
            if text := pace.add():
                told.append((number, text))
        return told, pace.estimate()

    line = "about 3.2 h for 1,000 cases at this rate (11.5 s a case, 1 at once)"
    assert said(40, 1, 100, 11.5) == ([(11, line)], line)
    told, last = said(12, 3, 0, 30)
    assert not told and last == "about 2.8 h for 1,000 cases at this rate (10.0 s a case, 3 at once)"
    told, last = said(15, 3, 1000, 30)
    assert [number for number, _ in told] == [13]
    assert "10.0 s a case" in last
    assert said(9, 1, 0, 5) == ([], "")
    assert [cli.span(s) for s in (45, 119, 700, 11_500)] == ["45 s", "119 s", "12 min", "3.2 h"]


def test_tables_are_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal a long name stands whole in its line, however narrow a terminal would be."""
    case, file = "BraTS20_Training_355_renamed_by_hand", f"{'/data' * 30}/imagesTr/BraTS20_Training_355_t1ce.nii.gz"
    cli.show_refused([{"case": case, "uri": file, "reason": "unreadable", "detail": f"{file}: not a gzip file"}])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if case in line]
    assert file in line and "…" not in line


def test_a_narrow_terminal_folds_tables() -> None:
    """All of a name is there, over several lines."""
    code = "from raytrain_brats import cli; cli.show_refused([dict(case='a' * 61, reason='x', detail='b' * 73)])"
    text = on_terminal(code, columns=40).replace("case", "").replace("detail", "")
    rows = text[text.index("┡") :]
    assert (rows.count("a"), rows.count("b")) == (61, 73) and "…" not in text


PRINTS = """
import sys
from dataclasses import dataclass
from raytrain_brats import cli
from rich.table import Table

@dataclass(frozen=True)
class Args:
    how: str = ""

def work(args):
    table = Table("case")
    for number in range(500):
        table.add_row(f"case {number}")
    for number in range(20_000 if args.how in ("rows", "errors") else 20):
        if args.how == "table":
            cli.show(table)
        else:
            print(f"case {number}", file=sys.stderr if args.how == "errors" else sys.stdout, flush=number < 9)
    if args.how == "elsewhere":
        raise BrokenPipeError(32, "Broken pipe")

sys.exit(cli.entry(Args, work, "name", ["--how", sys.argv[1]]))
"""


@pytest.mark.parametrize("how", ["rows", "errors", "table"])
def test_who_reads_no_more_ends_a_command_without_a_word(how: str) -> None:
    """`| head`: by plain lines, on standard error, amid a table of rich. Exit code as of a program without our care."""
    command = [sys.executable, "-c", PRINTS, how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout and process.stderr
    read, other = (process.stderr, process.stdout) if how == "errors" else (process.stdout, process.stderr)
    assert read.read(5)
    read.close()
    assert other.read() == b""
    assert process.wait(60) == 141


def test_a_pipe_that_breaks_elsewhere_is_a_failure() -> None:
    """Such as a connection: then somebody reads, and is told."""
    done = subprocess.run(
        [sys.executable, "-c", PRINTS, "elsewhere"], capture_output=True, env=environment(), timeout=60
    )
    assert done.returncode == 1 and done.stderr == b"failed: [Errno 32] Broken pipe\n"


def test_any_command_may_be_piped_into_head() -> None:
    """Those that print little, whose output is written only at the very end, and `--help`."""
    for words in (["recipes", "--help"], ["recipes", "dynunet"], ["--help"], ["--version"]):
        process = subprocess.Popen(
            [sys.executable, "-m", "raytrain_brats", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
        )  # fmt: skip
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 141, words
