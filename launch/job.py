"""A run on hosts, before it is said by what it is started: config, ranks, environment."""

import fnmatch
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch.site import HOST_NAME, Site
from pretrain.config import Config
from pretrain.errors import UserError

# All that is passed on from the environment of a launch. Nothing in it is a secret by its purpose:
# what has tokens and keys in it (HF_TOKEN, WANDB_API_KEY, AWS_*, MLFLOW_*) is not here.
FORWARDED = (
    "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    "CUDA_HOME", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "HF_HOME",
    "HF_HUB_OFFLINE",
    "NCCL_*", "GLOO_*", "FI_*", "UCX_*", "TORCH_NCCL_*", "TORCH_CPP_LOG_LEVEL", "DS_ACCELERATOR",
)  # fmt: skip
# What has a meaning on this machine alone.
HERE = ("CUDA_VISIBLE_DEVICES", "TMPDIR")


@dataclass(frozen=True)
class Job:
    """What is to run where. `hosts` are empty where the backend finds them itself (Slurm), or the
    nodes are told apart by hand (`--node-rank`)."""

    config_path: Path
    overrides: tuple[str, ...]
    config: Config
    site: Site
    nodes: int
    ranks_per_node: int
    hosts: tuple[str, ...]
    master: str
    directory: Path
    python: str
    environment: dict[str, str] = field(repr=False)
    chosen: tuple[str, ...] = ()  # hosts by --hosts or --include, for Slurm
    excluded: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """In all."""
        return self.nodes * self.ranks_per_node

    @property
    def port(self) -> int:
        """At the master, where the ranks meet."""
        return self.site.launch.port

    @property
    def arguments(self) -> list[str]:
        """Of the worker, `python -m pretrain`."""
        return [str(self.config_path), *self.overrides]

    @property
    def folder(self) -> Path:
        """Where files lie that a backend needs."""
        return self.config.run_directory / "launch"

    @property
    def worker_environment(self) -> dict[str, str]:
        """The variables of a worker: what was let through, and what it is to be told."""
        told = {
            "ANTHESIS_RANKS": str(self.ranks),
            "ANTHESIS_JOIN_TIMEOUT": self.environment.get(
                "ANTHESIS_JOIN_TIMEOUT", str(self.site.launch.join_timeout.value)
            ),
        }
        if self.hosts:
            told["ANTHESIS_HOSTS"] = ",".join(self.hosts)
        return self.environment | told


def make_job(
    config: Config,
    config_path: Path,
    overrides: Iterable[str],
    site: Site,
    *,
    nodes: int | None = None,
    ranks_per_node: int | None = None,
    hosts: tuple[str, ...] = (),
    environment: Mapping[str, str] = os.environ,
) -> Job:
    """The job that a config and a profile describe; raises UserError where they do not fit."""
    launching = site.launch
    hosts = hosts or launching.hosts
    nodes = nodes or len(hosts) or site.nodes
    if hosts and len(hosts) < nodes:
        raise UserError(
            f"launch.hosts = {', '.join(hosts)}: {len(hosts)} for {nodes} nodes\n"
            "  rule: every node has a host\n"
            "  cure: name more hosts, or ask for fewer nodes with --nodes"
        )
    if len(set(hosts)) < len(hosts):
        twice = sorted({host for host in hosts if hosts.count(host) > 1})
        raise UserError(
            f"launch.hosts: {', '.join(twice)} more than once\n"
            "  rule: a host is one node\n  cure: name each once; devices_per_node says its ranks"
        )
    hosts = hosts[:nodes]
    directory = launching.directory or Path.cwd()
    # In a container of a launch: what that launch has passed on.
    more = [name for name in environment.get("ANTHESIS_FORWARD", "").split(",") if name]
    more += [*HERE] if nodes == 1 and not hosts else []
    return Job(
        config_path=(directory / config_path) if launching.directory else config_path.absolute(),
        overrides=tuple(overrides),
        config=config,
        site=site,
        nodes=nodes,
        ranks_per_node=ranks_per_node or site.devices_per_node,
        hosts=hosts,
        master=launching.master or (hosts[0] if hosts else "localhost"),
        directory=directory,
        python=launching.python or sys.executable,
        environment=let_through(environment, (*launching.forward, *more)) | launching.environment,
    )


def is_host_name(text: str) -> bool:
    """Whether a text needs no quoting anywhere."""
    return re.fullmatch(HOST_NAME, text) is not None


def let_through(environment: Mapping[str, str], more: Iterable[str] = ()) -> dict[str, str]:
    """The variables that may reach other hosts, scripts and logs."""
    patterns = (*FORWARDED, *more)
    return {
        name: value
        for name, value in sorted(environment.items())
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def select_hosts(job: Job, include: Iterable[str], exclude: Iterable[str]) -> Job:
    """The job on some of its hosts only; raises UserError for a host that it has not. Where it
    names none, they are kept for Slurm to choose by."""
    include, exclude = tuple(include), tuple(exclude)
    job = replace(job, chosen=include, excluded=exclude)
    if not job.hosts and all(map(is_host_name, (*include, *exclude))):
        return job
    if unknown := sorted({*include, *exclude} - set(job.hosts)):
        raise UserError(
            f"--include/--exclude: {', '.join(unknown)}\n"
            f"  rule: hosts of launch.hosts: {', '.join(job.hosts) or 'none are named'}\n"
            "  cure: check the name"
        )
    hosts = tuple(h for h in job.hosts if (not include or h in include) and h not in exclude)
    if job.hosts and not hosts:
        raise UserError("--include/--exclude leave no host\n  cure: exclude fewer")
    if hosts == job.hosts:
        return job
    return replace(job, hosts=hosts, nodes=len(hosts), master=job.site.launch.master or hosts[0])
