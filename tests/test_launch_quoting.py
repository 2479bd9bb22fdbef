"""Text of any kind arrives as it was wherever a launch puts it into a line, script, file or
container, and nothing of it is executed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.backends.deepspeed import plain_arguments
from launch.cli import main as anthesis
from launch.job import make_job
from launch.script import Command, on_host
from launch.site import Site
from pretrain.config_file import load
from pretrain.train import _decoded
from tests.test_launch import RECORDER, StandIns, programs, refused, shown, write_profile
from tests.tiny import write_config

__all__ = ["programs"]  # the fixture

NASTY = (
    "$(touch pwned)", "`touch pwned`", "; touch pwned #", "' ; touch pwned ; '",
    '" ; touch pwned ; "', "a b  c", "two\nlines\ntouch pwned", "50%h %n %u %% %j", "-x --y=z",
    "größe 测试 🌸", "\\", "\\n\t", "*", "~", "a'b\"c", "$HOME ${HOME}", "!!", "#", "1e3", "0o17",
    "@SRUN@", "{a,b}", "&", "|", "", "no", "<<EOF", "\x7f", "\u2028",
)  # fmt: skip
FOLDER = 'it\'s $(touch pwned) "50%h" `x` größe'
OVERRIDES = [
    "data.sources.0.name=$(touch pwned)",
    "data.sources.1.name=a 'b' \"c\" `touch pwned` \\ %h%n 50%% ä",
    "checkpoint.every=2\tsteps",
]
BACKENDS = [
    ("local", ["--nodes=1", "--ranks-per-node=1"]),
    ("local", ["--nodes=1"]),
    ("torchrun", []),
    ("torchrun", ["--node-rank=1"]),
    ("accelerate", []),
    ("deepspeed", ["--node-rank=1"]),
]
# Runs the runner of DeepSpeed as it is; what it starts on hosts is a program that records.
RUNNER = "import sys; from deepspeed.launcher.runner import main; sys.executable = {!r}; main({!r})"
VALUES = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
    st.text("$`'\"\\ \n%-;&|<>*?~#!{}()[]=äa", max_size=12),
)


def nasty_run(tmp_path, programs, **changes):
    """Config and profile in a folder, with values, in which nearly every character is special."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    config = write_config(folder)
    environment = {f"V{k}": value for k, value in enumerate(NASTY)}
    profile = write_profile(tmp_path, launch__environment=environment,
                            launch__directory=str(folder), launch__python=programs.python,
                            **changes)  # fmt: skip
    return folder, config, profile


def not_executed(tmp_path):
    return not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(("backend", "options"), BACKENDS)
def test_everything_arrives_as_it_was(tmp_path, programs, capsys, backend, options):
    folder, config, profile = nasty_run(tmp_path, programs)
    line = ["launch", backend, config, *OVERRIDES, "--cluster", profile, *options, "--dry-run"]
    text = shown(capsys, *line).split("# --- commands\n")[-1]
    done = programs.shell(text)
    assert done.returncode == 0, done.stderr
    records = programs.taken()
    assert records
    for record in records:
        assert record["argv"][-4:] == [str(config), *OVERRIDES]
        assert record["cwd"] == str(folder)
        for k, value in enumerate(NASTY):
            assert record["env"][f"V{k}"] == value
    assert not_executed(tmp_path)


@settings(max_examples=25, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=5), st.lists(VALUES, min_size=1, max_size=5))
def test_any_text_through_a_line_of_shell(tmp_path_factory, arguments, values):
    """A command's line, given to a shell, alone and inside the line of another (as ssh does)."""
    folder = tmp_path_factory.getbasetemp()
    variables = {f"V{k}": value for k, value in enumerate(values)}
    names = " ".join(f'"$V{k}"' for k in range(len(values)))
    program = f'printf "%s\\0" "$PWD" {names} "$@"'
    line = Command(("sh", "-c", program, "sh", *arguments), variables, folder).text()
    wanted = "".join(f"{text}\0" for text in [folder, *values, *arguments])
    for words in (["bash", "-c", line], ["sh", "-c", Command(("sh", "-c", line)).text()]):
        done = subprocess.run(words, capture_output=True, check=True)
        assert done.stdout.decode() == wanted


