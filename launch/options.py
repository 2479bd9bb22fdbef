"""The options that say what is to be launched and where, shared by launch, render and doctor."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import positive

if TYPE_CHECKING:  # else imported when needed, so that other commands answer at once
    from launch.job import Job


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, on which nodes."""
    parser.add_argument("config", help="a run config in TOML")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--cluster", type=Path, metavar="PROFILE",
                        help="with nodes, hosts, queue (default: this machine)")  # fmt: skip
    parser.add_argument("--nodes", type=positive, help="default: all of the profile")
    parser.add_argument("--ranks-per-node", type=positive, metavar="N",
                        help="default: devices_per_node of the profile")  # fmt: skip
    parser.add_argument("--hosts", type=_names, default=(), metavar="HOST,HOST",
                        help="default: launch.hosts of the profile")  # fmt: skip
    parser.add_argument("--include", type=_names, default=(), metavar="HOST,HOST",
                        help="only these of them")  # fmt: skip
    parser.add_argument("--exclude", type=_names, default=(), metavar="HOST,HOST",
                        help="all but these")  # fmt: skip
    parser.add_argument("--master", metavar="HOST[:PORT]",
                        help="where ranks meet (default: first host, launch.port)")  # fmt: skip


def job_of(options: argparse.Namespace, queue: bool = False) -> "Job":
    """The job that the options describe; raises ConfigError and UserError. With a `queue` nodes are
    chosen by it, and hosts only say which it may choose."""
    from launch.job import make_job, select_hosts
    from launch.site import Site, load_site
    from pretrain.config_file import load, validate
    from pretrain.errors import ConfigError

    config = load(options.config, options.overrides)
    site = load_site(options.cluster) if options.cluster else Site()
    master, _, port = (options.master or "").partition(":")
    changes = {"hosts": options.hosts} if options.hosts else {}
    changes |= {"port": int(port) if port.isdecimal() else port} if port else {}
    changes |= {"master": master} if master else {}
    tree = site.model_dump(mode="json", exclude_none=True)
    changed, problems = validate(type(site), tree | {"launch": tree["launch"] | changes})
    if changed is None:
        raise ConfigError("--hosts, --master", problems)
    nodes, include = options.nodes, options.include
    if queue:
        include = include or options.hosts
        nodes = nodes or len(include) or len(changed.launch.hosts) or None
        launching = changed.launch.model_copy(update={"hosts": ()})
        changed = changed.model_copy(update={"launch": launching})
    job = make_job(
        config,
        Path(options.config),
        options.overrides,
        changed,
        nodes=nodes,
        ranks_per_node=options.ranks_per_node,
    )
    return select_hosts(job, include, options.exclude)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)
