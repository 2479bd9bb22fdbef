"""Cluster profiles, shipped and measured; hosts are network namespaces where root allows them."""

import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.clusters import load_cluster
from launch.measure import main
from pretrain.errors import ConfigError
from tests.ranks import run_ranks

SHIPPED = [
    path
    for path in sorted((Path(__file__).parents[1] / "configs/clusters").glob("*.toml"))
    if "[device]" in path.read_text()  # others are for launching alone
]
ALL_REDUCE_BYTES = 2**26


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_profiles(path):
    cluster = load_cluster(path)
    assert cluster.name == path.stem
    assert cluster.sources
    for source in cluster.sources:
        assert source.startswith(("https://", "http://", "measured by `anthesis cluster measure`"))
    assert "estimate" in path.read_text().lower() or cluster.device.shared_cores


def test_bloom_ran_on_384_gpus():
    path = next(path for path in SHIPPED if path.stem == "jean-zay-a100")
    cluster = load_cluster(path)
    assert cluster.devices == 384
    assert cluster.device.memory == 80e9
    assert load_cluster(path, ["nodes=24"]).devices == 192


def test_all_problems_of_a_profile_are_reported(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text(
        'name = "bad"\nnodes = 0\ndevices_per_node = 8\nGPUs = 8\n'
        '[device]\nname = "x"\nmemory = "80 parsecs"\nmemory_gbytes_per_s = -1\n'
        "product_efficiency = 1.5\n[device.peak_tflops]\nint4 = 1\n"
        "[network.inside]\ngbytes_per_s = inf\nlatency_us = 1\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_cluster(bad)
    found = {problem.key for problem in caught.value.problems}
    for key in ("nodes", "GPUs", "device.memory", "device.memory_gbytes_per_s",
                "device.product_efficiency", "network.inside.gbytes_per_s",
                "network.between"):  # fmt: skip
        assert key in found
    assert any(key.startswith("device.peak_tflops.int4") for key in found)
    assert all(problem.cure for problem in caught.value.problems)


# --- measuring ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured_here(tmp_path_factory):
    """A profile as the command writes it when it starts two ranks itself."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "here.toml").write_text("earlier")
    command = [sys.executable, "-m", "launch.measure", "--ranks", "2", "--seconds", "0.2",
               "--output", "here.toml", "--name", "two", "--force"]  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=200, env=_environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all-reduce inside" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["here.toml"]
    return folder / "here.toml"


def test_measured_profile_is_sane(measured_here):
    cluster = load_cluster(measured_here)
    device = cluster.device
    assert (cluster.name, cluster.nodes, cluster.devices_per_node) == ("two", 1, 2)
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert device.memory == pytest.approx(total, rel=0.05)
    assert 200e6 < device.runtime < 2e9
    assert device.shared_cores
    assert set(device.peak_tflops) == {"bf16", "fp32"}
    assert all(0.001 < peak < 1000 for peak in device.peak_tflops.values())
    assert 0.1 < device.memory_gbytes_per_s < 10_000
    assert 1 < cluster.network.inside.latency_us < 100_000
    assert cluster.network.between == cluster.network.inside
    assert "# not measured" in measured_here.read_text()
    assert cluster.reliability.write_gbytes_per_s > 0.001


def test_measured_bandwidth_is_that_of_an_all_reduce(measured_here):
    seconds = statistics.median(run_ranks(2, _time_all_reduces)[0])
    expected = ALL_REDUCE_BYTES / seconds / 1e9
    assert expected / 3 < load_cluster(measured_here).network.inside.gbytes_per_s < expected * 3


def _time_all_reduces(world):
    import torch

    times, message = [], torch.zeros(ALL_REDUCE_BYTES // 4)
    for _ in range(5):
        world.barrier()
        began = time.perf_counter()
        world.sum(message)
        times.append(time.perf_counter() - began)
    return times


def test_one_rank_says_what_was_not_measured(tmp_path):
    profile, notes, said = run_ranks(1, _measure_alone, tmp_path)[0]
    assert set(notes) == {"network.inside", "network.between"}
    assert profile["network"]["between"] == profile["network"]["inside"]
    assert not any("all-reduce" in line for line in said)
    assert list(tmp_path.iterdir()) == []


def _measure_alone(world, folder):
    from pretrain.lab.measure import measure

    os.chdir(folder)
    said = []
    measured = measure(world, 0.0, said.append)
    return measured.profile, measured.notes, said


def test_nodes_of_unequal_size_are_refused():
    for message in run_ranks(3, _measure_unequal):
        assert "a: 2, b: 1" in message
        assert "rule: all nodes have the same number of ranks" in message


def _measure_unequal(world):
    from pretrain.errors import UserError
    from pretrain.lab.measure import measure

    socket.gethostname = lambda: "ab"[world.rank // 2]
    with pytest.raises(UserError) as caught:
        measure(world, 0.0, lambda what: None)
    return str(caught.value)


def test_ranks_of_a_processor_add_up():
    for profile in run_ranks(2, _measure_with_half_second_rounds):
        block_flops = 3 * 2 * 1024 * 12 * 512**2
        assert profile["device"]["peak_tflops"]["fp32"] == 2 * block_flops / 0.5 / 1e12
        assert profile["device"]["memory_gbytes_per_s"] == 2 * 3 * 4 * 2**25 / 0.5 / 1e9
        assert profile["reliability"]["write_gbytes_per_s"] == 2 * 2**26 / 0.5 / 1e9


def _measure_with_half_second_rounds(world):
    from pretrain.lab import measure

    measure._rounds = lambda world, work, seconds: [0.5]
    return measure.measure(world, 0.0, lambda what: None).profile


def test_bandwidth_is_that_of_a_ring():
    for link in run_ranks(3, _link_of_half_a_second):
        assert link["gbytes_per_s"] == pytest.approx(2 * 2 / 3 * 2**20 / 0.5 / 1e9)
        assert link["latency_us"] == pytest.approx(0.5e6 / 20)


def _link_of_half_a_second(world):
    """Slow enough for the least message, 1 MiB, to be the largest too."""
    from pretrain.lab import measure

    measure._rounds = lambda world, work, seconds: [0.5]
    return measure._link(world, [[0, 1, 2]], 1, 1.0)


def test_a_profile_is_not_replaced(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text("mine")
    assert main(["--output", str(path)]) == 2
    assert "add --force" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main(["--output", str(tmp_path / "absent/x.toml")]) == 2
    assert "no such folder" in capsys.readouterr().err


# --- two hosts ------------------------------------------------------------------------------------


def test_a_slow_link_between_two_hosts(tmp_path):
    with _two_hosts("200mbit") as hosts:
        ranks = [
            _start_rank(hosts, host, local, tmp_path) for host in range(2) for local in range(2)
        ]
        try:
            for rank in ranks:
                output, _ = rank.communicate(timeout=200)
                assert rank.returncode == 0, output
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    cluster = load_cluster(tmp_path / "pair.toml")
    assert (cluster.nodes, cluster.devices_per_node) == (2, 2)
    # Headers of Ethernet, IP and TCP take 4.4% of 25 MB/s.
    assert cluster.network.between.gbytes_per_s == pytest.approx(0.0239, rel=0.15)
    assert cluster.network.inside.gbytes_per_s > 10 * cluster.network.between.gbytes_per_s
    assert "# not measured" not in (tmp_path / "pair.toml").read_text()


@contextmanager
def _two_hosts(rate):
    """Names of two network namespaces with a cable between them that carries `rate` each way."""
    tools = ("ip", "tc", "unshare")
    if os.geteuid() != 0 or not all(map(shutil.which, tools)):
        pytest.skip(f"two hosts on one machine need root and {', '.join(tools)}")
    hosts = [f"anthesis-{os.getpid()}-{host}" for host in range(2)]
    try:
        try:
            for host in hosts:
                _root("ip", "netns", "add", host)
            _root("ip", "link", "add", "eth0", "netns", hosts[0],
                  "type", "veth", "peer", "name", "eth0", "netns", hosts[1])  # fmt: skip
        except subprocess.CalledProcessError as error:
            pytest.skip(f"root may not make network namespaces here: {error.stderr.strip()}")
        for number, host in enumerate(hosts):
            inside = ("ip", "netns", "exec", host)
            _root(*inside, "ip", "address", "add", f"10.77.1.{number + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _root(*inside, "ip", "link", "set", device, "up")
            _root(*inside, "tc", "qdisc", "add", "dev", "eth0", "root",
                  "tbf", "rate", rate, "burst", "128kb", "latency", "100ms")  # fmt: skip
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def _root(*command):
    subprocess.run(command, check=True, capture_output=True, text=True)


def _start_rank(hosts, host, local, folder):
    """One of two ranks of a host, as a launcher would start it there."""
    code = (
        "import socket, sys; socket.sethostname(sys.argv[1]); "
        "from launch.measure import main; sys.exit(main(sys.argv[2:]))"
    )
    return subprocess.Popen(
        ["ip", "netns", "exec", hosts[host], "unshare", "--uts", sys.executable, "-c", code,
         hosts[host], "--output", "pair.toml", "--seconds", "0.6"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment(
            RANK=str(2 * host + local),
            WORLD_SIZE="4",
            LOCAL_RANK=str(local),
            LOCAL_WORLD_SIZE="2",
            OMP_NUM_THREADS="1",
            MASTER_ADDR="10.77.1.1",
            MASTER_PORT="29500",
            GLOO_SOCKET_IFNAME="eth0",
        ),
    )  # fmt: skip


def _environment(**more):
    """Ours without what a launcher or another test has left in it."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT")  # fmt: skip
    return {key: value for key, value in os.environ.items() if key not in launchers} | more
