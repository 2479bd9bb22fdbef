"""What an sbatch script says of a profile, and what it cannot; and how a start is begun anew."""

import argparse
from pathlib import Path

import pytest

from launch.backends import slurm
from launch.backends.nodes import How
from launch.job import make_job
from launch.options import add_job_arguments, job_of
from launch.site import Site
from pretrain.config_file import load, validate
from pretrain.errors import UserError
from pretrain.train import _prepare_directory
from tests.test_launch import write_profile
from tests.tiny import write_config


def text_of(tmp_path, section, *options, **launch):
    """The script of a job, by the command's own options."""
    parser = argparse.ArgumentParser()
    add_job_arguments(parser)
    keys = {f"launch__{name}": value for name, value in launch.items()}
    profile = write_profile(tmp_path, slurm=section, **keys)
    arguments = [str(write_config(tmp_path)), "--cluster", str(profile), *options]
    return slurm.script_text(job_of(parser.parse_args(arguments), queue=True))


def test_hosts_are_choices_for_the_queue(tmp_path):
    """A host left out is not replaced by a job of one node less."""
    text = text_of(tmp_path, {}, "--exclude", "n7,n8", "--master", "n1-ib")
    assert "#SBATCH --nodes=2\n" in text
    assert "#SBATCH --exclude=n7,n8\n" in text
    assert "export MASTER_ADDR=n1-ib\n" in text
    assert "--nodelist" not in text  # launch.hosts is for ssh
    assert "#SBATCH --nodelist=n3,n4\n" in text_of(tmp_path, {}, "--include", "n3,n4")
    with pytest.raises(UserError, match="a;b"):
        text_of(tmp_path, {}, "--exclude", "a;b")


def test_modules_come_after_what_is_exported(tmp_path, monkeypatch):
    """Or the login node's paths would replace those of the modules."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/login/lib")
    for name in ("TMPDIR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "of-the-login-node")
    text = text_of(tmp_path, {"modules": ["cuda/12"]})
    assert text.index("export LD_LIBRARY_PATH") < text.index("module load cuda/12 || exit 2")
    assert "of-the-login-node" not in text
    assert "set -u" not in text  # scripts that modules and conda run read unset variables


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_container_has_the_folders_of_the_run(tmp_path, runtime):
    section = {"container": "image.sqsh", "container_runtime": runtime, "mounts": ["/a:/b"]}
    text = text_of(tmp_path, section, directory="/")
    assert "/a:/b" in text
    assert f"{tmp_path}:{tmp_path}" not in text  # it lies in what is mounted
    text = text_of(tmp_path, section, directory=str(Path(__file__).parent))
    for path in (Path(__file__).parent, tmp_path):
        assert f"{path}:{path}" in text
    how = "--container-image=image.sqsh" if runtime == "pyxis" else "apptainer exec --nv --bind"
    assert how in text


def test_a_warning_as_long_as_the_job_is_refused():
    site, problems = validate(Site, {"slurm": {"time": "5min"}})
    assert site is None
    assert "must be shorter than time" in str(problems[0])


def test_a_chain_that_begins_anew_each_time_is_refused(tmp_path):
    path = write_config(tmp_path, start="fresh")
    site = Site.model_validate({"slurm": {"chain": "singleton", "jobs": 3}})
    with pytest.raises(UserError, match="start=fresh in a chain of jobs"):
        slurm.script(make_job(load(path), path, (), site), How())


def test_a_fresh_start_is_fresh_once(tmp_path, monkeypatch):
    """Not for each time that its job is put back into the queue, and launch/ stays."""
    config = load(write_config(tmp_path, start="fresh"))
    folder = config.run_directory
    (folder / "launch").mkdir(parents=True)
    (folder / "launch" / "slurm.sh").touch()
    _prepare_directory(config)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]  # nothing to move
    (folder / "metrics.jsonl").touch()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _prepare_directory(config)
    assert (folder / "metrics.jsonl").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    _prepare_directory(config)
    assert not (folder / "metrics.jsonl").exists()
    assert (folder.with_name("tiny.before-1") / "metrics.jsonl").exists()
    assert (folder / "launch" / "slurm.sh").exists()
