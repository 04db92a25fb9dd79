"""Machines for rigs: every instance that a moto EC2 runs gets a body made of Linux namespaces.

In: root, iproute2, sshd, rsync; a folder.
Out: machines that answer by SSH where EC2 says they are, with IMDSv2 and their role's credentials; what EC2 ends dies
at once. The network is a namespace without a way out: nothing in it reaches this machine's network, or is reached.
"""

import contextlib
import ctypes
import datetime
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import ClientError

from tests.support import ROOT

GATEWAY, PORT = "172.31.0.1", 5000
ENDPOINT = f"http://{GATEWAY}:{PORT}"
REGION = "us-west-2"
TOOLS = ("ip", "unshare", "setsid", "sshd", "ssh", "ssh-keygen", "rsync", "mount")
KEYS = {
    "head": "ASIAHEAD000000000000",
    "node": "ASIANODE000000000000",
    "you": "AKIALAUNCHER00000000",
    "owner": "AKIAOWNER00000000000",
}
"""Access keys by who has them: moto's log of calls tells by them who called."""
SHIMS = ("apt-get", "lsblk", "lspci", "mdadm", "mkfs.xfs", "nvidia-smi", "systemctl")
"""What a node's setup might call, and must not find here: it would act on this machine's own disks."""
CLONED = ("cluster", "docs", "raytrain_brats", "constraints.txt", "pyproject.toml", "LICENSE", "README.md")
_CLONE_NEWNET = 0x40000000


def missing() -> str:
    """Why machines cannot be made here; empty when they can."""
    if os.geteuid() != 0:
        return "root is needed for network and mount namespaces"
    if absent := [tool for tool in TOOLS if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]:
        return f"not installed: {', '.join(absent)} (apt-get install openssh-server rsync iproute2)"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Within, this thread and all that it starts live in a network of their own: a bridge and loopback."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    try:
        for command in (
            "link set lo up",
            "link add rig type bridge",
            f"addr add {GATEWAY}/16 dev rig",
            "link set rig up",
        ):
            _ip(*command.split())
        yield
    finally:
        libc.setns(before, _CLONE_NEWNET)
        os.close(before)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def tool(name: str) -> Path:
    """A command of the Python environment that runs this, or of one it is laid over."""
    places = [Path(sys.executable).parent, *(p.parents[2] / "bin" for p in map(Path, sys.path) if len(p.parents) > 2)]
    return next(place / name for place in places if (place / name).exists())


@dataclass
class Machine:
    process: "subprocess.Popen[bytes]"
    folder: Path


