"""Which rank a process is, as launchers tell it, and how ranks meet or say who is missing."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from pretrain.engine.meeting import meet
from pretrain.engine.placement import Placement, expand_counts, expand_hosts, placement
from pretrain.errors import UserError
from tests.tiny import write_config

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "one", "MASTER_PORT": "2345"}  # fmt: skip
SLURM = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "11", "SLURM_LOCALID": "1",
         "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
         "SLURM_STEP_NODELIST": "a1,b[07-08]-ib", "SLURM_JOB_ID": "4711"}  # fmt: skip


def test_nobody_says_anything():
    assert placement({}) == Placement(0, 1, 0, 1)


def test_torchrun():
    told = TORCHRUN | {"ANTHESIS_HOSTS": "one,two", "ANTHESIS_JOIN_TIMEOUT": "7"}
    assert placement(told) == Placement(
        5, 8, 1, 4, ("one", 2345), ("one", "two"), (4, 4), join_seconds=7
    )
    assert placement(TORCHRUN) == Placement(5, 8, 1, 4, ("one", 2345))


def test_deepspeed_has_a_name_of_its_own_for_the_ranks_of_a_host():
    told = {k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "2"}
    assert placement(told).local_size == 2


def test_srun():
    """The ranks meet at the first node, and the nodes may have different numbers of them."""
    found = placement(SLURM)
    assert (found.rank, found.size, found.local_rank, found.local_size) == (9, 11, 1, 3)
    assert found.hosts == ("a1", "b07-ib", "b08-ib")
    assert found.host_ranks == (4, 4, 3)
    assert found.master[0] == "a1"
    assert [found.host_of(rank) for rank in (0, 3, 4, 7, 8, 10)] == [
        "a1", "a1", "b07-ib", "b07-ib", "b08-ib", "b08-ib"]  # fmt: skip


def test_two_jobs_of_a_node_do_not_meet():
    ports = {placement(SLURM | {"SLURM_JOB_ID": str(job)}).master[1] for job in range(4711, 4811)}
    assert len(ports) == 100
    assert all(1024 <= port < 32768 for port in ports)  # below those that the kernel hands out
    assert placement(SLURM | {"MASTER_PORT": "5000"}).master == ("a1", 5000)


def test_torchrun_under_srun_counts():
    assert placement(SLURM | TORCHRUN).rank == 5


def test_srun_as_one_task_is_one_rank():
    """A worker in a batch script without srun has Slurm's job, but no place in a step."""
    job = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert placement(job) == Placement()


def test_mpirun_inside_a_job():
    """Ranks that it starts inherit the variables of the step that started it on their node."""
    told = SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_RANK": "9",
                    "OMPI_COMM_WORLD_SIZE": "16", "MASTER_ADDR": "m"}  # fmt: skip
    assert (placement(told).rank, placement(told).size) == (9, 16)


def test_a_step_of_several_parts_wants_a_meeting_place():
    """Its numbers are of all parts, its nodes of one."""
    told = SLURM | {"SLURM_NODEID": "5", "SLURM_STEP_NUM_TASKS": "40"}
    with pytest.raises(UserError, match="40 ranks, but MASTER_ADDR"):
        placement(told)
    assert placement(told | {"MASTER_ADDR": "m"}).hosts == ()


def test_two_steps_of_a_job_do_not_meet():
    ports = {placement(SLURM | {"SLURM_STEP_ID": str(step)}).master[1] for step in range(3)}
    assert len(ports) == 3


def test_open_mpi():
    told = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "MASTER_ADDR": "m", "MASTER_PORT": "1234"}  # fmt: skip
    found = placement(told)
    assert (found.rank, found.size, found.local_rank, found.local_size) == (3, 4, 1, 2)
    assert found.master == ("m", 1234)
    del told["MASTER_PORT"]
    with pytest.raises(UserError, match=r"4 ranks, but MASTER_ADDR=m, MASTER_PORT=\(not set\)"):
        placement(told)


@pytest.mark.parametrize("name", ["MASTER_ADDR", "WORLD_SIZE", "PMI_SIZE"])
def test_several_without_a_rank_are_refused(name):
    """Else each process would train the whole run by itself, all in one folder."""
    with pytest.raises(UserError, match=rf"{name}=4, but no RANK[\s\S]*rule:[\s\S]*cure:"):
        placement({name: "4"})


