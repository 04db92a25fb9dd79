"""The docs' words, typed: a page's fenced commands, a bash on a terminal to type them in, and what it printed.

In: pages of docs/; an environment; answers to what commands ask.
Out: commands as they stand in a page; what each printed; a transcript, shortened where it says so.
"""

import contextlib
import datetime
import hashlib
import io
import os
import platform
import re
import select
import signal
import subprocess
import sys
import tarfile
import termios
import textwrap
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.support import ROOT

PAGES = ROOT / "docs"
Replies = dict[str, str]

GPUS = "ray job submit -- python -m raytrain_brats.check_gpus --workers"
QUOTA = (
    "aws service-quotas request-service-quota-increase --service-code ec2 --quota-code L-7212CCBC --desired-value 192"
)
INSTEAD = {
    f"{GPUS} 16": (
        f"{GPUS} 2 --cpu",
        "The page says --workers 16, which waits for GPUs; these machines have a CPU each",
    ),
    QUOTA: (
        f"{QUOTA} --generate-cli-skeleton output",
        "Moto grants no quotas: the CLI checks its words against AWS's model, and prints an example of the answer",
    ),
}
"""Commands of ec2.md that cannot be typed as they stand where there is no GPU and no AWS: (what is typed, why)."""

_MARK = re.compile(r"\[rig (\d+)\]\n\Z")
_ASKS = re.compile(r"[^\n]*\[(?:y/N|Y/n)\]:? ?\Z")
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>]|\x07")
_HEAD, _TAIL, _WIDTH = 12, 14, 160
_NOISE = re.compile(
    r"^.*File Mount: .*\n(.*\n)?.*To ensure this mount updates .*\n|"
    r"^.*(ClusterState: |empty legacy field|max workers for head node type|V?VINFO ).*\n",
    re.M,
)
"""What Ray repeats at each command; left out of transcripts, which say so."""
_SECRET = re.compile(r"\b[0-9a-f]{64}\b")

DOWNLOADS = """
import dataclasses, sys
from raytrain_brats import download
from raytrain_brats.__main__ import main
download.TASK01 = dataclasses.replace(download.TASK01, uri="s3://public/Task01.tar", md5="{md5}")
sys.exit(main())
"""
"""`raytrain-brats` with MSD's bucket replaced by one of moto's."""


def blocks(page: str) -> list[tuple[str, str]]:
    """(heading, fenced bash block) in the order of the page, without the indentation of lists."""
    found, heading = [], ""
    for part in re.finditer(r"^#+ ([^\n]*)$|^( *)```bash\n(.*?)^\2```", (PAGES / page).read_text(), re.S | re.M):
        if part[1]:
            heading = part[1]
        else:
            found.append((heading, textwrap.dedent(part[3])))
    return found


def script(page: str, heading: str = "") -> str:
    """All blocks of a page, or those below one heading."""
    found = [text for above, text in blocks(page) if heading in ("", above)]
    assert found, f"{page} has no commands below {heading!r}"
    return "".join(found)


def commands(page: str, heading: str = "") -> list[str]:
    """Command by command as they stand, with the line breaks and comments that they have."""
    lines: Iterator[str] = iter(script(page, heading).splitlines())
    found = []
    for line in lines:
        while line.endswith("\\"):
            line += "\n" + next(lines)
        found.append(line)
    return found


