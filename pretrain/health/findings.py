"""What the facts of hosts mean for a run: pure functions from facts to findings.

A comparison names the hosts that differ from most others; of equally many, those that differ from
the first host, where the ranks meet.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from typing import Any

from pretrain.config import Config
from pretrain.config_optim import OwnOptimizer
from pretrain.health.batches import batch_findings
from pretrain.health.finding import Finding, listed
from pretrain.quantities import human_bytes

Facts = Mapping[str, Mapping[str, Any]]  # by host, the first host first
_Problems = Iterator[Finding]

# c10d's rendezvous leaves out a host whose clock is 20 s slow, and the others train without it.
_CLOCK_WARNING, _CLOCK_ERROR = 5.0, 10.0
_MUST_AGREE = ("torch", "deepspeed", "anthesis", "code", "nccl")
_NEEDED = ("torch", "deepspeed", "numpy")
_GPU_SHM_BYTES = 10**9  # NCCL's own advice; its buffers between the GPUs of a host lie there
_FEW_INODES = 100
_GPU_USED = 0.1  # of its memory; more is another process


def findings(
    facts: Facts,
    config: Config,
    *,
    ranks: int,
    ranks_per_node: int = 1,
    master: str | None = None,
    port: int | None = None,
    interface: bool = False,
    checkpoint_bytes: int | None = None,
) -> list[Finding]:
    """All that the facts of the hosts that answered tell, a line for what is fine too.

    `offset` of a host's facts is how far its clock is ahead (seconds), `uncertainty` how much of
    that may be delay. `interface`: whether the job names the network card for gloo.
    """
    found: list[Finding] = []
    if facts:
        found += _on_hosts(facts)
        found += _check("disk", _disk(facts, config, checkpoint_bytes), _disk_text(facts))
        found += _check("gpus", _gpus(facts, ranks_per_node), _gpus_text(facts))
    if asked := _having(facts, lambda of: of["port"]):
        found += _check("port", _port(facts, port), f"port {port} is free at {asked[0]}")
    if len(facts) > 1 and master:
        text = f"all find {master}, and none gives itself a loopback address"
        found += _check("names", _names(facts, master, interface), text)
    found.append(Finding("compile", "ok", _compiled_text(config)))
    text = f"work in every step for all of {ranks} rank(s)"
    return found + _check("batches", batch_findings(config, ranks), text)


def start_findings(
    all_facts: Sequence[Mapping[str, Any]], config: Config, ranks: int
) -> list[Finding]:
    """What the start of a run can tell from the `host_facts` of one rank of each host, in the order
    of ranks and asked right after a barrier: problems only."""
    facts: dict[str, dict[str, Any]] = {}
    for one in all_facts:
        name = one["host"] if one["host"] not in facts else f"{one['host']} #{len(facts) + 1}"
        facts[name] = {**one, "offset": one["began"]}
    found = _on_hosts(facts) + list(batch_findings(config, ranks, uneven_too=False))
    return [finding for finding in found if finding.level != "ok"]


def _on_hosts(facts: Facts) -> list[Finding]:
    """What is looked at before a launch and at the start of a run alike."""
    many = len(facts) > 1
    alike = f"alike on {len(facts)} hosts" if many else "can be read"
    versions = (f"{alike}: " if many else "") + _versions_text(facts)
    clocks = f"less than {_CLOCK_WARNING:g} s apart" if many else "one host"
    return [
        *_check("versions", _versions(facts), versions),
        *_check("config", _configs(facts), alike),
        *_check("data", _data(facts), alike),
        *_check("clocks", _clocks(facts), clocks),
        *_check("folder", _writing(facts), "files can be written, renamed and read back"),
        *_check("shm", _shm(facts), "enough shared memory"),
        *_check("locks", _locks(facts), "no compilation was left unfinished"),
    ]


def _check(name: str, problems: _Problems, fine: str) -> list[Finding]:
    return list(problems) or [Finding(name, "ok", fine)]


def odd_ones(values: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """What most hosts have, and those that have something else."""
    if not values:
        return None, ()
    common, _ = Counter(values.values()).most_common(1)[0]
    return common, tuple(host for host, value in values.items() if value != common)


def _having(facts: Facts, property: Callable[[Mapping[str, Any]], Any]) -> tuple[str, ...]:
    return tuple(host for host, of in facts.items() if property(of))


# --- software and config -------------------------------------------------------------------------


def _versions(facts: Facts) -> _Problems:
    names = {name: None for of in facts.values() for name in of["versions"]}
    for name in names:
        values = {host: of["versions"].get(name) for host, of in facts.items()}
        common, odd = odd_ones(values)
        what = "anthesis' own code" if name == "code" else name
        if odd:
            here = "differs" if name == "code" else listed(sorted({str(values[h]) for h in odd}))
            there = "" if name == "code" else f" here, {common} elsewhere"
            yield Finding(
                "versions",
                "error" if name in _MUST_AGREE else "warning",
                f"{what} {here}{there}",
                f"install the same {'checkout' if name == 'code' else name} on every host, or name "
                "the same interpreter by launch.python",
                odd,
            )
        elif common is None and name in _NEEDED:
            cure = f"pip install {name}, or name an interpreter that has it by launch.python"
            yield Finding("versions", "error", f"{name} is not installed", cure, tuple(facts))


def _versions_text(facts: Facts) -> str:
    versions = next(iter(facts.values()))["versions"] if facts else {}
    return ", ".join(f"{n} {v}" for n, v in versions.items() if v and n in ("python", *_NEEDED))


def _configs(facts: Facts) -> _Problems:
    sections = {section: None for of in facts.values() for section in of["config"]}
    odd: dict[str, list[str]] = {}
    for section in sections:
        for host in odd_ones({host: of["config"].get(section) for host, of in facts.items()})[1]:
            odd.setdefault(host, []).append(section)
    for host, differing in odd.items():
        yield Finding(
            "config",
            "error",
            f"its config is another: {listed(differing)} (every rank reads the config itself)",
            "copy the config to every host, or keep it on a shared file system",
            (host,),
        )


def _data(facts: Facts) -> _Problems:
    lacking: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for host, of in facts.items():
        lacking.setdefault(tuple(of["unreadable"].items()), []).append(host)
    for problems, hosts in lacking.items():
        for name, problem in problems[:1]:
            key = "data.tokenizer" if name == "tokenizer" else f"data.sources, {name}"
            cure = f"copy it there, or correct its path ({key})"
            others = [other for other, _ in problems[1:]]
            more = f"; something is wrong with {listed(others)} too" if others else ""
            yield Finding("data", "error", problem + more, cure, tuple(hosts))
    cure = "copy it again from one host to the others; `anthesis corpus check` says which is whole"
    for name in {name: None for of in facts.values() for name in of["sources"]}:
        for kind in ("sources", "manifests"):
            values = {host: of[kind][name] for host, of in facts.items() if name in of[kind]}
            if odd := odd_ones(values)[1]:
                yield Finding("data", "error", f"source {name} is not that of the others "
                              "(size, first or last bytes, or checksums)", cure, odd)  # fmt: skip
                break
    values = {host: of["tokenizer"] for host, of in facts.items() if of["tokenizer"]}
    if odd := odd_ones(values)[1]:
        text = "the tokenizer is not that of the others (data.tokenizer)"
        yield Finding("data", "error", text, "copy its folder again from one host", odd)


# --- machines ------------------------------------------------------------------------------------


def _clocks(facts: Facts) -> _Problems:
    offsets = {host: of["offset"] for host, of in facts.items() if "offset" in of}

    def near(one: float) -> int:
        return sum(abs(one - other) <= _CLOCK_WARNING for other in offsets.values())

    right = max(offsets.values(), key=near, default=0.0)
    for host, offset in offsets.items():
        apart = offset - right
        sure = abs(apart) - facts[host].get("uncertainty", 0.0)
        if sure > _CLOCK_WARNING:
            yield Finding(
                "clocks",
                "error" if sure > _CLOCK_ERROR else "warning",
                f"its clock is {abs(apart):.1f} s {'ahead' if apart > 0 else 'behind'}; ranks may "
                "not meet, and dates of files and logs mislead",
                "set it by the network's time: chronyc makestep, or timedatectl set-ntp true",
                (host,),
            )


def _writing(facts: Facts) -> _Problems:
    for host, of in facts.items():
        if problem := of["folder"]["problem"]:
            yield Finding(
                "folder",
                "error",
                f"{of['folder']['path']}: a file cannot be kept there: {problem}",
                "free space or inodes, mend the permissions, or set directory=... to another place",
                (host,),
            )

    common, odd = odd_ones({host: of["folder"]["path"] for host, of in facts.items()})
    if odd:
        there = listed(sorted({facts[host]["folder"]["path"] for host in odd}))
        yield Finding(
            "folder",
            "warning",
            f"of the run's folder there is {there} here, {common} elsewhere; every rank writes its "
            "part of a checkpoint to one folder that all hosts share",
            "mount the shared file system there, or set directory=... to a folder on one",
            odd,
        )


def _disk(facts: Facts, config: Config, size: int | None) -> _Problems:
    """Space for checkpoints: the one to come, and as many as are kept beside it."""
    if size is None:
        return
    for host, of in facts.items():
        space, path = of["folder"]["space"], of["folder"]["path"]
        if space is None:
            continue
        wanted = max(1, config.checkpoint.keep + 1 - of["folder"]["checkpoints"])
        fits = space["free"] // size
        if fits < wanted:
            yield Finding(
                "disk",
                "warning" if fits else "error",
                f"{path}: {human_bytes(space['free'])} free for checkpoints of {human_bytes(size)};"
                f" checkpoint.keep = {config.checkpoint.keep} needs {human_bytes(wanted * size)} "
                "there, since an old one goes only when the new one is whole",
                "free space, set directory=... to a larger disk"
                + (", or keep fewer" if fits else ""),
                (host,),
            )

    def full(of: Mapping[str, Any]) -> bool:
        inodes = (of["folder"]["space"] or {}).get("inodes")
        return inodes is not None and inodes < _FEW_INODES

    if few := _having(facts, full):
        text = f"under {_FEW_INODES} inodes are left where checkpoints go: no more files fit"
        yield Finding("disk", "error", text, "delete small files there, or set directory=...", few)


def _disk_text(facts: Facts) -> str:
    free = [of["folder"]["space"]["free"] for of in facts.values() if of["folder"]["space"]]
    return f"{human_bytes(min(free))} free for checkpoints" if free else "not known"


def _shm(facts: Facts) -> _Problems:
    """Ranks on processors talk by gloo, which needs none."""

    def short(of: Mapping[str, Any]) -> bool:
        gpus = of["gpus"]
        return (
            isinstance(gpus, list)
            and len(gpus) > 1
            and of["shm"] is not None
            and of["shm"]["bytes"] < _GPU_SHM_BYTES
        )

    if hosts := _having(facts, short):
        size = min(facts[host]["shm"]["bytes"] for host in hosts)
        yield Finding(
            "shm",
            "warning",
            f"/dev/shm has {human_bytes(size)}; NCCL wants {human_bytes(_GPU_SHM_BYTES)}",
            "mount -o remount,size=8G /dev/shm; in a container docker.shared_memory (--shm-size)",
            hosts,
        )


def _locks(facts: Facts) -> _Problems:
    """Locks that no host holds; hosts that share a folder see the same file."""
    locks = [(host, lock) for host, of in facts.items() for lock in of["locks"]]
    held = {(lock["path"], lock["made"]) for _, lock in locks if lock["held"]}
    left: dict[str, list[str]] = {}
    for host, lock in locks:
        if (lock["path"], lock["made"]) not in held:
            left.setdefault(lock["path"], []).append(host)
    for path, hosts in left.items():
        yield Finding(
            "locks",
            "warning",
            f"{path} is over a minute old and no process of these hosts has it open: what torch or "
            "DeepSpeed would compile there waits for it for ever",
            f"rm {path}",
            tuple(hosts),
        )


def _compiled_text(config: Config) -> str:
    """What is compiled while the run goes on; a compiler that is missing would end it there."""
    if isinstance(config.optimizer, OwnOptimizer):
        return f"what {config.optimizer.name} compiles is its own affair; nothing else is"
    return "nothing of the run needs a compiler"


def _port(facts: Facts, port: int | None) -> _Problems:
    for host, of in facts.items():
        if of["port"] not in (None, "free"):
            yield Finding(
                "port",
                "error",
                f"port {port}, where the ranks meet: {of['port']}",
                f"end what holds it (ss -ltnp 'sport = :{port}'), or set launch.port",
                (host,),
            )


def _names(facts: Facts, master: str, interface: bool) -> _Problems:
    """Where hosts would look for the first one, and tell others to look for themselves."""
    cure = "enter it in /etc/hosts or the DNS with its address in the network, or set --master"
    first = next(iter(facts))
    if lost := _having(facts, lambda of: not of["names"].get(master)):
        yield Finding("names", "error", f"{master}, where the ranks meet: no such name", cure, lost)
    looping = _having(facts, lambda of: _loops(of["names"].get(master)))
    if others := tuple(host for host in looping if host != first):
        text = f"{master}, where the ranks meet, is taken for this host itself (127.*)"
        yield Finding("names", "error", text, cure, others)

    def hidden(of: Mapping[str, Any]) -> bool:
        own = of["names"].get(of["host"])
        return not own or _loops(own)

    if not interface and (hosts := _having(facts, hidden)):
        yield Finding(
            "names",
            "warning" if all(facts[host]["gpus"] for host in hosts) else "error",
            "its own name leads others nowhere, and gloo gives them the address that it stands for",
            "set GLOO_SOCKET_IFNAME in launch.environment of the profile, or mend /etc/hosts there",
            hosts,
        )


def _loops(addresses: Sequence[str] | None) -> bool:
    """Whether there are addresses, and all lead back to the host."""
    return bool(addresses) and all(ip_address(a.partition("%")[0]).is_loopback for a in addresses)


def _gpus(facts: Facts, ranks_per_node: int) -> _Problems:
    for host, of in facts.items():
        if isinstance(of["gpus"], str):
            cure = "look at `nvidia-smi` and the kernel's log there, or leave it out with --exclude"
            yield Finding("gpus", "error", of["gpus"], cure, (host,))
    rows = {h: of["gpus"] or [] for h, of in facts.items() if not isinstance(of["gpus"], str)}
    counts = {host: len(gpus) for host, gpus in rows.items()}
    if any(counts.values()) and (
        few := [h for h, count in counts.items() if count < ranks_per_node]
    ):
        text = f"{listed([counts[host] for host in few])} GPUs for {ranks_per_node} ranks a node"
        cure = "leave the host out with --exclude, or ask for fewer with --ranks-per-node"
        yield Finding("gpus", "error", text, cure, tuple(few))
    for key in ("name", "driver"):
        values = {
            host: listed(sorted({gpu[key] for gpu in gpus})) for host, gpus in rows.items() if gpus
        }
        common, odd = odd_ones(values)
        if odd:
            text = f"{key} of GPUs: {listed([values[host] for host in odd])}; elsewhere {common}"
            cure = "use hosts that are alike: the slowest sets the pace"
            yield Finding("gpus", "warning", text, cure, odd)
    for host, gpus in rows.items():
        for number, gpu in enumerate(gpus):
            if isinstance(gpu["ecc_errors"], int) and gpu["ecc_errors"]:
                text = f"GPU {number}: {gpu['ecc_errors']} uncorrectable memory errors since boot"
                cure = "reset the GPU or reboot the host, or leave it out with --exclude"
                yield Finding("gpus", "warning", text, cure, (host,))
            used, size = gpu["used_mib"], gpu["memory_mib"]  # text where it is not supported
            if isinstance(used, int) and isinstance(size, int) and used > _GPU_USED * size:
                text = f"GPU {number}: {used} of {size} MiB are taken"
                yield Finding("gpus", "warning", text, "end what runs there (nvidia-smi)", (host,))


def _gpus_text(facts: Facts) -> str:
    gpus = next(iter(facts.values()))["gpus"] if facts else None
    return f"{len(gpus)} x {gpus[0]['name']} a host" if gpus else "none: ranks run on processors"
