"""What a host is asked before a run, and what is made of the answers."""

import copy
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from launch.speed import judge
from pretrain.config_file import load
from pretrain.health.batches import batch_findings
from pretrain.health.facts import host_facts
from pretrain.health.findings import findings, start_findings
from tests.tiny import write_config, write_corpus

RANKS = 3
EVEN = {"recipe__batch": {"final": 6}}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("health")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return load(write_config(folder, data__tokenizer=str(folder / "tokenizer"), **EVEN))


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    """The facts of this machine, which is host h0, h1 and h2 in what follows."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("extensions"))
    try:
        facts = host_facts(config, master="localhost", port=free_port())
    finally:
        del os.environ["TORCH_EXTENSIONS_DIR"]
    assert json.loads(json.dumps(facts)) == facts
    facts["names"][facts["host"]] = ["10.0.0.1"]
    facts["names"]["localhost"] = ["10.0.0.1"]
    return facts | {"offset": 0.0, "uncertainty": 0.1, "gpus": None}


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture
def facts(one):
    return {host: copy.deepcopy(one) for host in ("h0", "h1", "h2")}


def judged(facts, config, **more):
    more = {"ranks": RANKS, "master": "localhost", "port": 29500, "checkpoint_bytes": 10**6} | more
    return [f for f in findings(facts, config, **more) if f.level != "ok"]


def the(found):
    """The one finding: check, level, hosts; and its text."""
    (finding,) = found
    assert finding.cure
    return (finding.check, finding.level, *finding.hosts), f"{finding.found} / {finding.cure}"


def test_all_is_well(facts, config):
    assert judged(facts, config) == []
    fine = findings(facts, config, ranks=RANKS, master="localhost", port=1, checkpoint_bytes=1)
    assert {f.check for f in fine} == {
        "versions", "config", "data", "clocks", "folder", "shm", "locks", "disk", "gpus", "port",
        "names", "batches", "compile",
    }  # fmt: skip
    assert all(len(f"{f}") < 100 for f in fine)
    assert {f.check for f in findings({}, config, ranks=1)} == {"compile", "batches"}


def test_what_is_compiled(tmp_path):
    """Nothing of ours; an optimizer of the user's own may."""
    (ours,) = [
        f for f in findings({}, load(write_config(tmp_path)), ranks=1) if f.check == "compile"
    ]
    assert ours.found == "nothing of the run needs a compiler"
    config = load(write_config(tmp_path), ['optimizer={name="torch.optim:Adam"}'])
    (own,) = [f for f in findings({}, config, ranks=1) if f.check == "compile"]
    assert own.found.startswith("what torch.optim:Adam compiles is its own affair")


# --- each finding, with what makes it ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "level"),
    [("torch", "error"), ("deepspeed", "error"), ("code", "error"), ("nccl", "error"),
     ("python", "warning"), ("transformers", "warning")],
)  # fmt: skip
def test_versions(facts, config, name, level):
    facts["h1"]["versions"][name] = "9.9"
    what, text = the(judged(facts, config))
    assert what == ("versions", level, "h1")
    assert ("anthesis' own code" if name == "code" else f"{name} 9.9") in text


def test_of_two_the_first_is_right(facts, config):
    del facts["h2"]
    facts["h0"]["versions"]["torch"] = "9.9"
    what, text = the(judged(facts, config))
    assert what == ("versions", "error", "h1")
    assert "here, 9.9 elsewhere" in text


def test_missing_package(facts, config):
    for of in facts.values():
        of["versions"]["deepspeed"] = None
    what, text = the(judged(facts, config))
    assert what == ("versions", "error", "h0", "h1", "h2")
    assert "deepspeed is not installed" in text


def test_configs(facts, config, tmp_path):
    other = host_facts(load(write_config(tmp_path, **EVEN, seed=6, recipe__train="80 samples")))
    facts["h2"]["config"] = other["config"]
    what, text = the(judged(facts, config))
    assert what == ("config", "error", "h2")
    assert "seed, recipe" in text
    assert "data" not in text.split("(")[0]  # lies elsewhere, which is no difference


