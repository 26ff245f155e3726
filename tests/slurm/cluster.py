"""A real SLURM of its own on one machine: four nodes, three partitions, own ports, own keys; nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.ranks import free_port

NODES = ("n1", "n2", "n3", "n4")
GPUS_PER_NODE = 4
HIDDEN = "secret"  # a partition that only root sees

CONF = """
ClusterName=loglinear
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
PlugStackConfig=/dev/null
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=1
KillWait=2
SlurmdTimeout=5
SlurmctldTimeout=30
MessageTimeout=3
MinJobAge=300
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=5 MaxTime=600 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=600 State=UP
PartitionName={hidden} Nodes=n4 Hidden=YES PreemptMode=OFF MaxTime=600 State=UP
"""


PATIENCE = 180.0  # seconds that anything may take on a busy machine
POLL_SECONDS = 0.1  # between looks, each of which may start a process


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Return as soon as `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(POLL_SECONDS)


class Cluster:
    """slurmctld, munged and one slurmd for each of `NODES`, all of them children of this process.

    Attributes:
        environment: what a client needs to talk to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration and start every daemon."""
        self._write()
        self._run("munged", "munged", "--foreground", *self._munge_options())
        wait_until((self.folder / "munge.socket").exists)
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        wait_until(self.takes_jobs)

    def start_controller(self) -> None:
        """Start slurmctld, which goes on from what it knew."""
        self._run("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        wait_until(lambda: answers(self._controller_port))

    def takes_jobs(self) -> bool:
        """Whether all nodes have told the controller what they have, as they do again after it was away."""
        job = ["sbatch", "--test-only", f"--nodes={len(NODES)}", f"--gpus-per-node={GPUS_PER_NODE}", "--wrap=true"]
        return subprocess.run(job, env=os.environ | self.environment, capture_output=True, timeout=60).returncode == 0

    def stop_controller(self) -> None:
        """End slurmctld; jobs go on without it."""
        daemon = self._daemons.pop("slurmctld")
        daemon.terminate()
        daemon.wait()

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node, and take the node back into service."""
        self._run(node, "slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])

    def crash_node(self, node: str) -> None:
        """Kill a node's slurmd and whatever runs on it, as a power cut does."""
        steps = [pid for pid in self.processes() if any(f"/slurmd-{node}.log" in link for link in _open_files(pid))]
        for pid in [*steps, *self.processes(f"SLURMD_NODENAME={node}")]:
            _kill(pid)
        self._daemons.pop(node).wait()

    def revive_node(self, node: str) -> None:
        """Bring a node back that crashed or was set down; returns once it takes jobs again."""
        if node not in self._daemons:
            self.start_node(node)
        self.command("scontrol", "update", f"NodeName={node}", "State=RESUME")
        wait_until(lambda: self.node_state(node) in ("idle", "mixed", "allocated"))

    def lives(self, node: str) -> bool:
        """Whether the node's slurmd was not killed."""
        return node in self._daemons

    def node_state(self, node: str) -> str:
        """What SLURM says of a node; a star at the end means that it does not answer."""
        return self.command("sinfo", "-h", "-N", "-p", "high", "-n", node, "-o", "%T").strip()

    def command(self, *arguments: str) -> str:
        """What a SLURM command says."""
        done = subprocess.run(arguments, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def processes(self, *variables: str) -> list[int]:
        """Processes whose environment holds all `variables` and that belong to this SLURM."""
        wanted = [f"SLURM_CONF={self.environment['SLURM_CONF']}", *variables]
        return [pid for pid, found in _environments() if all(each in found for each in wanted) and pid != os.getpid()]

    def stop(self) -> None:
        """End every job and every daemon; fails if a process is left."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.command("scancel", "--user=root")
            wait_until(lambda: not self.command("squeue", "-h", "-t", "R,CG").strip(), 15)
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        for pid in self.processes():
            _kill(pid)
        wait_until(lambda: not self.processes(), 10)

    def _write(self) -> None:
        self._controller_port, *ports = _free_ports(1 + len(NODES))
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        (self.folder / "state").mkdir()
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        for gpu in range(GPUS_PER_NODE):  # slurmd takes only character devices for GPUs; these are /dev/null's
            os.mknod(self.folder / f"gpu{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS_PER_NODE - 1}]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=8"
            f" RealMemory=8000 Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=True)
        )
        text = CONF.format(hidden=HIDDEN, folder=self.folder, controller_port=self._controller_port, nodes=nodes)
        Path(self.environment["SLURM_CONF"]).write_text(text)

    def _munge_options(self) -> list[str]:
        folder = self.folder
        return [
            "--force",
            f"--socket={folder}/munge.socket",
            f"--key-file={folder}/munge.key",
            f"--pid-file={folder}/munge.pid",
            f"--log-file={folder}/munge.log",
            f"--seed-file={folder}/munge.seed",
        ]

    def _run(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, env=os.environ | self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )


def answers(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> set[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return ports


def _environments() -> Iterator[tuple[int, list[str]]]:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                yield int(entry.name), (entry / "environ").read_bytes().decode(errors="replace").split("\0")


def _open_files(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return []


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
