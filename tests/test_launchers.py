"""The demo on several hosts, by each launcher: the losses are those of one process."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

from pretrain.observe.metrics import read_metrics
from tests.hosts import ROOT
from tests.ranks import run_worker
from tests.ssh_hosts import SshHosts, reason_missing
from tests.test_hosts_lost import rows_of, slow_config, wait_for
from tests.tiny import write_corpus

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))
ANTHESIS = str(Path(sys.executable).parent / "anthesis")
LIMIT_SECONDS = 240
HOSTS = 4


def demo_config(folder, **changes):
    """The demo's config, on text of a test and a few steps long."""
    tree = tomllib.loads((ROOT / "configs/demo.toml").read_text())
    prefixes = [str(write_corpus(folder, 2000, seed)) for seed in (0, 1)]
    tree["data"]["sources"] = [
        {"name": name, "path": path, "weight": weight}
        for name, path, weight in zip(("code", "docs"), prefixes, (0.6, 0.4), strict=True)
    ]
    del tree["data"]["tokenizer"]
    tree["directory"] = str(folder / "runs")
    tree["recipe"]["train"] = "10k tokens"
    tree["recipe"]["batch"]["ramp"] = "6k tokens"
    tree["observe"]["peak_tflops"] = 1.0  # not measured: hosts share the cores
    path = folder / "demo.toml"
    path.write_text(tomli_w.dumps(tree | changes))
    return path


