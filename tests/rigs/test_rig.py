"""docs/ec2.md and on-prem.md, typed, with machines made of namespaces: `ray up`, jobs, a spot reclaim, `ray down`.

Twelve minutes; needs root, namespaces, sshd and the AWS CLI, and is skipped, saying why, without.
RAYTRAIN_BRATS_TRANSCRIPTS names a folder for transcripts, RAYTRAIN_BRATS_RIG_LOGS one for all that the machines left.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raytrain_brats import books, s3, storage, verify
from raytrain_brats.synthetic.phantom import write_set
from tests.support import account_template as template
from tests.support import typed_docs as typed
from tests.support.machines import GATEWAY, Machines, missing, own_network, tool

WHY_NOT = missing()
pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(bool(WHY_NOT), reason=f"the EC2 rig cannot run here: {WHY_NOT}"),
]
ZONE, ME = "us-west-2b", "123456789012"
RUNS = f"s3://brats-runs-{ME}/brats"
RUN = f"{RUNS}/second"
TRAINING = ["train.epochs=4000", "run.resize_check_s=2", "run.cpus_per_worker=1", "data.patch_xyz=[16, 16, 16]"]
TRAINING += ["checkpoint.every_samples=400", "validate.every_samples=10000000"]
SAYS_YES = {"usage stats": "n", "[y/N]": "y"}


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """Machines in a network of their own; this test's boto3 and our S3 client speak with their moto."""
    with tempfile.TemporaryDirectory(prefix="rig", dir="/tmp") as folder, own_network():
        machines = Machines(Path(folder))
        for name, value in machines.environment("owner").items():
            monkeypatch.setenv(name, value)
        s3.client.cache_clear()
        try:
            yield machines
        finally:
            keep = os.environ.get("RAYTRAIN_BRATS_RIG_LOGS")
            if keep:
                subprocess.run(["cp", "-r", "--no-preserve=mode", folder, keep], check=False)
            machines.close()
            s3.client.cache_clear()


class Session:
    """A test's terminals at the root of the clone, one for each who; and the transcript that they share."""

    def __init__(self, machines: Machines, page: str) -> None:
        self.machines = machines
        hide = [(str(machines.checkout), "~/raytrain_brats"), (str(machines.folder / "home"), "~")]
        hide += [(str(tool("ray").parents[1]), "~/raytrain_brats/.venv"), (str(machines.folder), "/tmp")]
        self.transcript = typed.Transcript(page, "The machines are namespaces of this one, AWS is moto.", hide)
        self.terminals: dict[str, typed.Terminal] = {}

    def of(self, who: str) -> typed.Terminal:
        if who not in self.terminals:
            environment = self.machines.environment(who)
            self.terminals[who] = typed.Terminal(self.machines.checkout, environment, self.transcript)
        return self.terminals[who]

    def type(self, command: str, who: str = "you", **options: Any) -> str:
        """One command; where it opens the tunnels, until they are there. `options`: of `Terminal.type`."""
        instead, why = typed.INSTEAD.get(command, (command, ""))
        if why:
            self.transcript.note(why)
        tunnel = command.startswith("ray dashboard")
        if tunnel:
            wait(lambda: not answers(), 60, "end of the tunnel before")
        said = self.of(who).type(instead, **options)
        if tunnel:
            wait(answers, 60, "a dashboard")
        return said

    def close(self) -> None:
        for terminal in self.terminals.values():
            terminal.close()


@contextmanager
def session(machines: Machines, page: str) -> Iterator[Session]:
    made = Session(machines, page)
    try:
        yield made
        made.transcript.keep()
    finally:
        made.close()


def answers() -> bool:
    """Whether a dashboard is to be had at this end of the tunnel."""
    asked = ["curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:8265/api/version"]
    return subprocess.run(asked, capture_output=True).stdout in (b"200", b"401")


