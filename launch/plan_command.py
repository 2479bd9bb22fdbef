"""`anthesis plan`: what a run will be, before anything is paid for."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import positive
from pretrain.errors import UserError

if TYPE_CHECKING:  # else imported when needed, so that other commands answer at once
    from launch.clusters import Cluster
    from launch.plan import Plan
    from pretrain.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", help="a run config in TOML")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--cluster", type=Path, help="a profile: adds memory, time and cost")
    parser.add_argument("--nodes", type=positive, help="of the cluster (default: all)")
    parser.add_argument("--ranks", type=positive, help="in all (default: one a device)")
    parser.add_argument("--shard-ranks", type=positive, metavar="N",
                        help="ranks that share one replica (default: all)")  # fmt: skip
    parser.add_argument("--sync", metavar="METHOD", help="between replicas, such as powersgd:4")
    parser.add_argument("--at", action="append", default=[], metavar="step=N|tokens=N",
                        help="the step, its batch and its rate; repeatable")  # fmt: skip
    parser.add_argument("--compare", nargs="+", default=[], metavar="KEY=V,V",
                        help="a table of alternatives; KEY: any of the config, nodes, shard_ranks, "
                        "sync")  # fmt: skip
    parser.add_argument("--full", action="store_true", help="every batch of the timeline")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="rate and batch over time")


def run(options: argparse.Namespace) -> None:
    """The command with parsed options; raises UserError."""
    from launch.alternatives import compare
    from launch.plan_report import as_json, report
    from pretrain.config_file import load

    plan = make_plan(load(options.config, options.overrides), options)
    if options.json:
        print(json.dumps(as_json(plan, options.at), indent=1))
    elif options.compare:
        table = compare(
            plan, options.compare, lambda more: load(options.config, [*options.overrides, *more])
        )
        print(table)
    else:
        print(report(plan, options.at, options.full))
    if options.plot:
        from launch.plan_plot import plot

        plot(plan, options.plot)
        if not options.json:
            print(f"-> {options.plot}")


def make_plan(config: "Config", options: argparse.Namespace) -> "Plan":
    """The plan that the options ask for."""
    from launch.alternatives import parse_sync
    from launch.clusters import load_cluster
    from launch.plan import Plan

    needs = {"--nodes": options.nodes, "--ranks": options.ranks, "--compare": options.compare,
             "--shard-ranks": options.shard_ranks, "--sync": options.sync}  # fmt: skip
    if options.cluster is None:
        if given := [name for name, value in needs.items() if value]:
            raise UserError(
                f"{', '.join(given)} without --cluster\n  rule: these are about machines\n"
                "  cure: --cluster configs/clusters/local.toml, or another profile"
            )
        return Plan(config)
    cluster = _resize(load_cluster(options.cluster), options.nodes, options.ranks)
    plan, shards = Plan(config, cluster), options.shard_ranks or config.mesh.shard_ranks
    if options.sync:
        return plan.with_replicas(shards or cluster.devices_per_node, parse_sync(options.sync))
    if getattr(config.sync, "coordinator", None):  # a launch is a replica
        shards = cluster.devices // config.sync.replicas
    return plan.with_replicas(shards, config.sync)


def _resize(cluster: "Cluster", nodes: int | None, ranks: int | None) -> "Cluster":
    """The part of a cluster that a run of so many nodes or ranks takes."""
    if ranks is None:
        return cluster.model_copy(update={"nodes": nodes or cluster.nodes})
    per_node = min(ranks, cluster.devices_per_node) if nodes is None else math.ceil(ranks / nodes)
    nodes = nodes or math.ceil(ranks / per_node)
    if nodes * per_node != ranks:
        raise UserError(
            f"--ranks {ranks}: do not fill nodes of {per_node}\n"
            "  rule: every node has as many ranks\n"
            f"  cure: --ranks {nodes * per_node}"
        )
    return cluster.model_copy(update={"nodes": nodes, "devices_per_node": per_node})