def test_sources(facts, config):
    facts["h2"]["sources"]["b"] = "other"
    facts["h2"]["manifests"] = {"b": "other"}  # alone in having any
    what, text = the(judged(facts, config))
    assert what == ("data", "error", "h2")
    assert "source b" in text


def test_manifests(facts, config):
    for host, of in facts.items():
        of["manifests"] = {"a": "x" if host == "h1" else "y"}
    assert the(judged(facts, config))[0] == ("data", "error", "h1")


def test_unreadable(facts, config):
    facts["h0"]["sources"].pop("a")
    facts["h0"]["unreadable"] = {"a": "/data/a.idx: No such file or directory"}
    what, text = the(judged(facts, config))
    assert what == ("data", "error", "h0")
    assert "No such file" in text
    assert "data.sources, a" in text


def test_tokenizer(facts, config):
    facts["h1"]["tokenizer"] = "other"
    what, text = the(judged(facts, config))
    assert what == ("data", "error", "h1")
    assert "data.tokenizer" in text
    facts["h1"] |= {"tokenizer": None, "unreadable": {"tokenizer": "/t: No such file"}}
    what, text = the(judged(facts, config))
    assert what == ("data", "error", "h1")
    assert "No such file" in text


@pytest.mark.parametrize(
    ("seconds", "uncertainty", "level"),
    [(-4.9, 0, None), (-5.2, 0.1, "warning"), (9, 0, "warning"), (-10.2, 0.1, "error"),
     (20, 0.1, "error"), (-5.2, 0.3, None), (-10.2, 0.3, "warning")],
)  # fmt: skip
def test_clocks(facts, config, seconds, uncertainty, level):
    for of in facts.values():
        of["offset"] = 1000.0  # of all to the machine that asks, which is nothing to a run
    facts["h0"] |= {"offset": 1000 + seconds, "uncertainty": uncertainty}
    found = judged(facts, config)
    assert [(f.check, f.level, f.hosts) for f in found] == (
        [("clocks", level, ("h0",))] if level else []
    )


def test_write_problem(facts, config):
    facts["h1"]["folder"]["problem"] = "No space left on device"
    what, text = the(judged(facts, config))
    assert what == ("folder", "error", "h1")
    assert "No space left" in text


def test_folder_that_is_not_there(facts, config):
    facts["h2"]["folder"]["path"] = "/"
    what, text = the(judged(facts, config))
    assert what == ("folder", "warning", "h2")
    assert "there is / here" in text


@pytest.mark.parametrize(
    ("free", "kept", "level"),
    [(0.9, 0, "error"), (1.1, 0, "warning"), (2.9, 0, "warning"), (3, 0, None),
     (0.9, 3, "error"), (1, 3, None), (1, 2, None), (1.9, 1, "warning")],
)  # fmt: skip
def test_disk(facts, config, free, kept, level):
    """checkpoint.keep = 2: three at once, of which some may be there already."""
    facts["h1"]["folder"] |= {"checkpoints": kept}
    facts["h1"]["folder"]["space"]["free"] = int(free * 10**6)
    found = judged(facts, config)
    assert [(f.check, f.level, f.hosts) for f in found] == (
        [("disk", level, ("h1",))] if level else []
    )
    assert all("checkpoint.keep = 2" in f.found for f in found)


def test_inodes(facts, config):
    facts["h1"]["folder"]["space"]["inodes"] = None  # not counted there
    facts["h2"]["folder"]["space"]["inodes"] = 0
    what, text = the(judged(facts, config))
    assert what == ("disk", "error", "h2")
    assert "inodes" in text


def gpu(**changes):
    return {"name": "H100", "driver": "570.1", "memory_mib": 80_000, "used_mib": 4,
            "ecc_errors": 0} | changes  # fmt: skip


