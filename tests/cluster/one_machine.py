"""A real Slurm on this machine: controller, munge and several node daemons on loopback.

It is started as root, without systemd, and lives in one folder. There is no accounting database,
as on many small clusters, so there is no `sacct`. Each node has this machine's cores and eight
files that stand for GPUs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
SETTINGS = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again waits until its credential has expired.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
MinJobAge=3600
KillWait=20
GresTypes=gpu
{plugins}
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] \
CPUs={cores} RealMemory=4000 Gres=gpu:8 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def install() -> str:
    """Install Debian's Slurm where there is none; returns why not, or nothing."""
    if shutil.which("slurmctld") and shutil.which("munged"):
        return ""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "no Slurm, and no root on a Debian to install it"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", *words], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            return f"apt-get {words[0]}: {done.stderr[-500:]}"
    return ""


class Cluster:
    """A running cluster; `close` ends its daemons and nothing else."""

    def __init__(self, folder: Path, nodes: int = 2, plugins: str = "") -> None:
        """
        Args:
            folder: a new folder; every folder above it can be entered by the user munge.
            plugins: further lines of slurm.conf.
        """
        self.folder = folder
        self.nodes = nodes
        self.configuration = folder / "slurm.conf"
        self._host = socket.gethostname().partition(".")[0]
        folder.mkdir(parents=True)
        self._write(plugins)
        self._start()

    @property
    def environment(self) -> dict[str, str]:
        """What makes Slurm's commands speak to this cluster."""
        return {"SLURM_CONF": str(self.configuration)}

    def run(self, *words: str) -> str:
        """Run one of Slurm's commands; returns what it prints."""
        done = subprocess.run(
            words, env={**os.environ, **self.environment}, capture_output=True, text=True,
            check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def close(self) -> None:
        """Cancel what runs, and end the daemons; they are gone when this returns."""
        self.run("scancel", "--user=root", "--full", "--signal=KILL")
        self.run("scancel", "--user=root")
        files = [*self.folder.glob("slurmd.*.pid"), self.folder / "slurmctld.pid"]
        files += [self.folder / "munge" / "pid"]
        pids = [int(path.read_text(encoding="ascii")) for path in files if path.exists()]
        _signal(pids, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            if time.monotonic() > deadline:
                _signal(pids, signal.SIGKILL)
            time.sleep(0.2)

    def _write(self, plugins: str) -> None:
        for name in ("state", "munge", *(f"spool.n{i + 1}" for i in range(self.nodes))):
            (self.folder / name).mkdir()
        gpus = [self.folder / f"gpu{i}" for i in range(8)]
        for path in gpus:
            path.touch()
        ports = _free_ports(1 + self.nodes)
        text = SETTINGS.format(
            host=self._host, port=ports[0], folder=self.folder, plugins=plugins, nodes=self.nodes,
            first=ports[1], last=ports[1] + self.nodes - 1, cores=os.cpu_count(),
        )  # fmt: skip
        self.configuration.write_text(text, encoding="utf-8")
        line = f"NodeName=n[1-{self.nodes}] Name=gpu File={self.folder}/gpu[0-7]"
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{line}\n", encoding="utf-8")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n", encoding="utf-8")

    def _start(self) -> None:
        munge = self.folder / "munge"
        shutil.chown(munge, "munge", "munge")
        options = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{name}={munge / file}" for name, file in options.items()]
        _check("runuser", "-u", "munge", "--", "munged", *words)
        _check("slurmctld", "-f", str(self.configuration))
        for node in range(1, self.nodes + 1):
            _check("slurmd", "-f", str(self.configuration), "-N", f"n{node}")
        deadline = time.monotonic() + 60
        while self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() != str(self.nodes):
            assert time.monotonic() < deadline, self.run("sinfo", "-N", "-o", "%N %T %E")
            time.sleep(0.3)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _check(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stderr}"


def _free_ports(count: int) -> list[int]:
    """Consecutive ports of which the first was free a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        first = int(free.getsockname()[1])
    return [first + i for i in range(count)]
