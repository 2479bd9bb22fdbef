"""`anthesis doctor`: what would keep a run from starting, or from going well, before it starts."""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launch.arguments import positive
from launch.options import add_job_arguments

if TYPE_CHECKING:  # else imported when needed, so that other commands answer at once
    from launch.job import Job
    from launch.plan import Plan
    from pretrain.health.finding import Finding

_CONNECT_SECONDS = 10
_WORK_SECONDS = 60  # for a host that answers: an interpreter on a slow file system takes its time
_AT_ONCE = 64  # connections
_NO_HOST = 255  # how ssh ends when it comes to no host


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_job_arguments(parser)
    parser.add_argument("--timeout", type=positive, default=_CONNECT_SECONDS, metavar="S",
                        help=f"until a host has to answer ({_CONNECT_SECONDS})")  # fmt: skip
    parser.add_argument("--speed", action="store_true",
                        help="also time products and an all-reduce (needs torch)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for machines")


def run(options: argparse.Namespace) -> int:
    """The command with parsed options: 0, or 1 where something would keep the run from starting.
    Raises UserError for what is wrong with the config or the profile itself."""
    from launch.doctor_table import summary, table
    from launch.options import job_of

    job = job_of(options)
    facts, found = examine(job, options.timeout)
    if options.speed:
        from launch.speed import speed_findings

        found += speed_findings(job, [*facts] if job.hosts else [], options.timeout)
    if options.json:
        print(json.dumps({"facts": facts, "findings": [asdict(one) for one in found]}, indent=1))
    else:
        print(table(found), summary(job, found), sep="\n")
    return 1 if any(one.level == "error" for one in found) else 0


def examine(job: "Job", timeout: int) -> tuple[dict[str, Any], list["Finding"]]:
    """The facts of each host that answered, by host, and all that is found; `timeout` seconds to
    answer. Without hosts it is this machine that is looked at. Raises UserError."""
    from pretrain.health.findings import findings

    facts, found = ask_hosts(job, timeout)
    size, planned = _planned(job)
    found += findings(
        facts,
        job.config,
        ranks=job.ranks,
        ranks_per_node=job.ranks_per_node,
        master=job.master,
        port=job.port,
        interface="GLOO_SOCKET_IFNAME" in job.environment,
        checkpoint_bytes=size,
    )
    return facts, found + planned


# --- hosts ---------------------------------------------------------------------------------------


def ask_hosts(job: "Job", timeout: int) -> tuple[dict[str, Any], list["Finding"]]:
    """The facts of the hosts, asked all at once, and findings about those that gave none."""
    from pretrain.health.finding import Finding

    facts: dict[str, Any] = {}
    found = []
    for host, answer in on_hosts(job, lambda host: _ask(job, host, timeout)).items():
        if isinstance(answer, Finding):
            found.append(answer)
        else:
            facts[host] = answer
    if not found:
        text = "all answer" if job.hosts else "only this machine was looked at: none are named"
        found.append(Finding("hosts", "ok", text))
    return facts, found


def on_hosts(
    job: "Job", work: Callable[[str | None], Any], at_once: int = _AT_ONCE
) -> dict[str, Any]:
    """`work` for each host of the job (None: this machine), so many at once, by the host's name."""
    hosts: Sequence[str | None] = job.hosts or (None,)
    with ThreadPoolExecutor(min(len(hosts), at_once)) as pool:
        answers = list(pool.map(work, hosts))
    return {host or os.uname().nodename: one for host, one in zip(hosts, answers, strict=True)}


def remote(
    job: "Job",
    host: str | None,
    arguments: Sequence[str],
    timeout: int,
    limit: int = _WORK_SECONDS,
    **variables: str,
) -> tuple[str, str, int]:
    """`python -m ARGUMENTS` of the job on a host, with no more than the job's own environment and
    `variables`: its output, the last line of its errors, and its exit code (ssh's own is 255).

    `timeout` seconds are for the host to answer, `limit` are for the work.
    """
    from launch.script import LOCAL_ONLY, Command, ssh

    command = (job.python, "-m", *arguments)
    line = Command(command, job.environment | variables, job.directory).text()
    local = ["sh", "-c", line]
    if host is not None:
        program, *rest = ssh(job, host, line)
        local = [program, "-o", f"ConnectTimeout={timeout}", *rest]  # ssh heeds the first it reads
    try:
        done = subprocess.run(
            local,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout + limit,
            env={name: os.environ[name] for name in LOCAL_ONLY if name in os.environ},
        )
    except subprocess.TimeoutExpired:
        return "", f"no end within {timeout + limit} s: something hangs there", 124
    except OSError as error:
        return "", f"{local[0]}: {error.strerror}", 127
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return done.stdout, last, done.returncode


