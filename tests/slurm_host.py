"""Slurm on this one host, for tests: munge, a controller and a node of this user's own, in a folder of their own.

    python tests/slurm_host.py up FOLDER      # then: export SLURM_CONF=FOLDER/slurm.conf PATH=FOLDER/bin:$PATH
    python tests/slurm_host.py down FOLDER

No accounting, no cgroups, nothing of the system's is read or changed. Debian and Ubuntu: apt-get install slurm-wlm."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
DAEMONS = ("slurmd", "slurmctld", "munged")
# the system's programs first: the PATH may lead to the wrappers of another Slurm of this script's
PATH = os.pathsep.join(("/usr/bin", "/usr/sbin", os.environ.get("PATH", "")))
PLUGIN = "snakemake_executor_plugin_slurm"
CONF = """
ClusterName=promptnb
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1,sched_interval=2
MpiDefault=none
ReturnToService=2
MinJobAge=300
KillWait=30
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=64000 Gres=gpu:1 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=7-0 State=UP
"""


def lacking():
    "Why Slurm cannot be brought up here, in words; '' if it can."
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    return f"Slurm is not installed (no {', '.join(absent)}): apt-get install slurm-wlm" if absent else ""


def free_ports(n):
    "Ports that nothing listens on."
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def call(*command, **env):
    "The output of a command, which must succeed."
    p = subprocess.run(command, env={**os.environ, "PATH": PATH, **env}, capture_output=True, text=True, timeout=60)
    if p.returncode:
        raise RuntimeError(f"{command[0]} ended with {p.returncode}: {(p.stderr or p.stdout).strip()}")
    return p.stdout


def wait_until(done, seconds, what):
    "Ask every 0.2 s; a RuntimeError says what did not come."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done():
            return
        time.sleep(0.2)
    raise RuntimeError(f"{what} did not come in {seconds} s")


def up(folder, cpus=2):
    "Start munged, slurmctld and slurmd; returns the path of slurm.conf once the node takes jobs."
    folder = Path(folder).resolve()
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = dict(key=key, socket=folder / "munge.socket", pid=folder / "munged.pid", log=folder / "munged.log")
    options = [f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in files.items()]
    call("munged", "--force", f"--seed-file={folder}/munge.seed", *options)

    host, conf = socket.gethostname().split(".")[0], folder / "slurm.conf"
    conf.write_text(
        CONF.format(folder=folder, host=host, user=getpass.getuser(), ports=free_ports(2), cpus=cpus).lstrip()
    )
    for name in ("srun", "scontrol"):  # Snakemake's plugin clears SLURM_CONF inside of a job
        wrapper = folder / "bin" / name
        wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which(name, path=PATH)} "$@"\n')
        wrapper.chmod(0o755)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    call("slurmctld", "-f", str(conf), SLURM_CONF=str(conf))
    call("slurmd", "-f", str(conf), SLURM_CONF=str(conf))

    def idle():
        p = subprocess.run(
            ["sinfo", "-h", "-o", "%t"], env={**os.environ, "SLURM_CONF": str(conf)}, capture_output=True
        )
        return p.stdout.strip() == b"idle"

    wait_until(idle, 30, f"a node of {conf}")
    return conf


def down(folder):
    "End the daemons that `up` started, and the jobs."
    folder = Path(folder).resolve()
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with_jobs = ["scancel", "--user", getpass.getuser()]
    subprocess.run(with_jobs, env=env, capture_output=True, timeout=30, check=False)
    pids = [pid for pid in (pid_of(folder / f"{name}.pid") for name in DAEMONS) if pid]
    for sign, seconds in ((signal.SIGTERM, 3), (signal.SIGKILL, 3)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
        with contextlib.suppress(RuntimeError):
            wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), seconds, "the end of Slurm")


def pid_of(pid_file):
    "The number in a pid file; 0 where there is none."
    try:
        return int(pid_file.read_text())
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    what, where = sys.argv[1:]
    print({"up": up, "down": down}[what](where) or "")
