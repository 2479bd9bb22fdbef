"""`anthesis launch` and `anthesis render`: what is shown is what runs, on the right hosts, without
secrets. Programs that start something stand in for the real ones and record what they were told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import yaml

from launch.cli import main as anthesis
from launch.execute import execute
from launch.job import make_job
from launch.launch_command import BACKENDS, FILES
from launch.script import LOCAL_ONLY, Command, Script
from launch.site import load_site
from pretrain.config_file import load
from pretrain.errors import ConfigError, UserError
from tests.tiny import write_config

CLUSTERS = sorted((Path(__file__).parents[1] / "configs" / "clusters").glob("*.toml"))
SECRETS = {name: f"secret-of-{name.lower()}" for name in (
    "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN", "MY_PASSWORD",
)}  # fmt: skip
RECORDER = f"""#!{sys.executable} -IS
import json, os, sys
told = dict(argv=[os.path.basename(sys.argv[0]), *sys.argv[1:]], cwd=os.getcwd(),
            env=dict(os.environ))
with open(os.path.join(os.path.dirname(__file__), "records", f"{{os.getpid()}}"), "w") as file:
    json.dump(told, file)
"""
# As the real one: what follows the host is a line for a shell that knows nothing of this one.
SSH = """#!/bin/sh
while [ "$1" != "--" ]; do shift; done
[ $# -eq 3 ] && exec env -i HOME="$HOME" PATH="$PATH" HOST="$2" sh -c "$3"
exit 99
"""


class StandIns:
    """Programs in a folder that is first on PATH, and what has been recorded by them."""

    def __init__(self, folder):
        self.folder, self.records = folder, folder / "records"
        self.records.mkdir(parents=True)
        for name in ("sbatch", "docker", "srun", "scontrol", "python"):
            self.add(name, RECORDER)
        self.add("ssh", SSH)
        self.python = str(folder / "python")
        self.environment = {"HOME": os.environ["HOME"], "PATH": f"{folder}:{os.environ['PATH']}"}

    def add(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def shell(self, text):
        """Run lines by bash, which knows nothing but where programs are; its input stays open."""
        ours, theirs = os.pipe()
        try:
            return subprocess.run(["bash", "-c", text], env=self.environment, cwd=self.folder,
                                  stdin=ours, capture_output=True, text=True,
                                  timeout=60)  # fmt: skip
        finally:
            os.close(ours)
            os.close(theirs)

    def taken(self):
        """What has been recorded, in an order of its own; it is forgotten."""
        found = [json.loads(file.read_text()) for file in self.records.iterdir()]
        for file in self.records.iterdir():
            file.unlink()
        for record in found:  # what shells add
            for name in ("_", "PWD", "OLDPWD", "SHLVL", "LC_CTYPE", *LOCAL_ONLY):
                record["env"].pop(name, None)
        return sorted(found, key=lambda record: json.dumps(record, sort_keys=True))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    found = StandIns(tmp_path / "programs")
    monkeypatch.setenv("PATH", found.environment["PATH"])
    return found


def write_profile(folder, name="profile.toml", **changes):
    """A profile of two hosts with two devices each; `changes` are keys with __ for dots."""
    tree = {"devices_per_node": 2, "launch": {"hosts": ["one", "two"], "port": 23456},
            "slurm": {"account": "abc"}}  # fmt: skip
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    (folder / name).write_text(tomli_w.dumps(tree))
    return folder / name


def shown(capsys, *arguments):
    """What a command prints; it must succeed."""
    capsys.readouterr()
    assert anthesis([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """What a command says that is refused: what was found, the rule, the cure; no traceback."""
    capsys.readouterr()
    assert anthesis([str(argument) for argument in arguments]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert "Traceback" not in found.err
    assert "cure:" in found.err
    return found.err


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if "records" not in path.parts)


@pytest.mark.parametrize(
    ("backend", "options", "started"),
    [
        ("local", ["--nodes=1"], 1),
        ("local", ["--nodes=1", "--ranks-per-node=1"], 1),
        ("torchrun", [], 2),
        ("torchrun", ["--elastic=1:2", "--restarts=3"], 2),
        ("torchrun", ["--exclude=one"], 1),
        ("torchrun", ["--node-rank=1"], 1),
        ("deepspeed", [], 1),
        ("deepspeed", ["--node-rank=1"], 1),
        ("accelerate", [], 2),
        ("accelerate", ["--node-rank=0"], 1),
        ("slurm", [], 1),
        ("docker", [], 2),
    ],
)
def test_what_is_shown_is_what_runs(tmp_path, programs, capsys, backend, options, started):
    """The lines of a dry run, given to a shell, start what the launch starts; a dry run nothing."""
    config = write_config(tmp_path)
    profile = write_profile(tmp_path, launch__python=programs.python,
                            launch__environment={"NCCL_SOCKET_IFNAME": "eth 0", "MINE": "a'b"},
                            launch__directory=str(tmp_path))  # fmt: skip
    line = ["launch", backend, config, "seed=6", "--cluster", profile, *options]
    before = files_below(tmp_path)
    text = shown(capsys, *line, "--dry-run")
    assert files_below(tmp_path) == before
    assert not programs.taken()
    commands = text.split("# --- commands\n")[-1]
    done = programs.shell(commands)
    assert done.returncode == 0, done.stderr
    by_hand = programs.taken()
    assert len(by_hand) == started
    assert anthesis([str(word) for word in line]) == 0
    assert programs.taken() == by_hand
    for record in by_hand:
        assert record["cwd"] == str(tmp_path)
        assert backend == "slurm" or record["env"]["MINE"] == "a'b"
    written = [path for path in files_below(tmp_path / "runs") if path.is_file()]
    assert len(written) == {"slurm": 1, "accelerate": 1, "deepspeed": 3 - len(by_hand) - len(
        options)}.get(backend, 0)  # fmt: skip
    for path in written:
        assert f"# --- {path}\n{path.read_text().rstrip()}\n" in text


def test_a_chain_of_singletons_is_submitted_job_by_job(tmp_path, programs, capsys):
    config = write_config(tmp_path)
    profile = write_profile(tmp_path, slurm__chain="singleton", slurm__jobs=3)
    assert anthesis(["launch", "slurm", str(config), "--cluster", str(profile)]) == 0
    script = tmp_path / "runs/tiny/launch/slurm.sh"
    assert [record["argv"] for record in programs.taken()] == [["sbatch", str(script)]] * 3
    assert "#SBATCH --dependency=singleton" in script.read_text()


def test_launchers_understand_what_they_are_told(tmp_path, programs, capsys, monkeypatch):
    """Each launcher's own parser finds nodes, ranks, meeting point and the worker's arguments."""
    from accelerate.commands.launch import launch_command_parser
    from deepspeed.launcher.runner import parse_args
    from torch.distributed.run import get_args_parser

    config = write_config(tmp_path)
    profile = write_profile(tmp_path, launch__python=programs.python)
    worker = [str(config), "name=x"]

    def arguments(backend, *options):
        line = ["launch", backend, *worker, "--cluster", profile, *options, "--dry-run"]
        programs.shell(shown(capsys, *line).split("# --- commands\n")[-1])
        found = [record["argv"] for record in programs.taken()]
        return [argv[argv.index("-m", 3 if "launch.node" in argv else 0) + 2 :] for argv in found]

    for rank, words in enumerate(arguments("torchrun")):
        told = get_args_parser().parse_args(words)
        assert (told.nnodes, told.node_rank, told.nproc_per_node) == ("2", rank, "2")
        assert (told.master_addr, told.master_port) == ("one", 23456)
        assert (told.module, told.training_script) == (True, "pretrain")
        assert told.training_script_args == worker
    told = get_args_parser().parse_args(arguments("torchrun", "--elastic=1:2")[0])
    assert (told.nnodes, told.rdzv_endpoint, told.rdzv_id) == ("1:2", "one:23456", "x")
    for rank, words in enumerate(arguments("accelerate")):
        told = launch_command_parser().parse_args(words)
        assert (told.num_machines, told.machine_rank, told.num_processes) == (2, rank, 4)
        assert (told.main_process_ip, told.main_process_port) == ("one", 23456)
        assert (told.module, told.training_script) == (True, "pretrain")
        assert told.training_script_args == worker
    for options, pdsh in (((), True), (("--node-rank=1",), False)):
        told = parse_args(arguments("deepspeed", *options)[0])
        assert (told.master_addr, told.master_port) == ("one", 23456)
        assert (told.no_ssh, told.launcher) == (not pdsh, "pdsh")
        assert pdsh or told.node_rank == 1
        assert (told.module, told.user_script, told.user_args) == (True, "pretrain", worker)


def test_neither_torch_nor_files_are_needed(tmp_path):
    """Launching and rendering work on a login node that has no torch, and leave nothing there."""
    config, profile = write_config(tmp_path), write_profile(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    code = (
        "import sys\nfrom launch.cli import main\n"
        f"last = [{str(config)!r}, '--cluster', {str(profile)!r}]\n"
        f"lines = [['launch', b, *last, '--dry-run'] for b in {[*BACKENDS]}]\n"
        f"lines += [['render', f, *last] for f in {FILES}]\n"
        "codes = [main([*l, '--nodes=1'] if l[1] == 'local' else l) for l in lines]\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'accelerate', 'numpy'} & {*sys.modules}\n"
        "assert not heavy and not any(codes), (heavy, codes)\n"
    )
    before = files_below(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_below(tmp_path) == before


def test_render(tmp_path, capsys):
    """Files that a user may want to look at, or start with by other means."""
    config, profile = write_config(tmp_path), write_profile(tmp_path)
    last = [config, "engine.zero_stage=2", "--cluster", profile]
    settings = json.loads(shown(capsys, "render", "deepspeed", *last))
    assert settings["zero_optimization"]["stage"] == 2
    assert shown(capsys, "render", "hostfile", *last) == "one slots=2\ntwo slots=2\n"
    assert "num_processes: 4" in shown(capsys, "render", "accelerate", *last)
    slurm = shown(capsys, "render", "slurm", *last)
    for line in ("account=abc", "nodes=2", "ntasks-per-node=2", "export=NONE"):
        assert f"#SBATCH --{line}\n" in slurm
    assert subprocess.run(["bash", "-n"], input=slurm, text=True).returncode == 0
    services = yaml.safe_load(shown(capsys, "render", "docker", *last))["services"]
    assert [service["hostname"] for service in services.values()] == ["node0", "node1"]


# --- secrets -------------------------------------------------------------------------------------


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NCCL_DEBUG", "of-nccl")
    monkeypatch.setenv("BY_NAME", "of-name")
    monkeypatch.setenv("STARTS_SO", "of-prefix")


@pytest.mark.parametrize("word", [*BACKENDS, *FILES])
def test_no_secret_is_shown(tmp_path, capsys, secrets, word):
    """What the profile names is passed on, and nothing that has a token in it."""
    profile = write_profile(tmp_path, launch__forward=["BY_NAME", "STARTS_*"],
                            launch__environment={"NCCL_DEBUG": "set-by-profile"})  # fmt: skip
    last = [write_config(tmp_path), "--cluster", profile, "--nodes=1" if word == "local" else "-h"]
    lines = []
    if word in BACKENDS:
        lines.append(["launch", word, *last[:3], *last[3:][: word == "local"], "--dry-run"])
    if word in FILES:
        lines.append(["render", word, *last[:3]])
    for line in lines:
        text = shown(capsys, *line)
        assert not [value for value in SECRETS.values() if value in text]
        if line[0] == "launch" or word in ("slurm", "docker"):
            for value in ("of-name", "of-prefix", "set-by-profile"):
                assert value in text
        assert "of-nccl" not in text  # launch.environment wins


@pytest.mark.parametrize("host", [None, "one"])
def test_no_secret_reaches_a_process(tmp_path, programs, secrets, host):
    profile = write_profile(tmp_path, launch__forward=["BY_NAME", "STARTS_*"],
                            launch__environment={"NCCL_DEBUG": "set-by-profile"})  # fmt: skip
    path = write_config(tmp_path)
    job = make_job(load(path), path, (), load_site(profile))
    dumps = f"import json, os; json.dump(dict(os.environ), open({str(tmp_path / 'env')!r}, 'w'))"
    line = (sys.executable, "-c", dumps)
    command = Command(line, job.worker_environment, tmp_path, host)
    assert execute(Script((command,)), job) == 0
    found = json.loads((tmp_path / "env").read_text())
    assert not [name for name, value in found.items() if value in SECRETS.values()]
    assert found["BY_NAME"] == "of-name"
    assert found["STARTS_SO"] == "of-prefix"
    assert found["NCCL_DEBUG"] == "set-by-profile"
    assert found["ANTHESIS_HOSTS"] == "one,two"
    assert found["ANTHESIS_RANKS"] == "4"


# --- the job -------------------------------------------------------------------------------------


def job_text(capsys, tmp_path, *options, **profile):
    config, path = write_config(tmp_path), write_profile(tmp_path, **profile)
    line = ["launch", "torchrun", config, "--cluster", path, *options, "--dry-run"]
    return shown(capsys, *line).splitlines()


def test_which_hosts_and_who_is_first(tmp_path, capsys):
    four = {"launch__hosts": ["a", "b", "c", "d"]}
    lines = job_text(capsys, tmp_path, **four)
    assert [line.split(" -- ")[1].split()[0] for line in lines] == ["a", "b", "c", "d"]
    assert all("--nnodes 4" in line and "--master-addr a" in line for line in lines)
    assert all("ANTHESIS_RANKS=8" in line for line in lines)
    lines = job_text(capsys, tmp_path, "--exclude=a", **four)
    assert len(lines) == 3
    assert all("--master-addr b" in line and "ANTHESIS_HOSTS=b,c,d" in line for line in lines)
    lines = job_text(capsys, tmp_path, "--include=d,b", "--ranks-per-node=3", **four)
    assert all("ANTHESIS_HOSTS=b,d" in line and "ANTHESIS_RANKS=6" in line for line in lines)
    lines = job_text(capsys, tmp_path, "--master=x.y:2345", "--hosts=e,f", **four)
    assert all("--master-addr x.y --master-port 2345" in line for line in lines)
    assert all("ANTHESIS_HOSTS=e,f" in line for line in lines)
    assert len(job_text(capsys, tmp_path, "--nodes=2", **four)) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes=3"], ["one, two", "3 nodes"]),
        (["--hosts=a,b,a"], ["a more than once"]),
        (["--include=three"], ["three", "one, two"]),
        (["--exclude=one,two"], ["leave no host"]),
        (["--hosts=a;b"], ["launch.hosts.0", "a;b"]),
        (["--master=one:70000"], ["launch.port", "70000"]),
        (["--master=one:x"], ["launch.port", "'x'"]),
        (["--master=$(touch pwned)"], ["$(touch pwned)"]),
        (["--node-rank=2"], ["--node-rank 2", "0 to 1"]),
        (["--node-rank=-1"], ["--node-rank -1"]),
        (["--no-ssh"], ["one, two", "--node-rank"]),
        (["--elastic=3:2"], ["--elastic 3:2"]),
        (["name="], ["name"]),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, capsys, options, words):
    config, profile = write_config(tmp_path), write_profile(tmp_path)
    line = ["launch", "torchrun", config, "--cluster", profile, *options, "--dry-run"]
    said = refused(capsys, *line)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("host", ["a b", "-oProxyCommand=x", "a;b", "a$b", "a'b", "", "ä", "a\n"])
def test_hosts_with_anything_special_are_refused(tmp_path, host):
    with pytest.raises(ConfigError) as caught:
        load_site(write_profile(tmp_path, launch__hosts=["fine", host]))
    assert [problem.key for problem in caught.value.problems] == ["launch.hosts.1"]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_profiles_with_figures_can_be_launched_with(tmp_path, capsys, path):
    text = shown(capsys, "render", "slurm", write_config(tmp_path), "--cluster", path)
    site = load_site(path)
    assert f"#SBATCH --nodes={site.nodes}\n" in text
    assert f"#SBATCH --ntasks-per-node={site.devices_per_node}\n" in text


def test_all_problems_of_a_profile_at_once(tmp_path):
    changes = {"nodes": 0, "launch__port": 80, "launch__forward": ["*"], "slurm__chian": "array",
               "docker__shared_memory": "0", "launch__environment": {"A B": "c"}}  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        load_site(write_profile(tmp_path, **changes))
    found = " ".join(problem.key for problem in caught.value.problems)
    for key in ("nodes", "launch.port", "launch.forward.0", "slurm.chian", "docker.shared_memory",
                "launch.environment"):  # fmt: skip
        assert key in found
    assert all(problem.cure for problem in caught.value.problems)


def test_local_is_one_machine(tmp_path, capsys):
    config, profile = write_config(tmp_path), write_profile(tmp_path)
    assert "2 nodes" in refused(capsys, "launch", "local", config, "--cluster", profile)


def test_a_file_that_cannot_be_written_is_said(tmp_path, programs):
    (tmp_path / "file").write_text("")
    path = write_config(tmp_path)
    job = make_job(load(path), path, (), load_site(write_profile(tmp_path)))
    with pytest.raises(UserError, match="cannot be written"):
        execute(Script((), {tmp_path / "file" / "x": ""}), job)