def _ask(job: "Job", host: str | None, timeout: int) -> "dict[str, Any] | Finding":
    """The facts of one host with `offset` and `uncertainty` of its clock, or why there are none."""
    from launch.host_facts import read_facts
    from pretrain.health.finding import Finding

    arguments = ["launch.host_facts", "--master", job.master]
    if host in (None, *job.hosts[:1]):
        arguments += ["--port", str(job.port)]
    name = host or os.uname().nodename
    sent = time.time()
    output, last, code = remote(job, host, [*arguments, *job.arguments], timeout)
    received = time.time()
    facts = read_facts(output)
    if facts is None and code == _NO_HOST:
        cure = f"see that it is up and `ssh {name} true` works, or leave it out with --exclude"
        return Finding("hosts", "error", f"no answer: {last}", cure, (name,))
    if facts is None:
        cure = "install there, or set launch.python and launch.directory in the profile"
        return Finding("hosts", "error", f"cannot run {job.python} there: {last}", cure, (name,))
    if "problem" in facts:
        text = " ".join(facts["problem"].split())
        return Finding("config", "error", text, "copy the config there, or mend it", (name,))
    return facts | _clock(sent, received, facts)


def _clock(sent: float, received: float, facts: dict[str, Any]) -> dict[str, float]:
    """How far the host's clock is ahead of ours, in seconds, as NTP reckons: its two readings lie
    in the middle of the round trip, but for delay that was all on one way."""
    return {
        "offset": ((facts["began"] - sent) + (facts["ended"] - received)) / 2,
        "uncertainty": ((received - sent) - (facts["ended"] - facts["began"])) / 2,
    }


# --- what the planner knows ----------------------------------------------------------------------


def _planned(job: "Job") -> tuple[int | None, list["Finding"]]:
    """Bytes of a checkpoint (None where ranks do not fit the mesh), and what is found about the
    mesh and the memory of a rank."""
    from launch.clusters import Cluster
    from launch.plan import Plan
    from pretrain.config_sync import OuterSection
    from pretrain.health.finding import Finding
    from pretrain.memory import checkpoint_bytes

    config, ranks, nodes = job.config, job.ranks, job.nodes
    shards = config.mesh.shard_ranks or ranks
    if isinstance(config.sync, OuterSection) and config.sync.coordinator:
        # This launch is one of the replicas.
        ranks, nodes = ranks * config.sync.replicas, nodes * config.sync.replicas
    if ranks % shards:
        text = f"mesh.shard_ranks = {shards} does not divide the {ranks} ranks"
        cure = f"a divisor of {ranks}, or a multiple of {shards} ranks (--nodes, --ranks-per-node)"
        return None, [Finding("mesh", "error", text, cure)]
    plan = Plan(config)
    size = checkpoint_bytes(plan.shape, config.optimizer, config.sync, ranks // shards)
    if not isinstance(job.site, Cluster):
        text = "not known: the profile has no figures of devices (`anthesis cluster measure`)"
        return size, [Finding("memory", "ok", text)]
    changes = {"nodes": nodes, "devices_per_node": job.ranks_per_node}
    plan = Plan(config, job.site.model_copy(update=changes)).with_replicas(shards, config.sync)
    return size, [_memory(plan)]


def _memory(plan: "Plan") -> "Finding":
    """Whether the fullest rank fits, by the planner's figures."""
    from pretrain.health.finding import Finding
    from pretrain.quantities import human_bytes

    text = f"{human_bytes(plan.rank_bytes)} of {human_bytes(plan.available_bytes)} on each rank"
    if plan.fits:
        return Finding("memory", "ok", text)
    ways = min(plan.ways_to_fit(), key=len, default="more or larger devices")
    return Finding("memory", "error", f"does not fit: {text} (`anthesis plan` has the parts)", ways)