@settings(max_examples=25, deadline=None)
@given(st.lists(VALUES, max_size=4))
def test_what_no_shell_has_to_quote(arguments):
    """DeepSpeed's pdsh runner passes words on as they are: the worker's are made plain."""
    words = plain_arguments(["run.toml", *arguments])
    assert all(
        character.isalnum() or character in "_=-+:,./@" for word in words for character in word
    )
    assert _decoded(["--local_rank=1", *words]) == ["--local_rank=1", "run.toml", *arguments]


@pytest.mark.parametrize("code", [0, 75, 9])
@pytest.mark.parametrize("chain", ["requeue", "singleton"])
def test_the_batch_script(tmp_path, programs, capsys, chain, code):
    """The script of a job by bash: srun is told everything; the job goes on where it made way."""
    folder, config, profile = nasty_run(tmp_path, programs, slurm__chain=chain, nodes=2,
                                        slurm__modules=["a b", "$(touch pwned)"],
                                        slurm__cpus_per_task=3)  # fmt: skip
    programs.add("srun", RECORDER + f"sys.exit({code})\n")
    programs.add("sleep", "#!/bin/sh\n")
    script = shown(capsys, "render", "slurm", config, *OVERRIDES, "--cluster", profile)
    done = programs.shell('module() { echo "[$*]"; }; SLURM_JOB_ID=17\n' + script)
    assert done.returncode == (0 if (chain, code) == ("singleton", 75) else code), done.stderr
    assert done.stdout == "[load a b]\n[load $(touch pwned)]\n"
    found = programs.taken()
    (record,) = [one for one in found if one["argv"][0] == "srun"]
    assert record["argv"][:4] == ["srun", "--export=ALL", "--kill-on-bad-exit=1",
                                  "--cpus-per-task=3"]  # fmt: skip
    assert record["argv"][4:] == [programs.python, "-m", "pretrain", str(config), *OVERRIDES]
    assert record["cwd"] == str(folder)
    for k, value in enumerate(NASTY):
        assert record["env"][f"V{k}"] == value
    asked = [one["argv"] for one in found if one is not record]
    assert asked == ([["scontrol", "requeue", "17"]] if (chain, code) == ("requeue", 75) else [])
    assert not_executed(tmp_path)


def test_directives_of_the_batch_script_are_lines(tmp_path, capsys):
    """sbatch reads lines of comment: a folder cannot end one, and its % is not Slurm's."""
    config, profile = write_config(tmp_path), write_profile(tmp_path)
    line = ["render", "slurm", config, "--cluster", profile]
    text = shown(capsys, *line, f'directory="{tmp_path}/50%j"')
    assert f'#SBATCH --output="{tmp_path}/50%%j/tiny/launch/%j.out"\n' in text
    capsys.readouterr()
    override = f'directory="{tmp_path}/a\\ntouch pwned"'
    if anthesis([*map(str, line), override]) == 0:
        head = capsys.readouterr().out.split("set -uo pipefail")[0]
        assert all(line.startswith("#") for line in head.splitlines())


def test_a_batch_script_in_a_container(tmp_path, programs, capsys):
    for runtime in ("pyxis", "apptainer"):
        profile = write_profile(tmp_path, slurm__container="an image.sqsh",
                                slurm__container_runtime=runtime,
                                slurm__mounts=["/a b:/c"], launch__directory=str(tmp_path),
                                launch__python="/opt/py thon")  # fmt: skip
        script = shown(
            capsys, "render", "slurm", write_config(tmp_path), *OVERRIDES, "--cluster", profile
        )
        assert programs.shell("SLURM_JOB_ID=17\n" + script).returncode == 0
        (record,) = programs.taken()
        argv = record["argv"]
        assert argv[-7:-4] == ["/opt/py thon", "-m", "pretrain"]
        assert argv[-3:] == OVERRIDES
        if runtime == "pyxis":
            assert "--container-image=an image.sqsh" in argv
            assert f"--container-mounts={tmp_path}:{tmp_path},/a b:/c" in argv
        else:
            assert argv[argv.index("apptainer") + 1] == "exec"
            assert argv[argv.index("--bind") + 1] == f"{tmp_path}:{tmp_path}"


