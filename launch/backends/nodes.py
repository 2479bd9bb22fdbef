"""What backends share that start one command a node."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.job import Job
from launch.script import Command, Script
from pretrain.errors import UserError


@dataclass(frozen=True)
class How:
    """The options of a launch that say how its processes come to the nodes."""

    ssh: bool = True
    node_rank: int | None = None
    elastic: tuple[int, int] | None = None  # least and most nodes
    restarts: int = 0
    accelerate_config: Path | None = None


def each_node(
    job: Job,
    how: How,
    arguments: Callable[[int], list[str]],
    after: Callable[[int], tuple[str, ...]] = lambda rank: (),
) -> Script:
    """`arguments(node rank)` on every node, and `after` it: over ssh, or only this node's part."""
    environment = job.worker_environment

    def command(rank: int, host: str | None) -> Command:
        return Command(tuple(arguments(rank)), environment, job.directory, host, after(rank))

    if job.nodes == 1 and not (job.hosts and how.ssh):
        return Script((command(0, None),))
    if how.ssh and how.node_rank is None and job.hosts:
        hosts = [None if is_here(host) else host for host in job.hosts]
        return Script(tuple(command(rank, host) for rank, host in enumerate(hosts)))
    return Script((command(rank_here(job, how), None),))


def rank_here(job: Job, how: How) -> int:
    """The rank of this node; raises UserError where nothing tells it."""
    if how.node_rank is not None:
        if not 0 <= how.node_rank < job.nodes:
            raise UserError(
                f"--node-rank {how.node_rank}: the job has {job.nodes} nodes\n"
                f"  rule: nodes are counted from 0\n  cure: 0 to {job.nodes - 1}, or --nodes"
            )
        return how.node_rank
    here = [rank for rank, host in enumerate(job.hosts) if is_here(host)]
    if len(here) != 1:
        raise UserError(
            f"{socket.gethostname()}: which of the {job.nodes} nodes is this?\n"
            f"  rule: one of launch.hosts = {', '.join(job.hosts) or '(none)'} is its name, or "
            "--node-rank says it\n"
            f"  cure: --node-rank 0 to {job.nodes - 1}, another on each node; or name the hosts"
        )
    return here[0]


def is_here(host: str) -> bool:
    """Whether `host` is a name of this machine."""
    name = socket.gethostname()
    return host in ("localhost", "127.0.0.1", name, name.split(".")[0], socket.getfqdn())