@pytest.mark.parametrize("told", [{}, TORCHRUN, SLURM], ids=["alone", "torchrun", "srun"])
def test_the_number_of_ranks_is_that_of_the_launch(told):
    size = placement(told).size
    assert placement(told | {"ANTHESIS_RANKS": str(size)}).size == size
    with pytest.raises(UserError, match=rf"has {size} rank[\s\S]*asked for 16[\s\S]*cure:"):
        placement(told | {"ANTHESIS_RANKS": "16"})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", ()),
        ("a", ("a",)),
        ("a1,b[01-03,7]-ib", ("a1", "b01-ib", "b02-ib", "b03-ib", "b7-ib")),
        ("n[8-11]", ("n8", "n9", "n10", "n11")),
        ("r[1-2]n[3-4],x-y", ("r1n3", "r1n4", "r2n3", "r2n4", "x-y")),
    ],
)
def test_lists_of_hosts(text, hosts):
    assert expand_hosts(text) == hosts


def test_counts():
    assert expand_counts("4(x2),3") == (4, 4, 3)
    assert expand_counts("12") == (12,)
    assert expand_counts("") == ()


def test_host_of_a_rank_that_nobody_has_named():
    assert placement(TORCHRUN).host_of(7) == ""


# --- meeting -------------------------------------------------------------------------------------


def start_rank(path, rank, size, port, *overrides, **told):
    """The worker as one of several ranks, as a launcher starts it."""
    environment = os.environ | {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", **told,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", str(path), *overrides], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(process):
    """The exit code of a worker and what it has said."""
    try:
        output = process.communicate(timeout=90)[0]
    finally:
        process.kill()
    return process.returncode, output


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_who_does_not_come_is_named(tmp_path):
    path, port = write_config(tmp_path), free_port()
    told = {"ANTHESIS_JOIN_TIMEOUT": "5", "ANTHESIS_HOSTS": "here,there,elsewhere"}
    ranks = [start_rank(path, rank, 3, port, **told) for rank in (0, 1)]
    (code, said), (other, said_too) = map(ended, ranks)
    assert code == other == 2, said
    assert "not there after 5 s: rank 2 of elsewhere\n" in said_too
    assert "not there after 5 s: rank 2 of elsewhere\n" in said
    assert "rule:" in said
    assert "cure:" in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_a_port_in_use_is_said_with_its_cure(tmp_path):
    path = write_config(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = ended(start_rank(path, 0, 2, port, ANTHESIS_JOIN_TIMEOUT="5"))
    assert code == 2, said
    assert f"127.0.0.1:{port}" in said
    assert "another launch.port" in said
    assert "Traceback" not in said


def test_two_ranks_on_one_gpu_are_refused_on_both():
    port, errors = free_port(), []

    def come(rank):
        place = Placement(rank, 2, rank, 2, ("127.0.0.1", port), join_seconds=20)
        try:
            meet(place, gpu="GPU-4711")
        except UserError as error:
            errors.append(str(error))

    ranks = [threading.Thread(target=come, args=(rank,)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert len(errors) == 2
    assert all("has the GPU GPU-4711 too" in text and "cure:" in text for text in errors)


def test_a_host_without_its_gpu_is_named():
    """Its driver is broken: it would talk by gloo, the others by NCCL, and all wait."""
    port, errors = free_port(), []

    def come(rank):
        place = Placement(rank, 2, 0, 1, ("127.0.0.1", port), join_seconds=20)
        try:
            meet(place, gpu="GPU-1" if rank == 0 else None)
        except UserError as error:
            errors.append(str(error))

    ranks = [threading.Thread(target=come, args=(rank,)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
        time.sleep(0.5)
    for rank in ranks:
        rank.join(30)
    assert len(errors) == 2
    assert all("has no GPU, others have a GPU" in text for text in errors)


def test_a_rank_that_waits_for_others_hears_signals(tmp_path):
    process = start_rank(write_config(tmp_path), 0, 2, port := free_port())
    deadline = time.monotonic() + 60
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    code, said = ended(process)
    assert code == 75
    assert "ended by SIGTERM while waiting for the other ranks" in said
