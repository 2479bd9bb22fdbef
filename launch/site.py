"""What launching has to know of a cluster: part of its profile, beside the figures for planning.

A profile without figures (`device`, `network`) is enough to launch with.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ByteSize, Field, model_validator

from pretrain.config_base import AbsolutePath, Positive, Section
from pretrain.config_file import load_as, read_toml
from pretrain.quantities import Duration

# Names that need no quoting anywhere: hosts go into host files and options of other programs.
HOST_NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$"
HostName = Annotated[str, Field(pattern=HOST_NAME)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Pattern = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\*?$")]


def _one_line(text: str) -> str:
    if any(ord(character) < 32 for character in text):
        raise ValueError("one line of text, without control characters")
    return text


Line = Annotated[str, Field(min_length=1), AfterValidator(_one_line)]


class Launching(Section):
    """How processes come to the nodes, and what they are told there."""

    hosts: tuple[HostName, ...] = Field(
        (), description="names of the nodes, in the order of their ranks; none: this machine"
    )
    port: Annotated[int, Field(ge=1024, le=65535, strict=True)] = Field(
        29500, description="at the first node, where the ranks meet"
    )
    master: HostName | None = Field(
        None, description="the host at which ranks meet; default: the first"
    )
    python: Line | None = Field(
        None, description="the interpreter on the nodes; default: the one that launches"
    )
    directory: AbsolutePath | None = Field(
        None, description="where the processes run; default: where the launch is started"
    )
    environment: dict[VariableName, str] = Field(
        {}, description="variables of the processes, such as NCCL_SOCKET_IFNAME"
    )
    forward: tuple[Pattern, ...] = Field(
        (), description="more variables to pass on from here, NAME or PREFIX_*; nothing else is"
    )
    ssh: tuple[Line, ...] = Field((), description='options of ssh, such as ["-p", "2222"]')
    join_timeout: Duration = Field(
        Duration(600, "s"), description="until when all ranks have to be there"
    )


class Slurm(Section):
    """A job of Slurm. Every key may be left out."""

    account: Line | None = None
    partition: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    time: Duration = Field(Duration(20 * 3600, "s"), description="limit of one job")
    warning: Duration = Field(
        Duration(300, "s"),
        description="so long before the limit the run saves a checkpoint and makes way; more than "
        "a step and a checkpoint take",
    )
    chain: Literal["requeue", "singleton", "array"] = Field(
        "requeue",
        description="how a training longer than a job goes on: the job puts itself back in the "
        "queue; or `jobs` jobs of one name run one after another, or an array one at a time",
    )
    jobs: Positive = Field(1, description="of the chain, but with requeue")
    cpus_per_task: Positive | None = Field(None, description="cores of a rank")
    gpus: bool = Field(True, description="ask for devices_per_node GPUs a node")
    modules: tuple[Line, ...] = Field((), description="to load in the job")
    setup: tuple[Line, ...] = Field((), description="lines of shell before the run, as they are")
    options: tuple[Line, ...] = Field((), description='more of sbatch, such as ["--exclusive"]')
    container: Line | None = Field(None, description="an image to run in")
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: tuple[Line, ...] = Field((), description="SOURCE:TARGET, for the container")

    @model_validator(mode="after")
    def _warned_in_time(self) -> "Slurm":
        if self.warning.value >= self.time.value:
            raise ValueError(f"warning = {self.warning} must be shorter than time = {self.time}")
        return self


class Docker(Section):
    """Containers of the project's image."""

    image: Line = "anthesis"
    engine: Literal["docker", "podman"] = "docker"
    network: Line = Field("host", description="of the containers; host: that of the node")
    gpus: Line | None = Field(None, description='"all", or which; none: the CPU')
    shared_memory: ByteSize = Field(ByteSize(8 * 2**30), validate_default=True, gt=0)
    mounts: tuple[Line, ...] = Field(
        (), description="SOURCE:TARGET[:ro]; the working directory is mounted as it is"
    )
    options: tuple[Line, ...] = Field(
        (), description='more of run, such as ["--device=/dev/infiniband"]'
    )


class Site(Section):
    """Where a run is to be launched."""

    name: str = "here"
    sources: tuple[str, ...] = Field((), description="where the figures are published")
    nodes: Positive = 1
    devices_per_node: Positive = 1
    launch: Launching = Launching()
    slurm: Slurm = Slurm()
    docker: Docker = Docker()


def load_site(path: str | os.PathLike[str]) -> Site:
    """Read the profile of a cluster, with its figures where it has them; raises ConfigError with
    all problems."""
    from launch.clusters import Cluster

    figures = {"device", "network"} & read_toml(Path(path)).keys()
    return load_as(Cluster if figures else Site, path)
