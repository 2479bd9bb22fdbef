"""Which rank this process is and where the ranks meet, as its launcher tells by the environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.errors import UserError

# Variables by launcher: rank, ranks in all, rank on this host, ranks on this host. The first whose
# rank is there counts: torchrun and mpirun inside a job set their own.
_LAUNCHERS = {
    "torchrun, deepspeed, accelerate": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                 "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}  # fmt: skip
_JOIN_SECONDS = 600
_FIRST_PORT, _PORTS = 12_000, 20_000  # below those that the kernel hands out itself


@dataclass(frozen=True)
class Placement:
    """The place of a process among those of its run.

    `hosts` are those that the launcher has named, by rank of the node (empty: it has named none);
    `host_ranks` how many ranks each of them has.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master: tuple[str, int] = ("localhost", 29500)
    hosts: tuple[str, ...] = ()
    host_ranks: tuple[int, ...] = ()
    join_seconds: int = _JOIN_SECONDS

    def host_of(self, rank: int) -> str:
        """The host that a rank is to run on; empty where nobody has said."""
        for host, ranks in zip(self.hosts, self.host_ranks, strict=True):
            if rank < ranks:
                return host
            rank -= ranks
        return ""


def placement(environment: Mapping[str, str] = os.environ) -> Placement:
    """What the environment says; one rank where it says nothing. Raises UserError where it
    contradicts itself or the launch."""
    told = [(launcher, names) for launcher, names in _LAUNCHERS.items()
            if names[0] in environment and names[1] in environment]  # fmt: skip
    launcher = told[0][0] if told else "no launcher"
    found = _told(environment, told[0][1]) if told else _alone(environment)
    wanted = environment.get("ANTHESIS_RANKS")
    if wanted is not None and int(wanted) != found.size:
        raise UserError(
            f"this run has {found.size} rank(s) by the variables of {launcher}\n"
            f"  rule: the launch asked for {wanted}\n"
            "  cure: look at the launcher's output for nodes that did not come; start again"
        )
    return found


def _told(environment: Mapping[str, str], names: tuple[str, ...]) -> Placement:
    rank, size = int(environment[names[0]]), int(environment[names[1]])
    hosts, ranks = (), ()
    if names[0] == "SLURM_PROCID":
        hosts = expand_hosts(environment.get("SLURM_STEP_NODELIST", ""))
        ranks = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        if sum(ranks) != size:  # of one part of a step in several, whose numbers are of them all
            hosts, ranks = (), ()
        node = int(environment.get("SLURM_NODEID", 0))
        local_size = ranks[node] if node < len(ranks) else 1
    else:
        # deepspeed has a name of its own for it.
        local_size = int(environment.get(names[3]) or environment.get("LOCAL_SIZE") or 1)
        hosts = tuple(filter(None, environment.get("ANTHESIS_HOSTS", "").split(",")))
        ranks = (size // len(hosts),) * len(hosts) if hosts else ()
    return Placement(
        rank,
        size,
        int(environment.get(names[2], 0)),
        local_size,
        _master(environment, hosts, size),
        hosts if len(hosts) == len(ranks) else (),
        ranks if len(hosts) == len(ranks) else (),
        int(environment.get("ANTHESIS_JOIN_TIMEOUT", _JOIN_SECONDS)),
    )


def _master(environment: Mapping[str, str], hosts: tuple[str, ...], size: int) -> tuple[str, int]:
    address = environment.get("MASTER_ADDR") or (hosts[0] if hosts else "")
    port = environment.get("MASTER_PORT")
    if port is None and "SLURM_JOB_ID" in environment:  # two jobs of a node, or steps, do not meet
        step = int(environment.get("SLURM_STEP_ID", 0)) % 8
        port = str(_FIRST_PORT + (8 * int(environment["SLURM_JOB_ID"]) + step) % _PORTS)
    if size > 1 and not (address and port):
        raise UserError(
            f"{size} ranks, but MASTER_ADDR={address or '(not set)'}, MASTER_PORT="
            f"{port or '(not set)'}\n  rule: ranks have to know where they meet\n"
            "  cure: export both, the same for all ranks: a host that all reach, and a free port"
        )
    return address or "localhost", int(port or 29500)


def _alone(environment: Mapping[str, str]) -> Placement:
    """No launcher has set a rank: one process, unless something says that there are to be more."""
    hints = ("MASTER_ADDR", "WORLD_SIZE", "PMI_SIZE")
    if found := [f"{name}={environment[name]}" for name in hints if name in environment]:
        raise UserError(
            f"{', '.join(found)}, but no RANK\n"
            "  rule: each process of several is told its rank (RANK and WORLD_SIZE), or each would "
            "train by itself\n"
            "  cure: `anthesis launch`, torchrun, deepspeed or srun; for one process unset them"
        )
    return Placement()


def expand_hosts(text: str) -> tuple[str, ...]:
    """Slurm's list of hosts, such as "a1,b[01-03,7]-ib", written out."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names = [""]
        for plain, inside in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            choices = [plain] if plain else [n for r in inside.split(",") for n in _numbers(r)]
            names = [name + choice for name in names for choice in choices]
        hosts += names
    return tuple(hosts)


def _numbers(text: str) -> list[str]:
    first, _, last = text.partition("-")
    if not last:
        return [first]
    return [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]


def expand_counts(text: str) -> tuple[int, ...]:
    """Slurm's counts by node, such as "4(x2),3", written out: 4, 4, 3."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return tuple(int(count) for count, times in found for _ in range(int(times or 1)))
