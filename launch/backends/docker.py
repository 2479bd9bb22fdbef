"""Containers of the project's image: one a node, in which torchrun starts the node's ranks."""

import os
from dataclasses import replace
from typing import Any

from launch.backends.mounts import mounts_of
from launch.backends.nodes import How, each_node
from launch.job import Job
from launch.script import Script


def script(job: Job, how: How) -> Script:
    """`docker run` on every node."""
    docker = job.site.docker
    names = [f"{job.config.name}-node{rank}" for rank in range(job.nodes)]
    # On a network of their own containers find each other by name.
    master = job.master if docker.network == "host" else names[0]

    def arguments(rank: int) -> list[str]:
        gpus = ["--gpus", docker.gpus] if docker.gpus else []
        variables = [w for k, v in _told(job).items() for w in ("--env", f"{k}={v}")]
        return [
            *(docker.engine, "run", "--rm", "--name", names[rank]),
            *("--network", docker.network, "--shm-size", f"{docker.shared_memory}b", *gpus),
            *("--user", f"{os.getuid()}:{os.getgid()}", *_mount_options(job)),
            *("--workdir", str(job.directory), *variables, *docker.options, docker.image),
            *_inside(job, rank, master),
        ]

    def after(rank: int) -> tuple[str, ...]:
        return docker.engine, "rm", "--force", names[rank]

    return each_node(job, how, arguments, after)


def compose_text(job: Job) -> str:
    """A compose file: every node a container of this machine, on a network of their own."""
    import yaml

    docker = job.site.docker
    several = job.nodes > 1

    def service(rank: int) -> dict[str, Any]:
        mounts = [
            {"type": "bind", "source": str(path), "target": str(path), "read_only": not writable}
            for path, writable in mounts_of(job).items()
        ]
        extra = [{"type": "bind", **_parts(mount)} for mount in docker.mounts]
        return {
            "image": docker.image,
            "hostname": f"node{rank}",
            "user": f"{os.getuid()}:{os.getgid()}",
            "working_dir": str(job.directory),
            "command": _inside(job, rank, "node0"),
            "environment": _told(replace(job, hosts=())),
            "volumes": mounts + extra,
            "shm_size": f"{docker.shared_memory}b",
            **({"gpus": docker.gpus} if docker.gpus else {}),
            **({"networks": ["ranks"]} if several else {}),
        }

    tree: dict[str, Any] = {
        "name": job.config.name.lower().replace(".", "-"),
        "services": {f"node{rank}": service(rank) for rank in range(job.nodes)},
    }
    if several:
        tree["networks"] = {"ranks": {"internal": True}}

    class Quoting(yaml.SafeDumper):
        pass

    Quoting.add_representer(
        _Text,
        lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'),
    )
    return str(yaml.dump(_escaped(tree), Dumper=Quoting, sort_keys=False, width=1000))


def _inside(job: Job, rank: int, master: str) -> list[str]:
    """The command in the container of a node."""
    if job.ranks == 1:
        return ["train", *job.arguments]
    nodes = ["--nodes", str(job.nodes), "--ranks-per-node", str(job.ranks_per_node)]
    if job.nodes == 1:
        return ["launch", "local", *job.arguments, *nodes]
    return ["launch", "torchrun", *job.arguments, *nodes, "--node-rank", str(rank),
            "--master", f"{master}:{job.port}"]  # fmt: skip


def _told(job: Job) -> dict[str, str]:
    """The variables of a container, all of which our own command passes on in it."""
    told = {k: v for k, v in job.worker_environment.items() if k != "ANTHESIS_RANKS"}
    return told | {"ANTHESIS_FORWARD": ",".join(told)}


def _mount_options(job: Job) -> list[str]:
    options = []
    for path, writable in mounts_of(job).items():
        mode = "" if writable else ",readonly"
        options += ["--mount", f"type=bind,source={path},target={path}{mode}"]
    return options + [word for mount in job.site.docker.mounts for word in ("--volume", mount)]


def _parts(mount: str) -> dict[str, Any]:
    source, target, *mode = mount.split(":")
    return {"source": source, "target": target, "read_only": mode == ["ro"]}


def _escaped(value: Any) -> Any:
    """A tree in which compose finds no variables to put in."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return _Text(value.replace("$", "$$")) if isinstance(value, str) else value


class _Text(str):
    """Text that is quoted in YAML: compose takes more for numbers than PyYAML does."""