def test_gpus(facts, config):
    for of in facts.values():
        of["gpus"] = [gpu(), gpu(ecc_errors="[N/A]", used_mib="[N/A]")]
    assert judged(facts, config, ranks_per_node=2) == []
    cases = [
        ("nvidia-smi has not answered", "error", "has not answered"),
        ([gpu()], "error", "1 GPUs for 2 ranks a node"),
        ([], "error", "0 GPUs for 2 ranks a node"),
        ([gpu(), gpu(name="A100")], "warning", "name of GPUs: A100, H100; elsewhere H100"),
        ([gpu(driver="1"), gpu(driver="1")], "warning", "driver of GPUs: 1; elsewhere 570.1"),
        ([gpu(), gpu(ecc_errors=2)], "warning", "GPU 1: 2 uncorrectable memory errors"),
        ([gpu(used_mib=8_001), gpu()], "warning", "GPU 0: 8001 of 80000 MiB are taken"),
    ]
    for gpus, level, words in cases:
        facts["h2"]["gpus"] = gpus
        what, text = the(judged(facts, config, ranks_per_node=2))
        assert what == ("gpus", level, "h2")
        assert words in text


def test_shm(facts, config):
    for of in facts.values():
        of["shm"] = {"bytes": 64 * 2**20, "free": 64 * 2**20, "inodes": 1}
    assert judged(facts, config) == []  # processors need none
    facts["h1"]["gpus"] = [gpu(), gpu()]
    facts["h0"]["gpus"] = facts["h2"]["gpus"] = [gpu()]
    found = [f for f in judged(facts, config) if f.check == "shm"]
    what, text = the(found)
    assert what == ("shm", "warning", "h1")
    assert "docker.shared_memory" in text


def test_locks(facts, config):
    """A file that two hosts share is stale where neither holds it; of two files of one name, each
    has its own say."""
    lock = {"path": "/ext/fused_adam/lock", "made": 7, "held": False}
    facts["h1"]["locks"], facts["h2"]["locks"] = [lock], [lock | {"held": True}]
    assert judged(facts, config) == []
    facts["h2"]["locks"] = [lock | {"held": True, "made": 8}]
    what, text = the(judged(facts, config))
    assert what == ("locks", "warning", "h1")
    assert "rm /ext/fused_adam/lock" in text


def test_port(facts, config):
    facts["h0"]["port"] = "Address already in use"
    what, text = the(judged(facts, config))
    assert what == ("port", "error", "h0")
    assert "launch.port" in text


def test_names(facts, config):
    own = facts["h1"]["host"]
    facts["h0"]["names"]["localhost"] = ["127.0.1.1"]  # of the first host itself: no harm
    assert judged(facts, config) == []
    facts["h1"]["names"][own] = ["127.0.1.1"]
    assert judged(facts, config, interface=True) == []
    what, text = the(judged(facts, config))
    assert what == ("names", "error", "h1")
    assert "GLOO_SOCKET_IFNAME" in text
    facts["h1"]["gpus"] = [gpu()]
    assert the([f for f in judged(facts, config) if f.check == "names"])[0][1] == "warning"
    facts["h1"]["names"] = {own: ["10.0.0.2"], "localhost": ["127.0.0.1", "::1"]}
    found = [f for f in judged(facts, config) if f.check == "names"]
    assert the(found)[0] == ("names", "error", "h1")
    facts["h1"]["names"]["localhost"] = []
    found = [f for f in judged(facts, config) if f.check == "names"]
    assert "no such name" in the(found)[1]


# --- batches -------------------------------------------------------------------------------------


def ramped(tmp_path, ranks, micro=1, **batch):
    batch = {"recipe__batch": batch, "engine": {"micro_batch_samples": micro}}
    return list(batch_findings(load(write_config(tmp_path, **batch)), ranks))


def test_ramp_with_idle_ranks(tmp_path):
    """Batch 2 until 20 samples, 4 until 40, then 6 until 160."""
    ramp = {"start": 2, "increment": 2, "final": 6, "ramp": "40 samples"}
    what, text = the(ramped(tmp_path, 6, **ramp))
    assert what == ("batches", "warning")
    assert "batches 2, 4 for 6 ranks: up to 4 idle in steps 1 to 15, 15 steps" in text
    assert "320 tokens, 25.0% of the run's" in text
    assert "at most 2 ranks, and go on with all from step 16" in text
    assert ramped(tmp_path, 2, **ramp) == []


