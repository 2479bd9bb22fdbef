"""This machine alone: one process, or torchrun for several."""

import os
from dataclasses import replace

from launch.backends import torchrun
from launch.backends.nodes import How
from launch.job import Job
from launch.script import Command, Script
from pretrain.errors import UserError


def script(job: Job, how: How) -> Script:
    """The processes of a job on this machine."""
    if job.nodes > 1:
        raise UserError(
            f"local: the profile has {job.nodes} nodes\n  rule: local is this machine alone\n"
            "  cure: --nodes 1, or one of torchrun, deepspeed, accelerate, slurm, docker"
        )
    if job.ranks == 1:
        worker = (job.python, "-m", "pretrain", *job.arguments)
        return Script((Command(worker, job.worker_environment, job.directory),))
    # torchrun would give each rank one core, however many there are.
    threads = max(1, (os.cpu_count() or 1) // job.ranks)
    environment = {"OMP_NUM_THREADS": str(threads)} | job.environment
    job = replace(job, hosts=(), environment=environment)
    return torchrun.script(job, How(restarts=how.restarts))
