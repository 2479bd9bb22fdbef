"""How the ranks of a run find each other: at a store of the first, with a roll-call, so that those
that do not come are named."""

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from pretrain.engine.placement import Placement
from pretrain.errors import UserError

_ROLL_CALL_SECONDS = 20.0  # for late answers, once the time is up


def meet(place: Placement) -> dist.Store:
    """The store at which all ranks are present; raises UserError that names those that are not
    there in `join_seconds`."""
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
    store.set(f"here/{place.rank}", socket.gethostname())
    if store.add("present", 1) == place.size:
        store.set("all", "")
    try:
        store.wait(["all"], timeout)
    except RuntimeError:
        raise _not_there(store, place) from None
    return store


def attempt() -> str:
    """What the keys of this attempt begin with: torchrun may start the ranks again."""
    return f"anthesis/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _not_there(store: dist.Store, place: Placement) -> UserError:
    try:
        store.set_timeout(timedelta(seconds=_ROLL_CALL_SECONDS))
        missing = [r for r in range(place.size) if not store.check([f"here/{r}"])]
    except RuntimeError:
        return _no_store(place, RuntimeError("it does not answer any more"))
    hosts = list(dict.fromkeys(filter(None, map(place.host_of, missing))))
    ranks = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
    where = f" of {', '.join(hosts)}" if hosts else ""
    return UserError(
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