def test_containers(tmp_path, programs, capsys):
    """`docker run` and the compose file: variables and the run's arguments, each a word."""
    config = write_config(tmp_path)
    environment = {f"V{k}": value for k, value in enumerate(NASTY)}
    profile = write_profile(tmp_path, launch__environment=environment,
                            launch__directory=str(tmp_path))  # fmt: skip
    last = [config, *OVERRIDES, "--cluster", profile]
    assert programs.shell(shown(capsys, "launch", "docker", *last, "--dry-run")).returncode == 0
    runs = [record for record in programs.taken() if "run" in record["argv"]]  # then they remove
    first, _ = sorted(runs, key=lambda record: record["env"]["HOST"])
    argv = first["argv"]
    inside = ["launch", "torchrun", str(config), *OVERRIDES, "--nodes", "2", "--ranks-per-node",
              "2", "--node-rank", "0", "--master", "one:23456"]  # fmt: skip
    assert argv[argv.index("anthesis") + 1 :] == inside
    told = dict(argv[k + 1].split("=", 1) for k, word in enumerate(argv) if word == "--env")
    assert environment.items() <= told.items()
    text = shown(capsys, "render", "docker", *last)
    services = yaml.safe_load(text)["services"]
    for service in services.values():
        assert "$" not in json.dumps(service).replace("$$", "")
        found = {k: v.replace("$$", "$") for k, v in service["environment"].items()}
        assert environment.items() <= found.items()
        words = [word.replace("$$", "$") for word in service["command"]]
        assert words[:6] == inside[:6]
        assert anthesis([*words, "--dry-run"]) == 0  # our own command takes them
    assert not_executed(tmp_path)


def test_a_compose_file_has_text_where_others_would_read_numbers(tmp_path, capsys):
    """Compose reads YAML 1.2, in which more is a number than in that of PyYAML."""
    values = {"A": "1e3", "B": "0o17", "C": "+1", "D": "012", "E": "1.", "F": "yes"}
    profile = write_profile(tmp_path, launch__environment=values)
    text = shown(capsys, "render", "docker", write_config(tmp_path), "--cluster", profile)
    for name, value in values.items():
        assert f'{name}: "{value}"\n' in text.replace("'", '"')