def wait(until: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := until():
            return found
        time.sleep(1)
    raise AssertionError(f"no {what} within {seconds:.0f} s")


def change(path: Path, *changes: tuple[str, str]) -> None:
    """Replace words of a shipped YAML in the clone."""
    text = path.read_text()
    for found, instead in changes:
        assert found in text, f"{path.name} has no {found}"
        text = text.replace(found, instead)
    path.write_text(text)


SMALL = ("--disable-usage-stats", "--disable-usage-stats --object-store-memory=150000000")
"""Object stores that fit several times into this machine."""
P4D = (
    SMALL,
    ('{CPU: 96, GPU: 8, "accelerator_type:A100": 1}', "{CPU: 1, GPU: 0}"),
    ("{CPU: 16}", "{CPU: 1}"),
    ("max_workers: 4", "max_workers: 1"),
    ("raytrain_brats.spot --head", "raytrain_brats.spot --headless-minutes 0.5 --head"),
)
"""The shipped YAML for machines of one CPU without GPUs: nothing else is changed."""


def worlds() -> list[int]:
    """World size of each worker group that applied steps, in order."""
    found: dict[int, int] = {row["generation"]: row["world_size"] for row in books.read_rows(RUN)}
    return list(found.values())


def make_account(typist: Session) -> None:
    """The page's `Once per account`, by its owner; MSD's archive is one of phantoms."""
    data = typist.machines.folder / "phantoms"
    write_set(str(data), cases=6, seed=0, grid=32, anatomy="procedural")
    typed.publish(typist.machines.client("s3"), data, typist.machines.folder / "bin" / "raytrain-brats")
    typist.transcript.note("An administrator's terminal: once per account. `download` finds phantoms in place of MSD.")
    for command in typed.commands("ec2.md", "Once per account"):
        typist.type(command, "owner")


def first_jobs(typist: Session) -> None:
    """The page's first block but for its `ray down`, then its first jobs, all to their ends; nothing else is typed but
    what the table of lines and environment says."""
    up, *rest = typed.commands("ec2.md", "On EC2")[2:-1]
    typist.transcript.note("Your terminal. Without the two places nothing is launched, and it says so.")
    refused = typist.type(up, expect=2)
    assert "nothing was launched" in refused and "RAYTRAIN_BRATS_DATA" in refused and not typist.machines.instances()
    typist.transcript.note(
        "The demo's recipe, as the cases are phantoms; no checkip.amazonaws.com tells the address here."
    )
    typist.type(f"export RAYTRAIN_BRATS_RECIPE=demo RAYTRAIN_BRATS_SSH_FROM={GATEWAY}/32")
    for command in typed.commands("ec2.md", "On EC2")[:2]:
        typist.type(command)
    typist.type(up, replies=SAYS_YES)
    assert [node["InstanceType"] for node in typist.machines.instances()] == ["m6i.2xlarge"]
    said = [typist.type(command) for command in rest][-1]
    assert "brats/store is no finished store yet" in said and f"done: {RUNS}/first" in said, said
    checked, prepared, again = [typist.type(command) for command in typed.commands("ec2.md", "Up, and a job")]
    assert "rank 0" in checked and "rank 1" in checked and "all-reduce of 256 MiB over 2" in checked
    assert "6 cases prepared, 0 set aside" in prepared and f"{RUNS}/first is finished" in again, prepared + again


def test_a_run_on_ec2_outlives_a_spot_reclaim(rig: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/ec2.md from the account to the end of a run; then, in a second run, nodes by demand, a reclaim with the
    fallback to on demand; a head that dies takes its nodes with it; a second `ray up`; `ray down`."""
    if not shutil.which("aws"):
        pytest.skip("the AWS CLI is not here: pip install awscli, in an environment of its own")
    change(rig.checkout / "cluster" / "p4d.yaml", *P4D)
    with session(rig, "ec2.md") as typist:
        make_account(typist)
        first_jobs(typist)
        assert verify.main(["--run-dir", f"{RUNS}/first"]) == 0
        on_the_cluster(typist)
        the_end(typist)
    assert "each once, in order" in capsys.readouterr().out
    for who, policy in (("you", "LauncherEc2"), ("head", "Head"), ("node", "Node")):
        called = {call for call in rig.calls(who) if not call.startswith("s3:")}
        assert called <= template.actions(policy) | set(RIG_ONLY[who])


def on_the_cluster(typist: Session) -> None:
    """A second run, long enough for a node to be taken from it."""
    rig = typist.machines
    typist.transcript.note("Without the token nobody is served.")
    refused = typist.type("RAY_AUTH_MODE=disabled ray job list", expect=1)
    assert "401" in refused or "token" in refused.lower()
    typist.transcript.note(
        "A second run, of small steps for ever; one of its two nodes is taken, and spot has no other."
    )
    sets = " ".join(f"--set '{setting}'" for setting in TRAINING)
    start = f"ray job submit --no-wait --submission-id rig -- python -m raytrain_brats.train --run-dir {RUN} {sets}"
    typist.type(start)
    wait(lambda: len(worlds()) and worlds()[-1] == 2, 400, "run with two workers")
    kinds = [rig.instances(kind) for kind in ("data", "train")]
    assert [len(found) for found in kinds] == [1, 2]
    assert {node["InstanceLifecycle"] for found in kinds for node in found} == {"spot"}

    groups = len(worlds())
    victim = max(kinds[1], key=lambda node: node["PrivateIpAddress"])["InstanceId"]
    (rig.folder / "no_spot").touch()
    rig.notice(victim, within_s=60)
    wait(lambda: len(worlds()) > groups and worlds()[-1] == 2, 400, "two workers again")
    rows = len(books.read_rows(RUN))
    wait(lambda: len(books.read_rows(RUN)) > rows + 20, 120, "steps after the reclaim")
    train_nodes = rig.instances("train")
    assert victim not in [node["InstanceId"] for node in train_nodes]
    assert sorted(node.get("InstanceLifecycle", "on demand") for node in train_nodes) == ["on demand", "spot"]

    typist.type("ray job stop rig")
    logs = typist.type("ray job logs rig")
    assert "goes on from the newest checkpoint" in logs, logs[-3000:]
    events = books.read_events(RUN)
    told = [event for event in events if event["event"] in ("preemption", "resize", "failure", "group")]
    assert any(event["saved"] for event in told if event["event"] in ("preemption", "resize")), told
    assert {event["redone_steps"] for event in told if event["event"] == "group"} == {0}, told
    assert verify.main(["--run-dir", RUN]) == 0


def the_end(typist: Session) -> None:
    """A head that dies, another one with new code, and nothing left."""
    rig = typist.machines
    (head,) = rig.instances("head")
    assert len(rig.instances()) > 1
    typist.transcript.note("The head is ended, as in the console: its nodes end themselves. Then a new one.")
    rig.ec2.terminate_instances(InstanceIds=[head["InstanceId"]])
    wait(lambda: not rig.instances() and not rig.live, 120, "end of the nodes that lost their head")
    logs_of = storage.list_files(f"{RUNS}/logs/raytrain-brats-p4d")
    assert [name for name in logs_of if name.endswith("/job-driver-rig.log")], logs_of
    assert len({name.split("/")[1] for name in logs_of}) >= 4  # the head, a data node, two that train

    typist.type("ray up cluster/p4d.yaml", replies=SAYS_YES)
    (head,) = rig.instances()
    typist.type("ray up --no-restart cluster/p4d.yaml", replies=SAYS_YES)
    assert [node["InstanceId"] for node in rig.instances()] == [head["InstanceId"]]
    assert f"instance {head['InstanceId']}: raytrain-brats-p4d" in typist.type("raytrain-brats ec2 left")
    typist.type(typed.commands("ec2.md", "On EC2")[-1], replies=SAYS_YES)
    wait(lambda: not rig.instances() and not rig.live, 30, "end of all machines")
    assert "instance" not in typist.type("raytrain-brats ec2 left")


RIG_ONLY: dict[str, tuple[str, ...]] = {
    "head": (),
    "node": (),
    "you": (
        "sts:GetCallerIdentity",  # everybody may
        "service-quotas:GetServiceQuota",  # moto's name for servicequotas
    ),
}


def test_local_machines_by_ssh(rig: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/on-prem.md over three machines: all join, by role; cases are prepared and a run trained to its end."""
    key = rig.ec2.create_key_pair(KeyName="own")["KeyMaterial"]
    private = rig.folder / "home" / ".ssh" / "id_ed25519"
    private.write_text(key)
    private.chmod(0o600)
    in_zone = [{"Name": "availability-zone", "Values": [ZONE]}]
    subnet = rig.ec2.describe_subnets(Filters=in_zone)["Subnets"][0]["SubnetId"]  # moto's own choice has no network
    about = {"ImageId": "ami-12c6146b", "InstanceType": "m6i.4xlarge", "KeyName": "own", "SubnetId": subnet}
    rig.ec2.run_instances(MinCount=3, MaxCount=3, **about)
    wait(lambda: len(rig.live) == 3, 60, "machines")
    write_set(str(rig.shared / "Task01_BrainTumour"), cases=6, seed=0, grid=32, anatomy="procedural")
    head, *workers = [node["PrivateIpAddress"] for node in rig.instances()]
    filled = [
        ("FILL_HEAD", head),
        ("FILL_WORKER_1", workers[0]),
        ("FILL_WORKER_2", workers[1]),
        ("FILL_USER", "ubuntu"),
    ]
    filled += [("~/.ssh/id_ed25519", str(private))]  # to ssh, "~" is not HOME but the user's home
    filled += [("RAYTRAIN_BRATS_RECIPE=segresnet", "RAYTRAIN_BRATS_RECIPE=demo")]
    change(
        rig.checkout / "cluster" / "local.yaml", *filled, SMALL, ("--labels=role=$(", "--num-cpus=1 --labels=role=$(")
    )

    with session(rig, "on-prem.md") as typist:
        typist.transcript.note(
            "cluster/local.yaml has three addresses, user, key and the demo's recipe filled in; machines of one CPU, "
            "small object stores. /mnt/shared is a folder of all, with phantoms."
        )
        *first, down = typed.commands("on-prem.md", "Up, and a job")
        *_, prepared, trained = [typist.type(command, replies=SAYS_YES) for command in first]
        assert "6 cases prepared, 0 set aside" in prepared and "in /mnt/shared/store" in prepared, prepared
        assert "1 to 2 CPU workers" in trained and "done: /mnt/shared/runs/first" in trained, trained
        typist.transcript.note("From the page's first hour, for machines without GPUs.")
        said = typist.type("ray job submit -- python -m raytrain_brats.check_gpus --cpu --workers 2")
        typist.type(down)
    assert "rank 0" in said and "rank 1" in said and "3D convolution" in said and "all-reduce of 256 MiB over 2" in said
    names = {line.split(": ")[1] for line in said.splitlines() if "rank " in line and ": CPU" in line}
    assert len(names) == 2
    assert verify.main(["--run-dir", str(rig.shared / "runs" / "first")]) == 0
    assert "each once, in order" in capsys.readouterr().out
