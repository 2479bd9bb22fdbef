"""`anthesis doctor` on this machine. On several hosts: test_doctor_hosts.py."""

import argparse
import json
import socket
import subprocess
import sys

import pytest

from launch import doctor
from launch.host_facts import BEGIN, END, read_facts
from pretrain.errors import UserError
from tests.tiny import write_config

EVEN = {"recipe__batch": {"final": 6}}
PROFILE = """
name = "small"
nodes = 1
devices_per_node = 2
[device]
name = "device"
memory = "{memory}"
peak_tflops = {{ fp32 = 1.0 }}
memory_gbytes_per_s = 10.0
[network.inside]
gbytes_per_s = 1.0
latency_us = 100.0
[network.between]
gbytes_per_s = 1.0
latency_us = 100.0
"""


@pytest.fixture
def ask(tmp_path, capsys, monkeypatch):
    """Run the command; its exit code and output. The port is free."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))  # this machine's may hold old locks
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]

    def ask(*arguments, config=None):
        parser = argparse.ArgumentParser()
        doctor.add_arguments(parser)
        config = config or write_config(tmp_path, **EVEN)
        master = ["--master", f"localhost:{port}"]
        code = doctor.run(parser.parse_args([str(config), *arguments, *master]))
        return code, capsys.readouterr().out

    return ask


def test_a_line_for_what_is_fine(ask):
    code, output = ask()
    assert code == 0
    *lines, last = output.splitlines()
    assert all(line.startswith("ok ") and len(line) <= 100 for line in lines)
    assert last == "tiny with 1 rank(s), this machine: nothing stands in its way"


def test_problems_with_their_cures(ask, tmp_path):
    """Exit code 1; every line fits; the port and the disk are those of this machine."""
    config = write_config(tmp_path, data__sources=[{"name": "c", "path": str(tmp_path / "c")}])
    code, output = ask("model.layers=1000000000", config=config)
    assert code == 1
    assert max(map(len, output.splitlines())) <= 100
    assert "ERROR    data" in output
    assert "ERROR    disk" in output
    assert output.count("cure: ") == 2
    assert output.endswith("2 errors\n")


def test_port(ask, tmp_path):
    with socket.create_server(("", 0)) as taken:
        profile = tmp_path / "profile.toml"
        profile.write_text(f"launch.port = {taken.getsockname()[1]}\n")
        parser = argparse.ArgumentParser()
        doctor.add_arguments(parser)
        arguments = [str(write_config(tmp_path, **EVEN)), "--cluster", str(profile)]
        assert doctor.run(parser.parse_args(arguments)) == 1


def test_memory_by_the_planner(ask, tmp_path):
    profile = tmp_path / "profile.toml"
    profile.write_text(PROFILE.format(memory="1GB"))
    code, output = ask("--cluster", str(profile))
    assert code == 0
    assert "of 1GB on each rank" in output
    profile.write_text(PROFILE.format(memory="300kB"))
    code, output = ask("engine.micro_batch_samples=3", "--cluster", str(profile))
    assert code == 1
    assert "ERROR    memory" in output
    assert "cure: engine." in output


def test_mesh(ask):
    code, output = ask("mesh.shard_ranks=2", "sync.method=powersgd", "--ranks-per-node", "3")
    assert code == 1
    assert "mesh.shard_ranks = 2 does not divide the 3 ranks" in output


def test_json(ask):
    code, output = ask("--json")
    found = json.loads(output)
    assert code == 0
    assert list(found["facts"]) == [socket.gethostname()]
    assert {one["level"] for one in found["findings"]} == {"ok"}


def test_a_host_that_cannot_run_it(ask, tmp_path):
    profile = tmp_path / "profile.toml"
    profile.write_text('launch.python = "/no/such/python"\n')
    code, output = ask("--cluster", str(profile))
    assert code == 1
    assert "ERROR    hosts" in output
    assert "/no/such/python" in output
    assert "launch.python" in output


def test_a_bad_config_is_not_a_finding(ask):
    with pytest.raises(UserError, match=r"model\.layers"):
        ask("model.layers=0")


def test_what_a_shell_prints_around_the_facts():
    banner = f'Welcome!\n\n{BEGIN}{{"host": "h0"}}{END}\nlogout\n'
    assert read_facts(banner) == {"host": "h0"}
    assert read_facts(f'{BEGIN}{{"host": ') is None


def test_no_torch(tmp_path):
    """Neither the command nor what runs on a host imports anything heavy."""
    config = str(write_config(tmp_path, **EVEN))
    heavy = "{'torch', 'deepspeed', 'transformers', 'numba', 'matplotlib'} & set(sys.modules)"
    programs = (
        f"import sys; from launch.host_facts import main; main([{config!r}]); print({heavy})",
        "import argparse, sys; from launch import doctor; p = argparse.ArgumentParser()\n"
        f"doctor.add_arguments(p); doctor.run(p.parse_args([{config!r}])); print({heavy})",
    )
    for program in programs:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout.endswith("\nset()\n"), done.stdout + done.stderr


def test_speed(ask):
    code, output = ask("--speed")
    assert code == 0
    assert "TFLOPs a device" in output
