"""The configuration files of the test cluster, as text.

Not here: starting anything. Times are short where a site's are long: a requeued job may start
again after CREDENTIAL_S instead of 120 s, a silent node is down after SILENCE_S instead of 300. The
nodes share the machine's /tmp, but not what Slurm calls TmpFS: mpi/pmix keeps sockets there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["slurm_conf", "slurmdbd_conf"]

# Slurm keeps a requeued job back for the life of a credential: its tasks could still start with it.
CREDENTIAL_S = 6
SILENCE_S = 6
CPUS = 2  # what launch/submit.sbatch asks for: one job at a time on a node


def slurm_conf(
    folder: Path, head: str, nodes: Mapping[str, str], partitions: Mapping[str, str]
) -> str:
    """slurm.conf for `nodes` (name to address), a controller at `head`, and `partitions`.

    A node has CPUS cores whatever the machine has. The first partition is the default one.
    """
    socket = folder / "munge/socket"
    lines = [
        f"NodeName={name} NodeAddr={address} CPUs={CPUS} RealMemory=8000 State=UNKNOWN"
        for name, address in nodes.items()
    ]
    default = next(iter(partitions))
    lines += [
        f"PartitionName={name} Nodes={members} Default={'YES' if name == default else 'NO'} "
        "MaxTime=INFINITE OverSubscribe=NO State=UP"
        for name, members in partitions.items()
    ]
    return f"""\
ClusterName=lab
SlurmctldHost=head({head})
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire={CREDENTIAL_S}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
TmpFS={folder}/tmp.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
SlurmdTimeout={SILENCE_S}
MessageTimeout=5
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
KillWait=5
InactiveLimit=0
WaitTime=0
JobRequeue=1
PropagateResourceLimitsExcept=MEMLOCK,CORE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=head
AccountingStoragePort=16819
AccountingStoragePass={socket}
{chr(10).join(lines)}
"""


def slurmdbd_conf(folder: Path, head: str) -> str:
    """slurmdbd.conf: it stands beside slurm.conf, where slurmdbd looks for it."""
    return f"""\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=head
DbdAddr={head}
DbdPort=16819
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
DebugLevel=info
"""