def test_uneven_batches(tmp_path):
    """Batch 6 for 4 ranks: two make a second pass, and two wait a quarter of all the time."""
    what, text = the(ramped(tmp_path, 4, final=6))
    assert what == ("batches", "warning")
    assert "batch 6 cannot be dealt evenly to 4 ranks in micro-batches of 1: 25.0%" in text
    assert "multiples of 4" in text
    assert ramped(tmp_path, 4, micro=2, final=6) == []  # one pass, of one sample or two
    assert len(ramped(tmp_path, 4, micro=2, final=9)) == 1
    assert ramped(tmp_path, 2, final=151) == []  # less than 1 % of the time


def test_batch_of_a_coordinated_replica(tmp_path):
    sync = {"method": "diloco", "coordinator": "h0:29400", "replicas": 2}
    config = load(write_config(tmp_path, sync=sync, **EVEN))
    assert list(batch_findings(config, 3)) == []
    (found,) = batch_findings(config, 4)
    assert found.found.startswith("batch 6 for 8 ranks: 2 idle")


# --- facts ---------------------------------------------------------------------------------------


def test_start(one, config):
    """The short form has no round trip to measure, no port, and hosts that share a name."""
    assert start_findings([one, one], config, 2) == []
    slow = one | {"began": one["began"] - 20, "port": None}
    found = start_findings([one, slow], config, 2)
    assert the(found)[0] == ("clocks", "error", f"{one['host']} #2")
    assert [f.check for f in start_findings([one], config, 7)] == ["batches"]


def test_facts_of_data(tmp_path, one):
    config = load(write_config(tmp_path, **EVEN))
    before = host_facts(config)
    assert before["sources"] == one["sources"]  # of equal corpora elsewhere
    for name, damage in {
        "shard0.bin": lambda content: b"\1" + content[1:],
        "shard1.bin": lambda content: content[:-1] + b"\1",
        "shard1.idx": lambda content: content[:-8],
    }.items():
        path = tmp_path / name
        content = path.read_bytes()
        path.write_bytes(damage(content))
        after = host_facts(config)
        path.write_bytes(content)
        if name.endswith("idx"):
            assert "rule: the header" in after["unreadable"]["b"]
            assert "b" not in after["sources"]
        else:
            differing = {key for key in "ab" if after["sources"][key] != before["sources"][key]}
            assert differing == {"a" if "0" in name else "b"}
    (tmp_path / "shard0.bin").unlink()
    assert "No such file" in host_facts(config)["unreadable"]["a"]


def test_facts_of_manifests_and_tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    config = load(write_config(tmp_path, data__tokenizer=str(folder)))
    missing = host_facts(config)
    assert missing["unreadable"] == {"tokenizer": f"{folder}: No such file or directory"}
    assert missing["tokenizer"] is None
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "shard0.json").write_text('{"files": {"bin": {"sha256": "a"}}, "made": 1}')
    first = host_facts(config)
    (tmp_path / "shard0.json").write_text('{"files": {"bin": {"sha256": "a"}}, "made": 2}')
    (folder / "tokenizer.json").write_text("[]")
    second = host_facts(config)
    assert first["unreadable"] == second["unreadable"] == {}
    assert first["manifests"] == second["manifests"] == {"a": first["manifests"]["a"]}
    assert first["tokenizer"] != second["tokenizer"]


def test_unused_sources_are_not_asked_for(tmp_path):
    config = load(write_config(tmp_path), ["data.sources.1.weight=0"])
    (tmp_path / "shard1.bin").unlink()
    found = host_facts(config)
    assert found["unreadable"] == {}
    assert set(found["sources"]) == {"a"}


