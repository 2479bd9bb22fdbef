"""torchrun: one agent a node, which starts the node's ranks; static, or a range of nodes."""

from dataclasses import replace

from launch.backends.nodes import How, each_node
from launch.job import Job
from launch.script import Script
from pretrain.errors import UserError


def script(job: Job, how: How) -> Script:
    """The agents of a job."""
    if how.elastic:
        return _elastic(job, how)
    where = ["--standalone"]
    if job.nodes > 1:
        where = ["--nnodes", str(job.nodes), "--master-addr", job.master,
                 "--master-port", str(job.port)]  # fmt: skip

    def arguments(rank: int) -> list[str]:
        return _agent(job, how, [*where, *(["--node-rank", str(rank)] if job.nodes > 1 else [])])

    return each_node(job, how, arguments)


def _elastic(job: Job, how: How) -> Script:
    """Agents that go on with fewer nodes, and take up new ones: the ranks start again and resume
    from the newest checkpoint."""
    least, most = how.elastic or (1, 1)
    if not 1 <= least <= most:
        raise UserError(
            f"--elastic {least}:{most}\n  rule: LEAST:MOST nodes, at least 1\n"
            f"  cure: for example --elastic 1:{job.nodes}"
        )
    meeting = ["--nnodes", f"{least}:{most}", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", f"{job.master}:{job.port}", "--rdzv-id", job.config.name,
               "--rdzv-conf",
               f"join_timeout={job.site.launch.join_timeout.value}"]  # fmt: skip
    job_script = each_node(job, how, lambda rank: _agent(job, how, meeting))
    for command in job_script.commands:
        for name in ("ANTHESIS_RANKS", "ANTHESIS_HOSTS"):  # there is no one number, no one order
            command.environment.pop(name, None)
    return replace(job_script, least=min(least, len(job_script.commands)))


def _agent(job: Job, how: How, where: list[str]) -> list[str]:
    return [
        *(job.python, "-m", "torch.distributed.run", *where),
        *("--nproc-per-node", str(job.ranks_per_node), "--max-restarts", str(how.restarts)),
        *("-m", "pretrain", *job.arguments),
    ]