def publish(client: Any, folder: Path, program: Path) -> None:
    """Put an MSD folder's archive into a bucket of moto's that all may read; `program` becomes a `raytrain-brats`
    whose `download` takes it from there."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(folder, "Task01_BrainTumour")
    region = client.meta.region_name
    client.create_bucket(
        Bucket="public",
        **({} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}),
    )
    client.put_object(Bucket="public", Key="Task01.tar", Body=packed.getvalue(), ACL="public-read")
    program.write_text(f"#!{sys.executable}\n{DOWNLOADS.format(md5=hashlib.md5(packed.getvalue()).hexdigest())}")
    program.chmod(0o755)


def prompted(command: str) -> str:
    """As a terminal shows it."""
    return "$ " + command.replace("\n", "\n> ")


class Transcript:
    """What of a page was typed and what was printed. `stand_ins`: what is not as with a reader; `hide`: (text, what
    stands for it) of places that say nothing to others."""

    def __init__(self, page: str, stand_ins: str, hide: list[tuple[str, str]]) -> None:
        cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
        machine = f"{platform.system()} {platform.release().partition('-')[0]}, {os.cpu_count()} CPUs"
        about = (
            f"docs/{page}, typed on {datetime.date.today()} by a test: {machine} ({cpu[1] if cpu else '?'}), "
            f"Python {platform.python_version()}, Ray {version('ray')}. Lines with $ were typed, those with > go on, "
            "those with ### say what a reader has to know; left out are Ray's remarks on file mounts, legacy fields "
            f"and states, and where [...] stands. {stand_ins}"
        )
        self.page, self.parts, self.hide = page, [textwrap.fill(about, 118) + "\n"], hide

    def note(self, text: str) -> None:
        """A remark, which nobody typed."""
        self.parts.append(textwrap.fill(text, 110, initial_indent="### ", subsequent_indent="### ") + "\n")

    def add(self, command: str, said: str, status: int, seconds: float) -> None:
        said = _SECRET.sub("<token>", _NOISE.sub("", said))
        lines = re.sub(r"\n{2,}", "\n", said.strip("\n")).splitlines()
        if len(lines) > _HEAD + _TAIL + 1:
            lines[_HEAD:-_TAIL] = [f"[... {len(lines) - _HEAD - _TAIL} more lines ...]"]
        lines = [line if len(line) <= _WIDTH else f"{line[:_WIDTH]} [...]" for line in lines]
        end = [f"[exit status {status}]"] * bool(status) + [f"[{seconds:.0f} s]"] * (seconds >= 5)
        self.parts.append("\n".join([prompted(command), *lines, *end]) + "\n")

    def keep(self) -> None:
        """Into the folder of RAYTRAIN_BRATS_TRANSCRIPTS, where it is set."""
        if not (folder := os.environ.get("RAYTRAIN_BRATS_TRANSCRIPTS")):
            return
        path = Path(folder) / self.page.replace(".md", ".txt")
        text = "\n".join(self.parts)
        for found, instead in self.hide:
            text = text.replace(found, instead)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


class Terminal:
    """An interactive bash, as a person has it in front of them: what it runs sees a terminal and may ask."""

    def __init__(self, folder: Path, environment: dict[str, str], transcript: Transcript) -> None:
        self.transcript = transcript
        self._ours, theirs = os.openpty()
        settings = termios.tcgetattr(theirs)
        settings[3] &= ~termios.ECHO  # what is typed stands in the transcript already
        settings[1] &= ~termios.ONLCR
        termios.tcsetattr(theirs, termios.TCSANOW, settings)
        termios.tcsetwinsize(theirs, (50, 160))
        mine = environment | {"PS1": r"[rig $?]\n", "PS2": "", "TERM": "xterm", "HISTFILE": ""}
        self._bash = subprocess.Popen(
            ["setsid", "--ctty", "bash", "--norc", "--noprofile", "--noediting", "-ui", "-o", "pipefail"],
            cwd=folder, env=mine, stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        self._read("bash", 30, {})

    def type(self, command: str, expect: int = 0, replies: Replies | None = None, timeout: float = 600) -> str:
        """What a command printed, once the prompt is there again. `replies`: words of a question and the answer; a
        question that none of them fits fails, as does another exit status."""
        began = time.monotonic()
        os.write(self._ours, f"{command}\n".encode())
        said, status = self._read(command, timeout, replies or {})
        self.transcript.add(command, said, status, time.monotonic() - began)
        assert status == expect, f"{command}: {status}\n{said[-6000:]}"
        return said

    def _read(self, command: str, timeout: float, replies: Replies) -> tuple[str, int]:
        raw, until = b"", time.monotonic() + timeout
        while time.monotonic() < until:
            if not select.select([self._ours], [], [], 1)[0]:
                continue
            raw += os.read(self._ours, 65536)
            text = _plain(raw)
            if end := _MARK.search(text):
                return text[: end.start()], int(end[1])
            if asked := _ASKS.search(text):
                answer = next((a for words, a in replies.items() if words in asked[0]), None)
                assert answer is not None, f"{command} asks, and nobody answers: {text[-2000:]}"
                os.write(self._ours, f"{answer}\n".encode())
                raw += f"{answer}\n".encode()  # it is not echoed
        raise AssertionError(f"{command}: no end within {timeout:.0f} s\n{_plain(raw)[-6000:]}")

    def close(self) -> None:
        """Hang up: what runs in the background ends too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGHUP)
        self._bash.kill()
        self._bash.wait()
        os.close(self._ours)


def _plain(raw: bytes) -> str:
    """As a printer would have it: no colours, and of a line that was written anew its last state."""
    text = _CONTROLS.sub("", raw.decode(errors="replace")).replace("\r\n", "\n")
    return re.sub(r"[^\n]*\r(?=[^\n])", "", text).replace("\r", "")
