"""`accelerate launch`: its file says how processes start and nothing about training."""

from launch.backends import local
from launch.backends.nodes import How, each_node
from launch.job import Job
from launch.script import Script
from pretrain.errors import UserError
from pretrain.foreign import check_foreign, of_accelerate


def script(job: Job, how: How) -> Script:
    """`accelerate launch` on every machine; raises ConfigError where its file contradicts the run.

    accelerate needs two processes at least; one is started as itself.
    """
    own = how.accelerate_config
    if own:
        check_foreign(of_accelerate(own), job.config, nodes=job.nodes, ranks=job.ranks)
    if job.ranks == 1:
        if own:
            raise UserError(
                f"{own}: for one process\n  rule: accelerate starts two at least\n"
                "  cure: --ranks-per-node 2, or `anthesis launch local`"
            )
        return local.script(job, how)
    path = own.absolute() if own else job.folder / "accelerate.yaml"

    def arguments(rank: int) -> list[str]:
        several = ["--machine_rank", str(rank), "--main_process_ip", job.master]
        return [
            *(job.python, "-m", "accelerate.commands.launch", "--config_file", str(path)),
            *("--num_machines", str(job.nodes), "--num_processes", str(job.ranks)),
            *("--main_process_port", str(job.port), *(several if job.nodes > 1 else [])),
            *("--max_restarts", str(how.restarts)),
            *("--module", "pretrain", *job.arguments),
        ]

    commands = each_node(job, how, arguments).commands
    return Script(commands, {} if own else {path: file_text(job)})


def file_text(job: Job) -> str:
    """The accelerate file of a job."""
    import yaml

    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",  # its MULTI_CPU starts one process, without a word
        "main_training_function": "main",
        "num_machines": job.nodes,
        "num_processes": job.ranks,
        "main_process_ip": job.master,
        "main_process_port": job.port,
        "rdzv_backend": "static",
        "same_network": True,
    }
    return "# Rendered: nothing about training stands here, the run config says it.\n" + str(
        yaml.safe_dump(settings, sort_keys=False)
    )
