"""Runs as jobs of a real Slurm: tasks are ranks, a job's end is no run's end, codes survive."""

import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

from pretrain.observe.metrics import read_metrics
from tests.slurm_hosts import CONTROLLER, SlurmHosts, reason_missing
from tests.tiny import write_config

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))
ANTHESIS = str(Path(sys.executable).parent / "anthesis")
RANKS_PER_NODE = 2


@pytest.fixture(scope="module")
def slurm():
    with SlurmHosts() as hosts:
        yield hosts


def submit(slurm, folder, path, *overrides, **section):
    """The jobs that `anthesis launch slurm` submits."""
    profile = folder / "cluster.toml"
    profile.write_text(
        tomli_w.dumps(
            {
                "nodes": 2,
                "devices_per_node": RANKS_PER_NODE,
                "launch": {"environment": {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}},
                "slurm": {
                    "partition": "debug",
                    "gpus": False,
                    "time": "60 s",
                    "warning": "40 s",
                    **section,
                },
            }
        )
    )
    code, text = slurm.run(
        CONTROLLER,
        [ANTHESIS, "launch", "slurm", str(path), *overrides, "--cluster", str(profile)],
        env={"HF_TOKEN": "hf_secret"},
    )
    assert code == 0, text
    return [line.split()[-1] for line in text.splitlines() if line.startswith("Submitted")]


def rows(folder, name="tiny"):
    found = read_metrics(folder / "runs" / name / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in found if "loss" in row]


def output(folder, job, name="tiny"):
    return (folder / "runs" / name / "launch" / f"{job}.out").read_text()


def test_a_run_goes_on_over_the_limits_of_its_jobs(slurm, tmp_path):
    """USR1 comes some 20 s after the start; the run takes longer than that."""
    path = write_config(
        tmp_path, validation={}, checkpoint={"every": "10000 steps"}, timeout="60 s",
        model={"vocab_size": 61, "hidden_size": 96, "layers": 4, "heads": 3},
        recipe__train="9000 samples", recipe__learning_rate__decay="9000 samples",
    )  # fmt: skip
    (job,) = submit(slurm, tmp_path, path)
    ended = slurm.wait_job(job, {"COMPLETED"}, 900)
    text = output(tmp_path, job)
    assert int(ended["Restarts"]) >= 1, text[-3000:]
    assert "by SIGUSR1; saved: the same command goes on from here" in text
    assert "hf_secret" not in text + (tmp_path / "runs/tiny/launch/slurm.sh").read_text()

    (job,) = submit(slurm, tmp_path, path, "name=whole", time="10 min", warning="60 s")
    ended = slurm.wait_job(job, {"COMPLETED"}, 900)
    assert int(ended["Restarts"]) == 0
    assert rows(tmp_path) == rows(tmp_path, "whole")


def test_a_failure_of_the_worker_fails_the_job(slurm, tmp_path):
    path = write_config(tmp_path)
    Path(tomllib.loads(path.read_text())["data"]["sources"][0]["path"] + ".bin").unlink()
    (job,) = submit(slurm, tmp_path, path)
    ended = slurm.wait_job(job, {"FAILED"}, 60)
    assert ended["ExitCode"] == "2:0", output(tmp_path, job)
    assert "error: " in output(tmp_path, job)


@pytest.mark.parametrize("chain", ["singleton", "array"])
def test_a_chain_of_jobs_runs_one_after_another(slurm, tmp_path, chain):
    path = write_config(tmp_path)
    jobs = submit(slurm, tmp_path, path, chain=chain, jobs=2, time="10 min", warning="60 s")
    assert len(jobs) == (2 if chain == "singleton" else 1)
    first, last = (jobs[0], jobs[1]) if chain == "singleton" else (f"{jobs[0]}_0", f"{jobs[0]}_1")
    slurm.wait_job(first, {"COMPLETED"}, 90)
    slurm.wait_job(last, {"COMPLETED"}, 90)
    assert "done: step 23" in output(tmp_path, first)
    assert "already done: step 23" in output(tmp_path, last)
    assert len(rows(tmp_path)) == 23
