"""The cluster that launchers are tested on: ssh, pdsh and Slurm behave on it as they do on one."""

import re
import sys
import time
from pathlib import Path

import pytest

from tests import slurm_hosts, ssh_hosts
from tests.slurm_hosts import SlurmHosts
from tests.ssh_hosts import SshHosts

no_ssh, no_slurm = ssh_hosts.reason_missing(), slurm_hosts.reason_missing()
needs_ssh = pytest.mark.skipif(no_ssh is not None, reason=str(no_ssh))
needs_slurm = pytest.mark.skipif(no_slurm is not None, reason=str(no_slurm))

VENV = str(Path(sys.executable).parent)


@pytest.fixture(scope="module")
def hosts():
    with SshHosts(2) as two:
        yield two


@pytest.fixture(scope="module")
def slurm():
    with SlurmHosts() as three:
        yield three


def test_what_is_missing_is_named_with_its_package():
    said = ssh_hosts.missing_programs({"sh": "dash", "no-such-program": "a-package"})
    assert said.startswith("no no-such-program (packages a-package;")
    assert ssh_hosts.missing_programs({"sh": "dash"}) is None


# --- ssh ------------------------------------------------------------------------------------------


@needs_ssh
def test_hosts_log_in_at_each_other_and_this_machine_knows_nothing_of_it(hosts):
    for here in range(2):
        for there in range(2):
            ssh = ["ssh", f"h{there}", "hostname; exit 7"]
            assert hosts.run(here, ssh, timeout=20) == (7, f"h{there}\n")
    assert "/run/ssh/key" in hosts.run(1, ["cat", "/etc/ssh/ssh_config"])[1]
    assert "/run/ssh/key" not in Path("/etc/ssh/ssh_config").read_text()
    assert not Path("/run/ssh").exists()


@needs_ssh
def test_a_session_gets_no_variable_and_no_virtual_environment(hosts):
    env = {"SECRET_TOKEN": "told", "LC_ALL": "C", "PYTHONPATH": "/somewhere"}
    assert "SECRET_TOKEN=told" in hosts.run(0, ["env"], env)[1]
    send = "SendEnv=SECRET_TOKEN LC_* PYTHON*"
    code, text = hosts.run(0, ["ssh", "-o", send, "h1", "env"], env, timeout=20)
    assert code == 0, text
    session = dict(line.split("=", 1) for line in text.splitlines())
    assert session.keys() <= {
        "_", "HOME", "LOGNAME", "MAIL", "PATH", "PWD", "SHELL", "SHLVL", "SSH_CLIENT",
        "SSH_CONNECTION", "USER",
    }  # fmt: skip
    assert VENV not in session["PATH"].split(":")


@needs_ssh
def test_pdsh_reaches_all_and_tells_of_failure(hosts):
    pdsh = ["pdsh", "-S", "-R", "ssh", "-w", "h[0-1]"]
    code, text = hosts.run(0, [*pdsh, "hostname"], timeout=20)
    assert (code, sorted(text.splitlines())) == (0, ["h0: h0", "h1: h1"])
    code, text = hosts.run(0, [*pdsh, "[ $(hostname) = h0 ] || exit 5"], timeout=20)
    assert code == 5
    assert "h1: ssh exited with exit code 5" in text


@needs_ssh
def test_a_host_without_power_is_away_until_it_is_booted(hosts):
    hosts.kill(1)
    assert hosts.run(0, ["ssh", "h1", "true"], timeout=20)[0] == 255
    hosts.boot(1)
    assert hosts.run(0, ["ssh", "h1", "hostname"], timeout=20) == (0, "h1\n")


@needs_ssh
def test_one_host_has_a_wrong_clock_and_waits_as_long_as_the_others(hosts):
    script = (
        "import threading, time; start = time.monotonic(); time.sleep(0.2);"
        "threading.Event().wait(0.2); print(time.time(), time.monotonic() - start)"
    )
    python = f"{sys.executable} -c '{script}'"
    hosts.shift_clock(1, -20)
    for _ in range(2):
        code, text = hosts.run(0, ["ssh", "h1", f"date +%s; {python}"], timeout=20)
        assert code == 0, text
        date, clock, waited = map(float, text.split())
        for seen in (date, clock):
            assert 15 < time.time() - seen < 25
        assert 0.4 <= waited < 3
        for right in (["date", "+%s"], ["ssh", "h0", "date +%s"]):
            assert abs(time.time() - float(hosts.run(0, right)[1])) < 5
        hosts.kill(1)
        hosts.boot(1)
    hosts.shift_clock(1, 0)
    assert abs(time.time() - float(hosts.run(0, ["ssh", "h1", "date +%s"])[1])) < 5


