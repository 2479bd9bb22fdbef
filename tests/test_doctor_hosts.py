"""`anthesis doctor` on real hosts: what is broken on one of them is named with its cure, and
nothing else is reported."""

import importlib.metadata
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.ssh_hosts import SshHosts, reason_missing
from tests.tiny import write_config

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

COMMAND = [sys.executable, "-m", "launch.cli", "doctor"]
EVEN = {"recipe__batch": {"final": 6}, "engine": {"precision": "fp32", "micro_batch_samples": 1}}


@pytest.fixture(scope="module")
def hosts():
    with SshHosts(3) as three:
        yield three


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, **EVEN)


def examine(hosts, config, *more, env=None):
    """Exit code and the findings that are not ok, from host 0; facts too."""
    arguments = [str(config), *more, "--hosts", "h0,h1,h2", "--timeout", "3", "--json"]
    env = {"TORCH_EXTENSIONS_DIR": str(config.parent / "extensions"), **(env or {})}
    code, output = hosts.run(0, [*COMMAND, *arguments], env)
    try:
        found = json.loads(output)
    except ValueError:
        raise AssertionError(output) from None
    return code, [f for f in found["findings"] if f["level"] != "ok"], found["facts"]


def only(found, check, level, host):
    """The one finding, which is what it should be."""
    assert [(f["check"], f["level"], f["hosts"]) for f in found] == [
        (check, level, [host] if host else [])
    ], found
    return found[0]


def test_hosts_that_are_well(hosts, config):
    code, found, facts = examine(hosts, config)
    assert (code, found) == (0, [])
    assert [of["host"] for of in facts.values()] == ["h0", "h1", "h2"] == list(facts)


def test_speed_between_hosts(hosts, config):
    """Products and an all-reduce; on shared cores who is slow is a matter of luck."""
    hosts.shape(1, "200mbit")
    try:
        env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        arguments = [str(config), "--hosts", "h0,h1", "--speed", "--json"]
        code, output = hosts.run(0, [*COMMAND, *arguments], env)
    finally:
        hosts.shape(1, None)
    assert code == 0, output
    one = json.loads(output)["findings"][-1]
    assert (one["check"], one["level"]) == ("speed", "ok")
    speed = re.search(r"all-reduce of 2 hosts: ([0-9.]+) GB/s", one["found"])
    assert 0 < float(speed[1]) < 0.026  # the link's 0.025


def test_secrets_stay_here(hosts, config):
    """Nothing but the job's environment reaches the hosts."""
    dump = config.parent / "python"
    dump.write_text(
        f'#!/bin/sh\nenv > {config.parent}/env.$(hostname)\nexec {sys.executable} "$@"\n'
    )
    dump.chmod(0o755)
    profile = config.parent / "profile.toml"
    profile.write_text(f'launch.python = "{dump}"\n')
    env = {"HF_TOKEN": "hf_123", "NCCL_DEBUG": "WARN; touch x"}
    code, found, _ = examine(hosts, config, "--cluster", str(profile), env=env)
    assert (code, found) == (0, [])
    for host in ("h0", "h1", "h2"):
        seen = (config.parent / f"env.{host}").read_text()
        assert "hf_123" not in seen
        assert "NCCL_DEBUG=WARN; touch x\n" in seen


def test_ramp_with_idle_ranks(hosts, config):
    more = ["recipe.batch.start=2", "recipe.batch.increment=4", "recipe.batch.ramp=20 samples"]
    code, found, _ = examine(hosts, config, *more)
    one = only(found, "batches", "warning", None)
    assert code == 0
    assert one["found"] == (
        "batch 2 for 3 ranks: 1 idle in steps 1 to 10, 10 steps and 160 tokens, 12.7% of the run's"
    )
    assert "at most 2 ranks, and go on with all from step 11" in one["cure"]
    assert "recipe.batch.start be 3" in one["cure"]


def test_missing_host(hosts, config):
    hosts.kill(2)
    try:
        code, found, facts = examine(hosts, config)
        one = only(found, "hosts", "error", "h2")
        assert code == 1
        assert "connect to host h2" in one["found"]
        assert "--exclude" in one["cure"]
        assert list(facts) == ["h0", "h1"]
    finally:
        hosts.boot(2)


def test_wrong_version(hosts, config):
    metadata = next(
        Path(str(importlib.metadata.distribution("deepspeed").locate_file(f)))
        for f in importlib.metadata.files("deepspeed")
        if f.name == "METADATA"
    )
    other = config.parent / "METADATA"
    other.write_text(metadata.read_text().replace("\nVersion: 0.", "\nVersion: 9."))
    hosts.mount(1, other, metadata)
    try:
        code, found, _ = examine(hosts, config)
        one = only(found, "versions", "error", "h1")
        assert code == 1
        assert "deepspeed 9." in one["found"]
        assert "install the same deepspeed" in one["cure"]
    finally:
        unmount(hosts, 1, metadata)


