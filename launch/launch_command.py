"""`anthesis launch` and `anthesis render`: a run on nodes, and the files from which it starts."""

import argparse
import importlib
import json
import re
from pathlib import Path

from launch.arguments import positive
from launch.options import add_job_arguments, job_of

BACKENDS = {
    "local": "processes of this machine",
    "torchrun": "torchrun on each node; static, or with --elastic a range of nodes",
    "deepspeed": "the deepspeed launcher: a host file and pdsh, or --no-ssh on each node",
    "accelerate": "`accelerate launch` on each machine",
    "slurm": "an sbatch script whose tasks are the ranks",
    "docker": "a container on each node",
}
_ONLY = {
    "no_ssh": ("torchrun", "deepspeed", "accelerate", "docker"),
    "node_rank": ("torchrun", "deepspeed", "accelerate", "docker"),
    "elastic": ("torchrun",),
    "restarts": ("local", "torchrun", "accelerate"),
    "accelerate_config": ("accelerate",),
}
FILES = ("deepspeed", "accelerate", "slurm", "docker", "hostfile")


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `launch`."""
    parser.add_argument("backend", choices=BACKENDS, metavar="BACKEND", help=", ".join(BACKENDS))
    add_job_arguments(parser)
    parser.add_argument("--dry-run", action="store_true",
                        help="print exactly what would run, and run nothing")  # fmt: skip
    parser.add_argument("--no-ssh", action="store_true",
                        help="start this node's part only; the same on each node")  # fmt: skip
    parser.add_argument("--node-rank", type=int, metavar="N", help="of this node; implies --no-ssh")
    parser.add_argument("--elastic", metavar="LEAST:MOST", type=_range,
                        help="torchrun: the nodes that may come and go")  # fmt: skip
    parser.add_argument("--restarts", type=positive, default=0, metavar="N",
                        help="torchrun, accelerate: of the ranks after a failure (0)")  # fmt: skip
    parser.add_argument("--accelerate-config", type=Path, metavar="YAML",
                        help="your own; must not contradict the run config")  # fmt: skip
    parser.add_argument("--deepspeed-config", type=Path, metavar="JSON",
                        help="checked against the run config, which alone counts")  # fmt: skip


def add_render_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `render`."""
    parser.add_argument("file", choices=FILES, metavar="FILE", help=", ".join(FILES))
    add_job_arguments(parser)


def run_launch(options: argparse.Namespace) -> int:
    """Start the run, or print what would be started; the exit code of what failed first."""
    from launch.backends.nodes import How
    from launch.execute import execute
    from pretrain.foreign import check_foreign, of_deepspeed

    _refuse_unknown(options)
    job = job_of(options, queue=options.backend == "slurm")
    if options.deepspeed_config:
        found = of_deepspeed(options.deepspeed_config)
        check_foreign(found, job.config, nodes=job.nodes, ranks=job.ranks)
    how = How(
        ssh=not options.no_ssh,
        node_rank=options.node_rank,
        elastic=options.elastic,
        restarts=options.restarts,
        accelerate_config=options.accelerate_config,
    )
    script = importlib.import_module(f"launch.backends.{options.backend}").script(job, how)
    if options.dry_run:
        print(script.text(job))
        return 0
    return execute(script, job)


def run_render(options: argparse.Namespace) -> None:
    """Print one of the files."""
    job = job_of(options, queue=options.file == "slurm")
    if options.file == "deepspeed":
        from pretrain.deepspeed_settings import deepspeed_settings

        print(json.dumps(deepspeed_settings(job.config.engine), indent=2))
    elif options.file == "accelerate":
        from launch.backends.accelerate import file_text

        print(file_text(job), end="")
    elif options.file == "slurm":
        from launch.backends.slurm import script_text

        print(script_text(job), end="")
    elif options.file == "docker":
        from launch.backends.docker import compose_text

        print(compose_text(job), end="")
    else:
        from launch.backends.deepspeed import hostfile_text

        print(hostfile_text(job), end="")


def _refuse_unknown(options: argparse.Namespace) -> None:
    """Raise UserError for options that the backend does not have."""
    from pretrain.errors import UserError

    for name, backends in _ONLY.items():
        if getattr(options, name) not in (None, False, 0) and options.backend not in backends:
            raise UserError(
                f"--{name.replace('_', '-')} with {options.backend}\n"
                f"  rule: it is for {', '.join(backends)}\n  cure: leave it out"
            )


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} must be LEAST:MOST, such as 1:4")
    return positive(match[1]), positive(match[2])