class Machines:
    """A moto server in the rig's network and the bodies of its instances, below one folder; a user's home and clone of
    this checkout too, and a folder that all machines see as /mnt/shared."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.live = folder, dict[str, Machine]()
        self.checkout, self.shared = folder / "raytrain_brats", folder / "shared"
        self.errors: list[str] = []
        for made in (self.shared, folder / "home" / ".ssh", folder / "bin"):
            made.mkdir(parents=True)
        for name in CLONED:
            subprocess.run(["rsync", "-a", "--exclude=__pycache__", ROOT / name, self.checkout], check=True)
        with (folder / "moto.log").open("wb") as log:
            command = [sys.executable, "-m", "tests.support.moto_server", GATEWAY, str(PORT), str(folder)]
            environment = self.environment("owner") | {"PYTHONPATH": str(ROOT)}
            self.moto = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.ec2 = self.client("ec2")
        self._wait_for_moto()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def environment(self, who: str) -> dict[str, str]:
        """Of "you" or the "owner" of the account, at the root of the clone."""
        names = {"AWS_ACCESS_KEY_ID": KEYS[who], "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": REGION}
        path = f"{self.folder / 'bin'}:{tool('ray').parent}:/usr/sbin:{os.environ['PATH']}"
        own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RAYTRAIN_"))}
        # HOME and Ray's caches are the rig's: SSH keys, the token and all else of this machine's user stay as they are
        places = {"HOME": str(self.folder / "home"), "RAY_TMPDIR": str(self.folder), "TMPDIR": str(self.folder)}
        places["LOGNAME"] = (
            self.folder.name
        )  # Ray's ssh connections, kept in /tmp by user and address, are another rig's
        return own | names | places | {"AWS_ENDPOINT_URL": ENDPOINT, "PYTHONPATH": str(self.checkout), "PATH": path}

    def client(self, service: str) -> Any:
        keys = {"aws_access_key_id": KEYS["owner"], "aws_secret_access_key": "s"}
        return boto3.client(service, REGION, endpoint_url=ENDPOINT, **keys)

    def _wait_for_moto(self) -> None:
        for _ in range(120):
            with contextlib.suppress(Exception):
                self.ec2.describe_subnets()
                return
            time.sleep(0.5)
        raise AssertionError((self.folder / "moto.log").read_text())

    def instances(self, kind: str = "") -> list[dict[str, Any]]:
        """Instances that run, or those of one Ray node type."""
        filters = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
        filters += [{"Name": "tag:ray-user-node-type", "Values": [kind]}] if kind else []
        found = self.ec2.describe_instances(Filters=filters)["Reservations"]
        return [instance for reservation in found for instance in reservation["Instances"]]

    def calls(self, who: str) -> set[str]:
        """Actions that were asked of AWS with one's credentials."""
        lines = map(json.loads, (self.folder / "calls.jsonl").read_text().splitlines())
        return {line["action"] for line in lines if line["who"] == KEYS[who]}

    def notice(self, instance: str, within_s: float) -> None:
        """A spot interruption notice; the machine goes when its time is up."""
        when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=within_s)
        self._tell(instance, spot_action={"action": "terminate", "time": f"{when:%Y-%m-%dT%H:%M:%SZ}"})
        end = threading.Timer(within_s, self._take, [instance])
        end.daemon = True
        end.start()

    def _take(self, instance: str) -> None:
        with contextlib.suppress(ClientError):  # Ray, whose node was drained, has ended it already
            self.ec2.terminate_instances(InstanceIds=[instance])

    def _shut_down(self, instance: str) -> None:
        """What EC2 does with a machine that shut itself down."""
        attribute = "instanceInitiatedShutdownBehavior"
        said = self.ec2.describe_instance_attribute(InstanceId=instance, Attribute=attribute)
        ends = said["InstanceInitiatedShutdownBehavior"]["Value"] == "terminate"
        (self.ec2.terminate_instances if ends else self.ec2.stop_instances)(InstanceIds=[instance])

    def _tell(self, instance: str, **facts: Any) -> None:
        path = self.live[instance].folder / "state.json"
        text = json.dumps(json.loads(path.read_text()) | facts)
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").rename(path)

    def _follow(self) -> None:
        while not self._done.wait(1):
            try:
                wanted = {instance["InstanceId"]: instance for instance in self.instances()}
                for name in self.live.keys() - wanted.keys():
                    self._end(name)
                for name, instance in wanted.items():
                    role = (instance.get("IamInstanceProfile") or {}).get("Arn", "").rsplit("-", 1)[-1]
                    if name not in self.live:
                        self._start(instance)
                    self._tell(name, role=role, key=KEYS.get(role, ""))  # moto attaches it a moment later
                    if (self.live[name].folder / "shut-down").exists():
                        self._shut_down(name)
            except Exception as error:  # noqa: BLE001 - the test looks at them
                self.errors.append(repr(error))

    def _start(self, instance: dict[str, Any]) -> None:
        name, ip = instance["InstanceId"], instance["PrivateIpAddress"]
        folder = self.folder / name
        (folder / "disk").mkdir(parents=True)
        key = self.ec2.describe_key_pairs(KeyNames=[instance["KeyName"]], IncludePublicKey=True)["KeyPairs"][0]
        site = [Path(place) for place in sys.path if place.endswith("site-packages")]
        binds = sorted({ROOT, Path(sys.prefix), Path(sys.base_prefix), *site, tool("ray").parents[1]})
        state = {"id": name, "type": instance["InstanceType"], "ip": ip, "region": REGION, "role": "", "key": ""}
        # what `ray up` has copied, as `pip install` of it would have it
        profile = {"PATH": f"{tool('ray').parent}:$PATH", "PYTHONPATH": "/home/ubuntu/raytrain_brats"}
        profile |= {"AWS_ENDPOINT_URL": ENDPOINT}
        public = instance.get("PublicIpAddress", "")
        files = {
            "authorized_keys": key["PublicKey"],
            "state.json": json.dumps(state | {"zone": instance["Placement"]["AvailabilityZone"], "spot_action": None}),
            "binds": "\n".join(map(str, binds)),
            "shims": "\n".join(SHIMS),
            "public": public,
            "profile": "\n".join(f"export {key}={value}" for key, value in profile.items()),
        }
        for file, text in files.items():
            (folder / file).write_text(f"{text}\n" if text else "")
        apart = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        script = [str(Path(__file__).with_name("machine.sh")), str(folder), ip, GATEWAY, str(tool("python").resolve())]
        with (folder / "boot.log").open("wb") as log:
            process = subprocess.Popen([*apart, *script], stdout=log, stderr=log, start_new_session=True)
        self.live[name] = Machine(process, folder)
        own, theirs = (f"/proc/{pid}/ns/net" for pid in ("thread-self", process.pid))
        while os.readlink(own) == os.readlink(theirs):
            time.sleep(0.05)
        cable = f"c{name[-10:]}"
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        _ip("link", "set", cable, "master", "rig", "up")
        if public:
            _ip("route", "replace", f"{public}/32", "via", ip, "dev", "rig")

    def _end(self, name: str) -> None:
        machine = self.live.pop(name)
        machine.process.kill()  # its first child, and with it all that runs there, goes with it
        machine.process.wait()

    def close(self) -> None:
        self._done.set()
        self._thread.join(10)
        for name in list(self.live):
            self._end(name)
        self.moto.terminate()
        self.moto.wait()
