"""Cluster profiles: what a planner has to know of a cluster, read from TOML.

Figures of devices are per device, except where `shared_cores` says that a device is a share of the
node's processor: then speed and memory are those of the whole node and its ranks divide them.
"""

import os
from typing import Annotated, Literal

from pydantic import ByteSize, Field

from launch.site import Site
from pretrain.config_base import Positive, Section
from pretrain.config_file import load_as

PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Dtype = Literal["bf16", "fp16", "fp32"]


class Device(Section):
    """One accelerator, or with `shared_cores` the processor of a node."""

    name: str
    memory: Annotated[ByteSize, Field(gt=0)] = Field(description='for example "80GB"')
    peak_tflops: Annotated[dict[Dtype, PositiveNumber], Field(min_length=1)] = Field(
        description="dense matrix products by dtype: the data sheet's, or measured"
    )
    product_efficiency: Share = Field(
        1.0, description="share of peak_tflops that the products of a training step reach"
    )
    memory_gbytes_per_s: PositiveNumber = Field(description="bandwidth of its memory")
    runtime: ByteSize = Field(
        ByteSize(0), description="memory taken by libraries and context before anything is built"
    )
    shared_cores: bool = False


class Link(Section):
    """A network as collectives see it: bus bandwidth of a ring, and time of the smallest one."""

    gbytes_per_s: PositiveNumber
    latency_us: PositiveNumber


class Network(Section):
    """Inside a node bandwidth is that of each device, between nodes that of each node."""

    inside: Link
    between: Link


class Reliability(Section):
    """How often things break, and how fast a checkpoint is written."""

    node_mtbf_days: PositiveNumber = Field(description="mean time between failures of one node")
    write_gbytes_per_s: PositiveNumber = Field(description="to the checkpoint folder, all nodes")
    restart_minutes: PositiveNumber = Field(30.0, description="from a failure to the next step")


class Price(Section):
    """What running costs; every key may be left out."""

    device_hour: PositiveNumber | None = Field(None, description="price of a device for an hour")
    currency: str = "USD"
    node_watts: PositiveNumber | None = Field(None, description="power of a node under load")
    facility_factor: Annotated[float, Field(ge=1)] = Field(
        1.0, description="power of the site over that of its nodes (PUE)"
    )
    carbon_g_per_kwh: PositiveNumber | None = None


class Cluster(Site):
    """A cluster, or the part of it that a run is to use, with the figures that planning needs."""

    name: str
    nodes: Positive
    devices_per_node: Positive
    device: Device
    network: Network
    reliability: Reliability | None = None
    price: Price = Price()

    @property
    def devices(self) -> int:
        """Ranks of a run on all of it."""
        return self.nodes * self.devices_per_node


def load_cluster(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Cluster:
    """Read a profile; raises ConfigError with all problems."""
    return load_as(Cluster, path, overrides)