def test_what_a_profile_sets_reaches_workers_in_containers(tmp_path, programs, capsys):
    """In a container our own command starts the ranks, which passes on no more than elsewhere."""
    profile = write_profile(tmp_path, launch__environment={"MINE": "set-by-profile"},
                            launch__join_timeout="77 s")  # fmt: skip
    line = ["docker", write_config(tmp_path), "--cluster", profile, "--node-rank=0"]
    assert anthesis(["launch", *map(str, line)]) == 0
    removed, record = sorted(programs.taken(), key=lambda record: "run" in record["argv"])
    argv = record["argv"]
    assert removed["argv"][-3:] == ["rm", "--force", "tiny-node0"]
    inside = argv[argv.index("anthesis") + 1 :]
    variables = [argv[k + 1] for k, word in enumerate(argv) if word == "--env"]
    inner = {"PATH": os.environ["PATH"], **dict(pair.split("=", 1) for pair in variables)}
    done = subprocess.run([Path(sys.executable).parent / "anthesis", *inside, "--dry-run"],
                          env=inner, cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "MINE=set-by-profile" in done.stdout
    assert "ANTHESIS_JOIN_TIMEOUT=77" in done.stdout


def test_pdsh_carries_what_it_is_given(tmp_path, programs, capsys):
    """DeepSpeed's own runner and the real pdsh, over an ssh that gives the line to a shell."""
    if subprocess.run(["which", "pdsh"], capture_output=True).returncode:
        pytest.skip("pdsh is not installed")
    config = write_config(tmp_path)
    fine = {"A": "a b; touch pwned", "B": "it's größe", "C": "*", "D": "& | > x", "E": "-x #"}
    profile = write_profile(tmp_path, launch__environment=fine, launch__directory=str(tmp_path),
                            launch__python=programs.python)  # fmt: skip
    line = ["launch", "deepspeed", config, *OVERRIDES, "--cluster", profile]
    assert anthesis([*map(str, line)]) == 0
    (record,) = programs.taken()
    argv = record["argv"][record["argv"].index("deepspeed.launcher.runner") + 1 :]
    # The real pdsh calls its ssh with options, a user, the host, and the line.
    programs.add("ssh", '#!/bin/sh\nwhile [ "$1" != one ] && [ "$1" != two ]; do shift; done\n'
                 'H=$1; shift; exec env -i PATH="$PATH" HOST=$H sh -c "$*"\n')  # fmt: skip
    code = RUNNER.format(programs.python, argv)
    told = programs.environment | record["env"]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=told, timeout=120,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = programs.taken()
    assert {record["env"]["HOST"] for record in records} == {"one", "two"}
    for record in records:
        assert record["cwd"] == str(tmp_path)
        assert fine.items() <= record["env"].items()
        worker = record["argv"][record["argv"].index("pretrain") + 1 :]
        assert _decoded(worker) == [str(config), *OVERRIDES]
    assert not_executed(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"launch__directory": "/tmp/a b"},
        {"launch__directory": "/tmp/$(touch pwned)"},
        {"launch__directory": "/tmp/50%h"},
        {"launch__python": "/a b/python"},
        *({"launch__environment": {"A": value}} for value in (
            "$(touch pwned)", "`touch pwned`", 'a"b', "a\\b", "a\nb", "50%h", " a ")),
    ],
    ids=str,
)  # fmt: skip
def test_what_pdsh_cannot_carry_is_refused(tmp_path, capsys, changes):
    """DeepSpeed quotes nothing well, and pdsh puts names in for %h, %n and %u."""
    config = tmp_path / "tiny.toml"
    write_config(tmp_path)
    line = ["launch", "deepspeed", config, "--cluster", write_profile(tmp_path, **changes)]
    said = refused(capsys, *line, "--dry-run")
    assert next(iter(changes)).replace("__", ".") in said


def test_a_meeting_point_that_a_shell_would_run_is_refused(tmp_path, capsys):
    line = ["launch", "deepspeed", write_config(tmp_path), "--cluster", write_profile(tmp_path)]
    refused(capsys, *line, "--master=$(touch pwned)", "--dry-run")


@settings(max_examples=5, deadline=None)
@given(st.lists(VALUES, min_size=2, max_size=4))
def test_any_text_over_ssh(tmp_path_factory, values):
    """A line for a host, by the stand-in of ssh, the real `launch.node` and a recorder."""
    folder = tmp_path_factory.mktemp("ssh")
    programs = StandIns(folder / "programs")
    path = write_config(folder)
    job = make_job(load(path), path, (), Site(), environment={})
    command = Command((programs.python, *values), {"V": values[0]}, folder, "one")
    done = subprocess.run(on_host(job, command), env=programs.environment, timeout=60,
                          stdin=subprocess.PIPE)  # fmt: skip
    assert done.returncode in (0, 143)  # its input has ended
    records = programs.taken()
    if records:
        assert records[0]["argv"] == ["python", *values]
        assert records[0]["env"]["V"] == values[0]
        assert records[0]["cwd"] == str(folder)
