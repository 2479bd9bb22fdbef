"""How the ranks of a run find each other: at a store of the first, with a roll-call, so that those
that do not come are named."""

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from pretrain.engine.placement import Placement
from pretrain.errors import UserError
from pretrain.stopping import StopAsked, asked_by

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.01, 0.5


def meet(place: Placement, gpu: str | None = None) -> dist.Store:
    """The store at which all ranks are present; raises UserError that names those that are not
    there in `join_seconds`, or a `gpu` (its identity) that two ranks have."""
    host, port = place.master
    # Under torchrun the agent of the first node has a store, made anew for each attempt.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=place.join_seconds)
    try:
        store: dist.Store = dist.TCPStore(
            host, port, is_master=place.rank == 0 and not agent, timeout=timeout,
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise _no_store(place, error) from None
    store = dist.PrefixStore(attempt(), store)
    here = socket.gethostname()
    store.set(f"here/{place.rank}", here)
    kind = "a GPU" if gpu else "no GPU"
    others = store.compare_set("device", "", kind).decode()
    if kind != others:
        store.set(
            "refused",
            f"rank {place.rank} on {here} has {kind}, others have {others}\n"
            "  rule: all ranks are on GPUs, or all on processors\n"
            "  cure: look at `nvidia-smi` there, or leave the host out (--exclude)",
        )
    elif gpu and store.add(f"gpu/{here}/{gpu}", 1) > 1:
        store.set(
            "refused",
            f"rank {place.rank}: another rank of {here} has the GPU {gpu} too\n"
            "  rule: a rank has a GPU of its own\n"
            "  cure: as many ranks a node as it has GPUs (--ranks-per-node), all visible to each",
        )
    elif store.add("present", 1) == place.size:
        store.set("all", "")
    _await_all(store, place)
    return store


def _await_all(store: dist.Store, place: Placement) -> None:
    """Until all are there, or one has said why it cannot be. By looking, not by waiting, or this
    process would be deaf to signals meanwhile."""
    deadline = time.monotonic() + place.join_seconds
    pause = _SHORTEST_PAUSE_SECONDS
    try:
        while not store.check(["all"]):
            if time.monotonic() > deadline and not store.check(["refused"]):
                store.set("refused", _not_there(store, place))
            if store.check(["refused"]):
                text = store.get("refused").decode()
                if place.rank == 0:  # others ask for it at this rank
                    time.sleep(2 * _LONGEST_PAUSE_SECONDS)
                raise UserError(text)
            if asked_by():
                print(f"ended by {asked_by()} while waiting for the other ranks", flush=True)
                raise StopAsked
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    except RuntimeError as error:
        raise _no_store(place, error) from None


def attempt() -> str:
    """What the keys of this attempt begin with: torchrun may start the ranks again."""
    # And a job of Slurm may have several steps.
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RESTART_COUNT")
    return "/".join(["anthesis", *(os.environ.get(name, "0") for name in names)])


def _not_there(store: dist.Store, place: Placement) -> str:
    missing = [r for r in range(place.size) if not store.check([f"here/{r}"])]
    hosts = list(dict.fromkeys(filter(None, map(place.host_of, missing))))
    ranks = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
    where = f" of {', '.join(hosts)}" if hosts else ""
    return (
        f"not there after {place.join_seconds} s: rank {ranks}{where}\n"
        f"  rule: all {place.size} ranks meet at {place.master[0]}:{place.master[1]}\n"
        "  cure: `anthesis doctor` looks at every host; launch without those (--exclude), or give "
        "them more time (launch.join_timeout)"
    )


def _no_store(place: Placement, error: Exception) -> UserError:
    host, port = place.master
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if place.rank == 0:
        return UserError(
            f"{host}:{port}: {text[:200]}\n"
            "  rule: the first rank listens there\n"
            "  cure: another launch.port (MASTER_PORT) if it is in use; the address has to be this "
            "host's"
        )
    return UserError(
        f"rank {place.rank} on {socket.gethostname()}: no answer from {host}:{port}: {text[:200]}\n"
        "  rule: the first rank listens there, and every host reaches it\n"
        "  cure: see what the first rank says; check names and firewalls with `anthesis doctor`"
    )
