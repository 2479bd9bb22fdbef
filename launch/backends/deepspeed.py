"""The deepspeed launcher: a host file and pdsh from one node, or `--no_ssh` on each.

Its pdsh runner joins a line of shell by itself: it quotes arguments only where they contain a
space, and then so that `$` still works; the working directory not at all. So what needs quoting is
given to the worker encoded, or refused.
"""

import base64
import json
import re
from collections.abc import Iterable

from launch.backends.nodes import How, each_node
from launch.job import Job
from launch.script import Command, Script
from pretrain.errors import UserError

_PLAIN = re.compile(r"[\w@+=:,./-]+")  # pdsh puts hosts and numbers in for %h, %n, %u
_PATIENT_SSH = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5"


def script(job: Job, how: How) -> Script:
    """The launcher on this node, or on each with `--no_ssh`."""
    if job.nodes == 1 and not job.hosts:
        line = (*_launcher(job), *_devices(job), "--master_port", str(job.port), "--module",
                "pretrain", *job.arguments)  # fmt: skip
        return Script((Command(line, job.worker_environment, job.directory),))
    if not job.hosts:
        raise UserError(
            "deepspeed: no hosts\n  rule: its host file names every node\n"
            "  cure: launch.hosts of the profile, or --hosts"
        )
    hostfile = job.folder / "hostfile"
    common = (*_launcher(job), "--hostfile", str(hostfile), "--master_addr", job.master,
              "--master_port", str(job.port))  # fmt: skip
    files = {hostfile: hostfile_text(job)}
    if not how.ssh or how.node_rank is not None:
        nodes = each_node(
            job, How(ssh=False, node_rank=how.node_rank),
            lambda rank: [*common, "--no_ssh", "--node_rank", str(rank), "--module", "pretrain",
                          *job.arguments],
        )  # fmt: skip
        return Script(nodes.commands, files)
    environment = job.worker_environment
    _refuse_unquoted(job, environment)
    exported = job.folder / "environment"
    files[exported] = "".join(f"{name}={value}\n" for name, value in environment.items())
    ssh = {"DS_ENV_FILE": str(exported), "PDSH_SSH_ARGS_APPEND":
           " ".join([_PATIENT_SSH, *job.site.launch.ssh])}  # fmt: skip
    line = (*common, "--force_multi", "--launcher", "pdsh", "--module", "pretrain",
            *plain_arguments(job.arguments))  # fmt: skip
    return Script((Command(line, environment | ssh, job.directory),), files)


def _devices(job: Job) -> tuple[str, ...]:
    """So many of those that are visible, which its launcher forgets where it is given a number."""
    visible = job.environment.get("CUDA_VISIBLE_DEVICES", "")
    if not visible:
        return "--num_accelerators", str(job.ranks_per_node)
    numbers = visible.split(",")[: job.ranks_per_node]
    if len(numbers) < job.ranks_per_node:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible}: {len(numbers)} for {job.ranks_per_node} ranks\n"
            "  rule: a rank has a GPU of its own\n"
            f"  cure: --ranks-per-node {len(numbers)}, or let more be seen"
        )
    return "--include", f"localhost:{','.join(numbers)}"


def hostfile_text(job: Job) -> str:
    """HOST slots=N, a line a node."""
    return "".join(f"{host} slots={job.ranks_per_node}\n" for host in job.hosts)


def plain_arguments(arguments: Iterable[str]) -> list[str]:
    """The worker's arguments, in a form that needs no quoting in a shell."""
    arguments = list(arguments)
    if all(_PLAIN.fullmatch(argument) for argument in arguments):
        return arguments
    text = base64.urlsafe_b64encode(json.dumps(arguments).encode()).decode()
    return [f"--encoded={text}"]


def _launcher(job: Job) -> tuple[str, ...]:
    return job.python, "-m", "deepspeed.launcher.runner"


def _refuse_unquoted(job: Job, environment: dict[str, str]) -> None:
    """What DeepSpeed would put into a line of shell as it is."""
    found = {"launch.directory": str(job.directory), "launch.python": job.python}
    bad = {key: value for key, value in found.items() if not _PLAIN.fullmatch(value)}
    # It puts values in double quotes, or leaves them as they are.
    bad |= {f"launch.environment.{name}": value for name, value in environment.items()
            if re.search(r'["$`\\\n\r%]', value) or value != value.strip()}  # fmt: skip
    if bad:
        lines = "\n".join(f"  {key} = {value!r}" for key, value in bad.items())
        raise UserError(
            f"deepspeed with pdsh cannot carry:\n{lines}\n"
            "  rule: its launcher does not quote them\n"
            "  cure: plain letters, digits and . _ - / there; or --node-rank on each node; or "
            "torchrun, accelerate or slurm"
        )