def test_port_in_use(hosts, config):
    listen = "import socket, time; s = socket.create_server(('', 29500)); print(1); time.sleep(60)"
    log = config.parent / "log"
    holder = hosts.start(0, [sys.executable, "-c", listen], {}, log)
    try:
        wait_for(lambda: log.read_text())
        code, found, _ = examine(hosts, config)
        one = only(found, "port", "error", "h0")
        assert code == 1
        assert "port 29500, where the ranks meet: Address already in use" in one["found"]
        assert "launch.port" in one["cure"]
        assert examine(hosts, config, "--master", "h0:29501")[:2] == (0, [])
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize(("shift", "level"), [(-20, "error"), (7, "warning")])
def test_clock(hosts, config, shift, level):
    hosts.shift_clock(2, shift)
    try:
        code, found, _ = examine(hosts, config)
        one = only(found, "clocks", level, "h2")
        assert code == (level == "error")
        assert ("behind" if shift < 0 else "ahead") in one["found"]
        assert "chronyc" in one["cure"]
    finally:
        hosts.shift_clock(2, 0)


def test_small_disk(hosts, config):
    """A checkpoint of 12 bytes a parameter: 8 MB do not hold one of a million parameters."""
    folder = config.parent / "runs"
    folder.mkdir()
    hosts.small_disk(1, folder, "8m")
    try:
        larger = ["model.hidden_size=288", "model.layers=1"]
        code, found, _ = examine(hosts, config, *larger)
        one = only(found, "disk", "error", "h1")
        assert code == 1
        assert "8.39MB free for checkpoints of 12.2MB" in one["found"]
        assert "directory=" in one["cure"]
        code, found, _ = examine(hosts, config, "model.hidden_size=192", "model.layers=1")
        assert code == 0
        assert "keep fewer" in only(found, "disk", "warning", "h1")["cure"]
    finally:
        unmount(hosts, 1, folder)


def test_stale_lock(hosts, config):
    """All hosts see the file; on one of them a process may still be compiling."""
    lock = config.parent / "extensions" / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    compile = (
        "import os, sys, time\n"
        "held = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)\n"
        "os.utime(sys.argv[1], (time.time() - 600, time.time() - 600))\n"
        "print(1)\n"
        "time.sleep(60)"
    )
    log = config.parent / "log"
    compiler = hosts.start(1, [sys.executable, "-c", compile, str(lock)], {}, log)
    try:
        wait_for(lambda: log.read_text())
        assert examine(hosts, config)[:2] == (0, [])
    finally:
        compiler.kill()
        compiler.wait()
    code, found, _ = examine(hosts, config)
    (one,) = found
    assert (code, one["check"], one["level"]) == (0, "locks", "warning")
    assert one["hosts"] == ["h0", "h1", "h2"]
    assert one["cure"] == f"rm {lock}"


def test_other_data(hosts, config):
    shard = config.parent / "shard1.bin"
    other = config.parent / "other"
    shutil.copy(shard, other)
    with other.open("r+b") as file:
        file.write(b"\0\1")
    hosts.mount(2, other, shard)
    try:
        code, found, _ = examine(hosts, config)
        one = only(found, "data", "error", "h2")
        assert code == 1
        assert "source b is not that of the others" in one["found"]
        assert "corpus check" in one["cure"]
    finally:
        unmount(hosts, 2, shard)


def test_other_config(hosts, config):
    other = config.parent / "other.toml"
    for text, words in (
        (config.read_text().replace("seed = 5", "seed = 6"), "another: seed ("),
        ("seed = -1", "rule: "),
    ):
        other.write_text(text)
        hosts.mount(2, other, config)
        try:
            code, found, _ = examine(hosts, config)
            assert code == 1
            assert words in only(found, "config", "error", "h2")["found"]
        finally:
            unmount(hosts, 2, config)


def test_folder_that_is_not_shared(hosts, config):
    """/run is each host's own."""
    for i in (1, 2):
        hosts.folder(i, "/run/big/tiny")
    code, found, _ = examine(hosts, config, "directory=/run/big")
    one = only(found, "folder", "warning", "h0")
    assert code == 0
    assert "there is /run here, /run/big/tiny elsewhere" in one["found"]
    assert "shared" in one["cure"]


def unmount(hosts, i, target):
    code, output = hosts.run(i, ["umount", str(target)])
    assert code == 0, output


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