@needs_ssh
def test_a_disk_and_a_mount_are_of_one_host_only(hosts, tmp_path):
    disk, file, other = tmp_path / "disk", tmp_path / "file", tmp_path / "other"
    file.write_text("everybody's\n")
    other.write_text("of h1\n")
    hosts.small_disk(1, disk, "1m")
    hosts.mount(1, other, file)
    fill = f"head -c 2000000 /dev/zero > {disk}/full; cat {file}"
    text = hosts.run(1, ["sh", "-c", fill])[1]
    assert "No space left on device" in text
    assert text.endswith("of h1\n")
    assert hosts.run(0, ["sh", "-c", fill]) == (0, "everybody's\n")
    assert (disk / "full").stat().st_size == 2_000_000


@needs_ssh
def test_a_command_over_time_is_ended_and_its_processes_are_seen(hosts, tmp_path):
    with pytest.raises(TimeoutError, match="begun"):
        hosts.run(1, ["sh", "-c", "echo begun; sleep 61; true"], timeout=0.5)
    assert not hosts.processes(1, "sleep 6[0-9]")
    background = "cd $0; sleep 62 > /dev/null & pwd"
    assert hosts.run(1, ["sh", "-c", background, str(tmp_path)]) == (0, f"{tmp_path}\n")
    assert hosts.run(1, ["pwd"], cwd=tmp_path) == (0, f"{tmp_path}\n")
    assert hosts.processes(1, "sleep 6[0-9]") == ["sleep 62"]
    assert not hosts.processes(0, "sleep 6[0-9]")


# --- Slurm ----------------------------------------------------------------------------------------


def submit(slurm, folder: Path, script: str, *options: str) -> str:
    """The number of a batch job that writes to `out` in `folder`."""
    (folder / "job.sh").write_text(f"#!/bin/bash\n{script}\n")
    sbatch = ["sbatch", "--parsable", f"--output={folder}/out", *options, f"{folder}/job.sh"]
    code, text = slurm.run(2, sbatch, timeout=20)
    assert code == 0, text
    return text.strip()


@needs_slurm
def test_slurm_runs_a_step_on_both_nodes(slurm):
    code, text = slurm.run(2, ["srun", "-N2", "hostname"], timeout=20)
    assert (code, sorted(text.split())) == (0, ["h0", "h1"]), slurm.logs()


@needs_slurm
def test_a_batch_job_tells_its_exit_code(slurm, tmp_path):
    job = slurm.wait_job(submit(slurm, tmp_path, "exit 7"), "FAILED", 20)
    assert job["ExitCode"] == "7:0"
    assert job["StdOut"] == str(tmp_path / "out")
    with pytest.raises(AssertionError, match=r"^not \{'COMPLETED'\} but"):
        slurm.wait_job(job["JobId"], "COMPLETED", 20)


@needs_slurm
def test_a_job_requeues_itself_and_soon_runs_again(slurm, tmp_path):
    script = (
        "echo restarts ${SLURM_RESTART_COUNT:-0} >> $0.log\n"
        "[ ${SLURM_RESTART_COUNT:-0} -gt 0 ] && exit 0\n"
        "scontrol requeue $SLURM_JOB_ID\n"
        "sleep 60"
    )
    script = script.replace("$0", str(tmp_path / "job"))
    job = slurm.wait_job(submit(slurm, tmp_path, script), "COMPLETED", 25)
    assert job["Restarts"] == "1"
    assert (tmp_path / "job.log").read_text() == "restarts 0\nrestarts 1\n"


@needs_slurm
def test_the_signal_before_the_limit_reaches_the_step_only(slurm, tmp_path):
    wait = "for _ in $(seq 300); do sleep 0.1; done"
    script = (
        "trap 'echo batch told' USR1\n"
        f"srun -N2 bash -c 'trap \"echo step told; exit 3\" USR1; {wait}'\n"
        "echo step ended with $?"
    )
    number = submit(slurm, tmp_path, script, "-N2", "--time=1", "--signal=USR1@50")
    slurm.wait_job(number, "COMPLETED", 60)
    text = (tmp_path / "out").read_text()
    assert len(re.findall("^step told$", text, re.MULTILINE)) == 2, text
    assert "step ended with 3" in text
    assert "batch told" not in text
