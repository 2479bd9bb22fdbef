"""A real Slurm on three hosts: its controller on h2, its nodes are h0 and h1.

It is told to be quick (starts within a second, requeues within ten) and needs neither cgroups nor
accounting. Keys, settings and state are on each host's own /run, so this machine has none of them.
"""

import functools
import re
import secrets
import time
from collections.abc import Iterable

from tests import ssh_hosts
from tests.ssh_hosts import SshHosts, missing_programs

CONTROLLER, NODES = 2, (0, 1)
PACKAGES = {
    "sbatch": "slurm-wlm",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "munged": "munge",
}
_PATIENCE_SECONDS = 30
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE"}

# A requeued job waits for twice the life of a credential: 121 s with Slurm's default. A node that
# says nothing for SlurmdTimeout is down. Two ranks per node fit whatever this machine has.
_SETTINGS = """
ClusterName=tests
SlurmctldHost=h2
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile=/run/slurm/slurmctld.log
SlurmdLogFile=/run/slurm/slurmd.log
SlurmdTimeout=15
KillWait=5
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
NodeName=h[0-1] CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# slurmd 22.05 ends where it finds no cgroups by itself, though nothing here uses them.
_CGROUPS = "CgroupPlugin=cgroup/v1\n"


@functools.cache
def reason_missing() -> str | None:
    """Why Slurm cannot be had on this machine, or None where it can."""
    return ssh_hosts.reason_missing() or missing_programs(PACKAGES)


class SlurmHosts(SshHosts):
    """Three hosts with Slurm from `with` on; `run` gives its commands, on any of them."""

    def __init__(self):
        super().__init__(3)
        self._munge_key = secrets.token_bytes(128)

    def __enter__(self) -> "SlurmHosts":
        super().__enter__()
        try:
            self.wait_idle()
        except BaseException:
            self.close()
            raise
        return self

    def boot(self, i: int) -> None:
        """Host `i` up, with its part of Slurm; the controller comes back without its jobs."""
        super().boot(i)
        for folder in ("state", "spool", "etc"):
            self.folder(i, f"/run/slurm/{folder}")
        settings = self.folder(i, "/run/slurm/etc")
        (settings / "slurm.conf").write_text(_SETTINGS)
        (settings / "cgroup.conf").write_text(_CGROUPS)
        self.mount(i, "/run/slurm/etc", "/etc/slurm")
        munge = self.folder(i, "/run/munge")
        (munge / "key").touch(0o600)
        (munge / "key").write_bytes(self._munge_key)
        own = ("key-file", "key"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed")
        files = [f"--{option}=/run/munge/{name}" for option, name in own]
        self._daemon(i, ["munged", "--socket=/run/munge/munge.socket.2", *files])
        self._daemon(i, [_daemon_of(i)])

    # --- jobs -------------------------------------------------------------------------------------

    def job(self, number: int | str) -> dict[str, str]:
        """All that Slurm knows of a job, as in {"JobState": "PENDING", "Restarts": "1", ...}."""
        code, text = self.run(CONTROLLER, ["scontrol", "show", "job", "-o", str(number)])
        if code:
            raise RuntimeError(f"no job {number}: {text}")
        # Values hold spaces and `=`, but no space, name in capitals and `=` in this order.
        pairs = (pair.partition("=") for pair in re.split(r" (?=[A-Z][\w:/]*=)", text.strip()))
        return {name: value.strip() for name, _, value in pairs}

    def wait_job(
        self, number: int | str, states: str | Iterable[str], limit_seconds: float
    ) -> dict[str, str]:
        """The job once it is in one of `states`; an AssertionError where that cannot be or lasts.

        By polling, since `sbatch --wait` looks only every half minute.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + limit_seconds
        while (job := self.job(number))["JobState"] not in wanted:
            assert job["JobState"] not in _ENDED, f"not {wanted} but {job}"
            assert time.monotonic() < deadline, f"not {wanted} in {limit_seconds} s but {job}"
            time.sleep(0.2)
        return job

    def wait_idle(self, limit_seconds: float = _PATIENCE_SECONDS) -> None:
        """Until both nodes are there and have nothing to do."""
        deadline = time.monotonic() + limit_seconds
        states = ["sinfo", "--noheader", "--Node", "--format=%t"]
        while (found := self.run(CONTROLLER, states)[1].split()) != ["idle"] * len(NODES):
            assert time.monotonic() < deadline, f"nodes of Slurm: {found}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """What the daemons of Slurm wrote, for messages of failing tests."""
        logs = {i: f"/run/slurm/{_daemon_of(i)}.log" for i in (*NODES, CONTROLLER)}
        return "\n".join(self.run(i, ["tail", "-n20", log])[1] for i, log in logs.items())

    def _daemon(self, i: int, command: list[str]) -> None:
        """Each goes into the background by itself once it is ready."""
        code, text = self.run(i, command)
        if code:
            raise RuntimeError(f"no {command[0]} on h{i}: {text}")


def _daemon_of(i: int) -> str:
    return "slurmctld" if i == CONTROLLER else "slurmd"