def test_facts_of_the_folder(tmp_path):
    config = load(write_config(tmp_path))
    folder = host_facts(config)["folder"]
    assert folder["path"] == str(tmp_path)  # the run's own is not there yet, and is not made
    assert folder["problem"] is None
    assert folder["space"]["free"] > 0
    for step in (2, 4):
        (tmp_path / "runs" / "tiny" / "checkpoints" / f"step-{step:07d}").mkdir(parents=True)
    folder = host_facts(config)["folder"]
    assert folder["path"] == str(tmp_path / "runs" / "tiny")
    assert folder["checkpoints"] == 2
    assert os.listdir(folder["path"]) == ["checkpoints"]  # nothing is left of the trial
    nowhere = load(write_config(tmp_path), ["directory=/proc/1"])
    assert host_facts(nowhere)["folder"]["problem"]


def test_facts_of_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    config = load(write_config(tmp_path))
    old = time.time() - 90
    for name in ("young", "old", "held"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        if name != "young":
            os.utime(tmp_path / name / "lock", (old, old))
    with (tmp_path / "held" / "lock").open():
        locks = host_facts(config)["locks"]
    assert [(lock["path"].split("/")[-2], lock["held"]) for lock in locks] == [
        ("held", True), ("old", False),
    ]  # fmt: skip


def test_facts_of_the_network(tmp_path):
    config = load(write_config(tmp_path))
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        found = host_facts(config, master="no-such-host.invalid", port=port)
    assert found["port"] == "Address already in use"
    assert found["names"]["no-such-host.invalid"] == []
    assert host_facts(config, port=port, master="localhost")["port"] == "free"
    assert host_facts(config)["port"] is None


def test_facts_of_gpus(tmp_path, monkeypatch):
    """Whatever nvidia-smi says, or if it says nothing."""
    config, smi = load(write_config(tmp_path)), tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def says(script):
        smi.write_text(f"#!/bin/sh\n{script}\n")
        smi.chmod(0o755)
        return host_facts(config)["gpus"]

    lines = "echo 'NVIDIA H100, 570.1, 81559, 4, 0'; echo 'NVIDIA H100, 570.1, 81559, 4, [N/A]'"
    first, second = says(lines)
    assert first == gpu(name="NVIDIA H100", memory_mib=81559)
    assert second["ecc_errors"] == "[N/A]"
    assert says("echo 'Failed to initialize NVML'; exit 9") == "Failed to initialize NVML"
    monkeypatch.setattr("pretrain.health.facts._GPU_SECONDS", 0.2)
    assert "has not answered" in says("exec sleep 20")


def test_many_sources_take_a_moment(tmp_path):
    """No more than the ends of files is read, however many and however large they are."""
    prefix = write_corpus(tmp_path)
    sources = [{"name": f"s{i}", "path": str(prefix)} for i in range(300)]
    path = write_config(tmp_path, data__sources=sources)
    program = (
        "import sys; from pretrain.config_file import load\n"
        "from pretrain.health.facts import host_facts; from pretrain.health.findings import *\n"
        "facts = host_facts(load(sys.argv[1]))\n"
        "assert len(facts['sources']) == 300\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'numba', 'matplotlib'} & set(sys.modules)\n"
        "print(heavy or 'light')"
    )
    path = tmp_path / "tiny.toml"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True
    )
    assert done.stdout == "light\n", done.stderr


# --- speed ---------------------------------------------------------------------------------------


def test_speed_is_judged():
    measured = {f"h{i}": {"tflops": [400.0] * 8, "seconds": 0.01} for i in range(4)}
    (fine,) = judge(measured, 1.0)
    assert fine.level == "ok"
    assert "2.52 GB/s" in fine.found  # 16 MiB x 2 x 3 / 4 in 10 ms
    measured["h2"]["tflops"][5] = 270.0
    measured["h3"] = "torch.OutOfMemoryError"
    found = judge(measured, 10.0)
    assert [(f.level, f.hosts) for f in found] == [
        ("error", ("h3",)), ("warning", ("h2",)), ("warning", ()), ("ok", ()),
    ]  # fmt: skip
    assert "270 TFLOPs" in found[1].found
    assert "network.between promises 10" in found[2].found