def losses(folder, name="demo"):
    rows = read_metrics(folder / "runs" / name / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The config, and the losses of one process."""
    folder = tmp_path_factory.mktemp("launchers")
    path = demo_config(folder)
    code, text = run_worker([str(path), "name=alone"])
    assert code == 0, text
    found = losses(folder, "alone")
    assert len(found) > 8
    return path, found


@pytest.fixture(scope="module")
def hosts():
    with SshHosts(HOSTS) as up:
        yield up


def profile(folder, nodes, **launch):
    """A cluster of the first `nodes` hosts."""
    tree = {"nodes": nodes, "devices_per_node": 1, "launch": {
        "hosts": [f"h{i}" for i in range(nodes)],
        "join_timeout": "60 s", **launch}}  # fmt: skip
    path = folder / f"cluster{nodes}.toml"
    path.write_text(tomli_w.dumps(tree))
    return str(path)


def check(folder, name, expected, text):
    """The run's losses are `expected`, to rounding."""
    found = losses(folder, name)
    assert len(found) == len(expected), text[-3000:]
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4


def leftovers(hosts):
    """Nothing of a run is left on any host."""
    return [line for i in range(HOSTS) for line in hosts.processes(i, "pretrain|launch")]


@pytest.mark.parametrize(("backend", "options", "nodes"), [
    ("torchrun", [], 2),
    ("torchrun", [], 4),
    ("torchrun", ["--elastic", "2:2"], 2),
    ("deepspeed", [], 2),
    ("deepspeed", [], 4),
    ("accelerate", [], 2),
])  # fmt: skip
def test_from_one_host_to_all(demo, hosts, backend, options, nodes):
    path, expected = demo
    name = f"{backend}{nodes}{len(options)}"
    command = [ANTHESIS, "launch", backend, str(path), f"name={name}", *options]
    code, text = hosts.run(
        0, [*command, "--cluster", profile(path.parent, nodes)], timeout=LIMIT_SECONDS
    )
    assert code == 0, text[-5000:]
    check(path.parent, name, expected, text)
    for i in range(nodes):  # the table of ranks
        assert re.search(rf"^(h0:)? +h{i} +{i} +0 +cpu", text, re.MULTILINE), text
    assert not leftovers(hosts)


@pytest.mark.parametrize("backend", ["deepspeed", "torchrun", "accelerate"])
def test_each_host_starts_its_own_part(demo, hosts, backend, tmp_path):
    """Where ssh is not allowed: the same command on every node, which knows its own name."""
    path, expected = demo
    name = f"{backend}-no-ssh"
    command = [ANTHESIS, "launch", backend, str(path), f"name={name}", "--no-ssh",
               "--cluster", profile(path.parent, 2)]  # fmt: skip
    outputs = [tmp_path / f"h{i}.txt" for i in range(2)]
    parts = [hosts.start(i, command, {}, outputs[i]) for i in range(2)]
    for part, output in zip(parts, outputs, strict=True):
        assert part.wait(LIMIT_SECONDS) == 0, output.read_text()[-5000:]
    check(path.parent, name, expected, outputs[0].read_text())
    assert not leftovers(hosts)


def test_accelerate_by_hand_with_the_file_of_the_project(demo, hosts, tmp_path):
    path, expected = demo
    outputs = [tmp_path / f"h{i}.txt" for i in range(2)]
    parts = []
    for i in range(2):
        command = [
            *(str(Path(ANTHESIS).with_name("accelerate")), "launch"),
            *("--config_file", str(ROOT / "configs/accelerate/cpu.yaml"), "--num_machines", "2"),
            *("--num_processes", "2", "--machine_rank", str(i), "--main_process_ip", "h0"),
            *("--main_process_port", "29600", "--module", "pretrain", str(path), "name=by-hand"),
        ]
        parts.append(hosts.start(i, command, {}, outputs[i]))
    for part, output in zip(parts, outputs, strict=True):
        assert part.wait(LIMIT_SECONDS) == 0, output.read_text()[-5000:]
    check(path.parent, "by-hand", expected, outputs[0].read_text())


def test_a_range_of_nodes_goes_on_without_one(hosts, tmp_path):
    """The host dies, the ranks of the other start again alone and resume from a checkpoint."""
    path = slow_config(tmp_path, {"method": "allreduce"}, name="tiny")
    command = [ANTHESIS, "launch", "torchrun", str(path), "--elastic", "1:2", "--restarts", "3",
               "--cluster", profile(tmp_path, 2, join_timeout="90 s"),
               "recipe.train=1500 samples", "recipe.learning_rate.decay=1500 samples"]  # fmt: skip
    output = tmp_path / "launch.txt"
    launch = hosts.start(0, command, {}, output)
    try:
        wait_for(lambda: len(losses(tmp_path, "tiny")) > 8, "steps of two ranks")
        hosts.kill(1)
        assert launch.wait(LIMIT_SECONDS) == 0, output.read_text()[-5000:]
    finally:
        if launch.poll() is None:
            launch.kill()
        hosts.boot(1)
    text = output.read_text()
    assert "error: h1: ssh: " in text
    assert "goes on after step" in text
    assert "2 rank(s) on cpu" in text
    assert "1 rank(s) on cpu" in text
    steps = [row["step"] for row in rows_of(tmp_path)]
    assert steps == list(range(1, 173))
    assert not leftovers(hosts)


def test_a_host_that_is_not_there_is_named(demo, hosts):
    path, _ = demo
    cluster = profile(path.parent, 2)
    hosts.kill(1)
    try:
        command = [ANTHESIS, "launch", "torchrun", str(path), "name=lost", "--cluster", cluster]
        code, text = hosts.run(0, command, timeout=LIMIT_SECONDS)
        assert code == 255
        assert "error: h1: ssh: " in text
        assert "--exclude h1" in text
        # Without it the run goes on.
        code, text = hosts.run(0, [*command, "--exclude", "h1"], timeout=LIMIT_SECONDS)
        assert code == 0, text[-3000:]
    finally:
        hosts.boot(1)
    assert not leftovers(hosts)


def test_a_node_that_does_not_come_is_named(demo, hosts):
    """Without ssh nobody knows until the time is up: then the roll-call says which."""
    path, _ = demo
    cluster = profile(path.parent, 2, join_timeout="5 s")
    command = [ANTHESIS, "launch", "deepspeed", str(path), "name=lost", "--no-ssh",
               "--cluster", cluster]  # fmt: skip
    code, text = hosts.run(0, command, timeout=LIMIT_SECONDS)
    assert code != 0
    assert "not there after 5 s: rank 1 of h1" in text, text[-3000:]
    assert not leftovers(hosts)


def test_a_clock_that_is_wrong_is_found_before_training(demo, hosts):
    """torchrun with a range of nodes would train alone on the first, and call it a success."""
    path, _ = demo
    hosts.shift_clock(1, -20)
    try:
        command = [ANTHESIS, "launch", "torchrun", str(path), "name=clock",
                   "--cluster", profile(path.parent, 2)]  # fmt: skip
        code, text = hosts.run(0, command, timeout=LIMIT_SECONDS)
        assert code != 0
        assert "error: clocks: h1: " in text, text[-3000:]
        assert not (path.parent / "runs/clock/metrics.jsonl").exists()
    finally:
        hosts.shift_clock(1, 0)
    assert not leftovers(hosts)
