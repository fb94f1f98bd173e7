"""A Slurm cluster of this one machine, in a folder: munged, slurmctld and slurmd of Debian's
slurm-wlm and munge.

No accounting, so `sacct` fails as it does where there is no slurmdbd.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def lacking() -> str:
    """Why no cluster can be started here; empty if it can."""
    missing = [
        p for p in PROGRAMS if shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if missing:
        return f"{missing[0]} is not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmctld and slurmd need root"


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def until(done: Callable[[], object], what: str, seconds: float = 30) -> None:
    for _ in range(int(seconds / 0.2)):
        if done():
            return
        time.sleep(0.2)
    raise TimeoutError(what)


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A running cluster; yields the environment that its commands need. Everything it starts ends
    with it."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    config = CONFIG.format(folder=folder, host=host, ports=free_ports(2), cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(config.lstrip())
    environment = {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ['PATH']}:/usr/sbin",
    }
    munge = [
        f"--{name}={folder}/munge.{name.partition('-')[0]}"
        for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")
    ]
    daemons = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    ]
    running: list[subprocess.Popen] = []
    try:
        for daemon in daemons:
            log = (folder / f"{daemon[0]}.out").open("w")
            running.append(subprocess.Popen(daemon, env=environment, stdout=log, stderr=log))
            if daemon[0] == "munged":
                until((folder / "munge.socket").exists, "munged did not start")
        until(
            lambda: "idle" in asked(environment, "sinfo", "-h", "-o", "%t"),
            "the node did not come up",
        )
        yield environment
    finally:
        asked(environment, "scancel", "--user", "root")
        for daemon in reversed(running):
            daemon.terminate()
            daemon.wait()


def asked(environment: dict[str, str], *command: str) -> str:
    """What a command of Slurm says."""
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=30
    ).stdout
