"""Slurm: an sbatch script whose tasks are the ranks. No ssh, no host file, no other launcher."""

import re
import shlex
from pathlib import Path

from launch.backends.mounts import mounts_of
from launch.backends.nodes import How
from launch.job import HERE, Job
from launch.script import Command, Script
from pretrain.errors import UserError
from pretrain.stopping import STOPPED

_TEMPLATE = Path(__file__).parents[1] / "templates" / "slurm.sh"
# Slurm sets them itself, or the tasks read what it says.
_OF_OTHERS = {"ANTHESIS_HOSTS", *HERE}
_REQUEUE = """\
if [ "$code" -eq @STOPPED@ ]; then
    scontrol requeue "${SLURM_JOB_ID}" && sleep 60  # Slurm ends this script meanwhile
fi"""
_CHAIN = """\
[ "$code" -ne @STOPPED@ ] || code=0  # the next job of the chain goes on"""


def script(job: Job, how: How) -> Script:
    """The script and its submission; a chain of singletons is submitted as often as it has jobs."""
    slurm = job.site.slurm
    if job.config.start == "fresh" and slurm.chain == "singleton" and slurm.jobs > 1:
        raise UserError(
            "start=fresh in a chain of jobs\n  rule: each of them would begin anew\n"
            '  cure: start=auto, after the earlier run was moved; or slurm.chain = "array"'
        )
    path = job.folder / "slurm.sh"
    times = slurm.jobs if slurm.chain == "singleton" else 1
    submit = Command(("sbatch", str(path)), {}, job.directory)
    return Script((submit,) * times, {path: script_text(job)})


def script_text(job: Job) -> str:
    """The sbatch script of a job."""
    slurm = job.site.slurm
    environment = {k: v for k, v in job.worker_environment.items() if k not in _OF_OTHERS}
    if master := job.site.launch.master:
        environment["MASTER_ADDR"] = master
    load = [f"module load {shlex.quote(name)} || exit 2" for name in slurm.modules]
    return _fill(
        _TEMPLATE.read_text(encoding="utf-8"),
        SBATCH="\n".join(f"#SBATCH {line}" for line in _directives(job)),
        SETUP="\n".join([*load, *slurm.setup]),
        DIRECTORY=shlex.quote(str(job.directory)),
        EXPORTS="\n".join(f"export {k}={shlex.quote(v)}" for k, v in environment.items()),
        SRUN=shlex.join(_srun(job)),
        WORKER=shlex.join(_worker(job)),
        AFTER=_fill(_REQUEUE if slurm.chain == "requeue" else _CHAIN, STOPPED=str(STOPPED)),
        STOPPED=str(STOPPED),
    )


def _directives(job: Job) -> list[str]:
    slurm = job.site.slurm
    minutes = max(1, -(-slurm.time.value // 60))
    if any(ord(character) < 32 for character in str(job.folder)):
        raise UserError(
            f"slurm: {str(job.folder)!r}\n  rule: a line of the batch script names it\n"
            "  cure: a directory without line breaks and control characters"
        )
    name = "%A_%a.out" if slurm.chain == "array" else "%j.out"
    output = str(job.folder).replace("%", "%%") + "/" + name
    options = {
        "job-name": job.config.name, "account": slurm.account, "partition": slurm.partition,
        "qos": slurm.qos, "constraint": slurm.constraint, "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node, "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-node": job.ranks_per_node if slurm.gpus else None,
        "time": f"{minutes // 60}:{minutes % 60:02}:00", "signal": f"USR1@{slurm.warning.value}",
        "nodelist": ",".join(job.chosen) or None, "exclude": ",".join(job.excluded) or None,
        "dependency": "singleton" if slurm.chain == "singleton" else None,
        "array": f"0-{slurm.jobs - 1}%1" if slurm.chain == "array" else None,
        "output": _quoted(output), "open-mode": "append", "export": "NONE",
    }  # fmt: skip
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [*lines, "--requeue" if slurm.chain == "requeue" else "--no-requeue", *slurm.options]


def _quoted(path: str) -> str:
    """A path in a directive: Slurm takes double quotes and backslashes out of it."""
    return '"' + re.sub(r'(["\\])', r"\\\1", path) + '"'


def _srun(job: Job) -> list[str]:
    slurm = job.site.slurm
    options = ["--export=ALL", "--kill-on-bad-exit=1"]
    if slurm.cpus_per_task:  # which srun no longer takes from the job
        options.append(f"--cpus-per-task={slurm.cpus_per_task}")
    if slurm.container and slurm.container_runtime == "pyxis":
        options += [f"--container-image={slurm.container}",
                    f"--container-mounts={','.join(_mounts(job))}",
                    f"--container-workdir={job.directory}"]  # fmt: skip
    return options


def _worker(job: Job) -> list[str]:
    slurm = job.site.slurm
    if slurm.container is None:
        return [job.python, "-m", "pretrain", *job.arguments]
    worker = [job.site.launch.python or "python3", "-m", "pretrain", *job.arguments]
    if slurm.container_runtime == "pyxis":
        return worker
    gpus = ["--nv"] if slurm.gpus else []
    binds = [word for mount in _mounts(job) for word in ("--bind", mount)]
    return ["apptainer", "exec", *gpus, *binds, "--pwd", str(job.directory), slurm.container,
            *worker]  # fmt: skip


def _mounts(job: Job) -> list[str]:
    own = [f"{path}:{path}" + ("" if writable else ":ro")
           for path, writable in mounts_of(job).items()]  # fmt: skip
    return [*own, *job.site.slurm.mounts]


def _fill(template: str, **values: str) -> str:
    """Every @NAME@ by its value, in one pass, so that nothing in a value is taken for a name."""
    return re.sub(r"@([A-Z]+)@", lambda match: values[match[1]], template)
