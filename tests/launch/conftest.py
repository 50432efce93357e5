"""A real Slurm cluster of one node, from the packages `slurm-wlm` and `munge`, without systemd or a database."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.sock,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=30
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 GraceTime=120 State=UP MaxTime=INFINITE
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF State=UP MaxTime=INFINITE
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Brings the cluster up; gives the environment in which its commands find it."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {missing[0]} here: apt-get install slurm-wlm munge")
    if os.geteuid():
        pytest.skip("slurmd and slurmctld of this cluster run as root")
    place = tmp_path_factory.mktemp("slurm")
    place.chmod(0o755)
    (place / "state").mkdir(), (place / "spool").mkdir()
    (place / "munge.key").write_bytes(os.urandom(1024))
    (place / "munge.key").chmod(0o400)
    conf = place / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname().split(".")[0], place=place, ports=free_ports(2)))
    munge = [f"--{name}={place}/munge.{end}" for name, end in (("key-file", "key"), ("socket", "sock"))]
    munge += [f"--{name}={place}/munge.{end}" for name, end in (("pid-file", "pid"), ("log-file", "log"))]
    environment = {"SLURM_CONF": str(conf)}
    commands = [["munged", "--force", *munge, f"--seed-file={place}/munge.seed"]]
    commands += [["slurmctld", "-f", str(conf)], ["slurmd", "-f", str(conf)]]
    try:
        for command in commands:
            subprocess.run(command, check=True, env=os.environ | environment, capture_output=True)
        stop = time.time() + 30
        while b"idle" not in subprocess.run(["sinfo"], capture_output=True, env=os.environ | environment).stdout:
            assert time.time() < stop, (place / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.1)
        yield environment
    finally:
        subprocess.run(["scancel", "--me", "--signal=KILL"], env=os.environ | environment, capture_output=True)
        for name in ("slurmd", "slurmctld", "munge"):
            if (file := place / f"{name}.pid").is_file():
                os.kill(int(file.read_text()), signal.SIGTERM)
