"""Replicas that are launches of their own: they meet at a coordinator, die, are cut off and come
back. Real processes, real sockets and real signals."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pretrain.config_sync import LocalSgd
from pretrain.engine.world import World, join_world
from pretrain.errors import UserError
from pretrain.quantities import Duration
from pretrain.sync.coordinator import serve
from pretrain.sync.members import LeftBehind, Members
from tests.ranks import _CONTEXT, run_ranks, start_single

ROOT = Path(__file__).parents[1]
LOST_AFTER = 2.0
PATIENCE = 30.0


def section_for(address, replicas=2, lost_after=LOST_AFTER):
    return LocalSgd(coordinator=address, replicas=replicas, lost_after=Duration(lost_after, "s"))


def take_round(members, step, value, newcomer=False):
    """Meet, average `value` over those who have one, hand it to those who have none."""
    meeting = members.meet(step, newcomer)
    replicas, mean = meeting.replicas, torch.tensor([value], dtype=torch.float64)
    try:
        if meeting.newcomer:
            mean.zero_()
        replicas.sum(mean).div_(meeting.contributors)
        note = replicas.share(torch.tensor([float(step)]))
        fine = True
    except members.failures:
        fine = False
    commit = members.vote(meeting, fine)
    return {
        "commit": commit,
        "mean": mean.item() if commit else None,
        "step": int(note.item()) if commit else None,
        "size": replicas.size,
        "contributors": meeting.contributors,
        "newcomer": meeting.newcomer,
        "changed": meeting.changed,
    }


def replica_main(pipe, address, options):
    """Does what the test says, one command after the other."""
    with join_world(60) as world:
        try:
            members = Members(section_for(address, **options), world, {"model": {"layers": 2}}, 15)
            pipe.send("in")
            while True:
                what, *arguments = pipe.recv()
                try:
                    if what == "round":
                        pipe.send(take_round(members, *arguments))
                    elif what == "until commit":
                        while not (report := take_round(members, *arguments))["commit"]:
                            pass
                        pipe.send(report)
                    elif what == "meet":
                        pipe.send(members.meet(*arguments).replicas.size)
                    elif what == "fail":
                        while True:
                            members.vote(members.meet(*arguments), False)
                    else:
                        members.leave()
                        pipe.send("left")
                        return
                except LeftBehind:
                    pipe.send("behind")
        except UserError as error:
            pipe.send(str(error))


class Replica:
    """A process that is told what to do and says what came of it."""

    def __init__(self, address, **options):
        self.pipe, end = _CONTEXT.Pipe()
        self.process = start_single(replica_main, end, address, options)
        end.close()

    def tell(self, *command):
        self.pipe.send(command)
        return self

    def answer(self, seconds=PATIENCE):
        assert self.pipe.poll(seconds), "no answer in time"
        return self.pipe.recv()

    def signal(self, number):
        os.kill(self.process.pid, number)


class Coordinator:
    """The server, in a process of its own."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address, self.log = f"127.0.0.1:{self.port}", folder / "coordinator.log"
        self.start()

    def start(self):
        code = f"from pretrain.sync.coordinator import serve; serve('127.0.0.1', {self.port})"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", code], cwd=ROOT, stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError(self.log.read_text())

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def coordinator(tmp_path):
    server = Coordinator(tmp_path)
    yield server
    server.kill()


@contextmanager
def replicas(coordinator, count, **options):
    """`count` replicas that have said hello, in the order in which they did."""
    started = []
    try:
        for _ in range(count):
            started.append(Replica(coordinator.address, **{"replicas": count, **options}))
            assert started[-1].answer() == "in"
        yield started
    finally:
        for replica in started:
            replica.process.kill()
            replica.process.join()


def all_do(group, *command):
    """What came of a command for all; replica i has the value i + 1."""
    for i, replica in enumerate(group):
        replica.tell(*command, float(i + 1))
    return [replica.answer() for replica in group]


def test_replicas_meet_and_average(coordinator):
    with replicas(coordinator, 3) as group:
        # The first replica is at step 5, the others at 0: its state is the run's.
        group[1].tell("round", 0, 2.0)
        group[2].tell("round", 0, 3.0)
        first = group[0].tell("round", 5, 1.0).answer()
        assert first == {"commit": True, "mean": 1.0, "step": 5, "size": 3, "contributors": 1,
                         "newcomer": False, "changed": True}  # fmt: skip
        for other in group[1:]:
            assert other.answer() == first | {"newcomer": True}
        reports = all_do(group, "round", 10)
        assert (
            reports == [first | {"mean": 2.0, "step": 10, "contributors": 3, "changed": False}] * 3
        )
        began = time.monotonic()
        for step in range(11, 31):
            assert all_do(group, "round", step)[0]["mean"] == 2.0
        assert time.monotonic() - began < 2, "rounds of the same replicas are slow"
        assert coordinator.log.read_text().count("together") == 1


def test_late_one_is_handed_the_state_and_one_that_leaves_is_not_waited_for(coordinator):
    with replicas(coordinator, 2) as group:
        all_do(group, "round", 0)
        late = Replica(coordinator.address, replicas=2)
        group.append(late)
        assert late.answer() == "in"
        late.tell("round", 0, 100.0)
        assert not late.pipe.poll(0.5), "a round begins only when those who train come to it"
        reports = all_do(group[:2], "round", 20)
        assert [report["mean"] for report in reports] == [1.5, 1.5]
        assert late.answer() == reports[0] | {"newcomer": True}
        assert reports[0]["size"] == 3
        assert reports[0]["contributors"] == 2
        assert all_do(group, "round", 30)[0]["mean"] == 2.0

        group[1].tell("round", 40, 2.0)
        late.tell("round", 40, 3.0)
        began = time.monotonic()
        assert group[0].tell("leave").answer() == "left"
        reports = [group[1].answer(), late.answer()]
        assert time.monotonic() - began < 1.5
        assert [report["mean"] for report in reports] == [2.5, 2.5]
        assert "left; 2 replicas" in coordinator.log.read_text()


def test_killed_between_rounds_and_in_an_exchange(coordinator):
    with replicas(coordinator, 3, lost_after=20.0) as group:
        all_do(group, "round", 0)
        began = time.monotonic()
        group[2].signal(signal.SIGKILL)
        reports = all_do(group[:2], "until commit", 10)
        assert [report["mean"] for report in reports] == [1.5, 1.5]
        assert time.monotonic() - began < 6

        group[0].tell("until commit", 20, 1.0)
        assert group[1].tell("meet", 20).answer() == 2
        began = time.monotonic()
        group[1].signal(signal.SIGKILL)
        assert group[0].answer()["mean"] == 1.0
        assert time.monotonic() - began < 6
        assert group[0].tell("round", 30, 7.0).answer()["mean"] == 7.0
        assert coordinator.log.read_text().count("it has ended") == 2


def test_frozen_one_is_left_behind_and_comes_back(coordinator):
    with replicas(coordinator, 3) as group:
        all_do(group, "round", 0)
        # It freezes in an exchange: only the silence tells.
        for i in (0, 1):
            group[i].tell("until commit", 10, float(i + 1))
        assert group[2].tell("meet", 10).answer() == 3
        group[2].signal(signal.SIGSTOP)
        began = time.monotonic()
        assert [group[i].answer()["mean"] for i in (0, 1)] == [1.5, 1.5]
        assert LOST_AFTER - 1 < time.monotonic() - began < 2 * LOST_AFTER + 3
        assert "silent for 2 s" in coordinator.log.read_text()

        group[2].signal(signal.SIGCONT)
        assert group[2].tell("round", 10, 3.0).answer() == "behind"
        group[2].tell("round", 10, 3.0, True)
        time.sleep(0.5)  # or the round begins before it asks
        reports = all_do(group[:2], "round", 20)
        assert reports[0]["size"] == 3
        assert group[2].answer() == reports[0] | {"newcomer": True}
        assert all_do(group, "round", 30)[0]["mean"] == 2.0


def test_frozen_one_that_missed_nothing_goes_on(coordinator):
    with replicas(coordinator, 2) as group:
        all_do(group, "round", 0)
        group[1].signal(signal.SIGSTOP)
        time.sleep(LOST_AFTER + 1)
        assert "lost, silent" in coordinator.log.read_text()
        group[1].signal(signal.SIGCONT)
        time.sleep(1)  # a heartbeat
        assert all_do(group, "until commit", 10)[0]["mean"] == 1.5


def test_coordinator_that_is_started_anew_knows_them_again(coordinator):
    with replicas(coordinator, 3, lost_after=10.0) as group:
        all_do(group, "round", 0)
        # One waits in a meeting, one trains, one dies while nobody looks.
        group[0].tell("until commit", 10, 1.0)
        time.sleep(0.5)
        coordinator.kill()
        group[2].signal(signal.SIGKILL)
        time.sleep(0.5)
        coordinator.start()
        group[1].tell("until commit", 10, 2.0)
        began = time.monotonic()
        reports = [group[0].answer(), group[1].answer()]
        assert 7 < time.monotonic() - began < 13, "the third may have come back for so long"
        assert [report["mean"] for report in reports] == [1.5, 1.5]
        # Now nobody is missing, so nobody is waited for.
        coordinator.kill()
        coordinator.start()
        began = time.monotonic()
        assert all_do(group[:2], "until commit", 20)[0]["mean"] == 1.5
        assert time.monotonic() - began < 4


def test_coordinator_lost_in_an_exchange(coordinator):
    with replicas(coordinator, 2) as group:
        all_do(group, "round", 0)
        for replica in group:
            replica.tell("meet", 10)
        assert [replica.answer() for replica in group] == [2, 2]
        coordinator.kill()
        coordinator.start()
        # Votes on a round that nobody remembers: it is done again.
        reports = all_do(group, "until commit", 10)
        assert [report["mean"] for report in reports] == [1.5, 1.5]


def test_who_cannot_be_reached_is_sent_away(coordinator):
    with replicas(coordinator, 2) as group:
        all_do(group, "round", 0)
        group[1].tell("fail", 10)
        assert group[0].tell("until commit", 10, 1.0).answer()["size"] == 1
        message = group[1].answer()
        assert "5 rounds in a row of " in message
        assert "cure: " in message


def test_other_runs_and_absent_coordinators_are_refused(coordinator, tmp_path):
    world = World(0, 1, torch.device("cpu"))
    members = Members(section_for(coordinator.address), world, {"name": "a", "model": {"x": 1}}, 5)
    with pytest.raises(UserError, match=r"127\.0\.0\.1.*model\.x is 2 here and 1 there\n") as error:
        Members(section_for(coordinator.address), world, {"name": "a", "model": {"x": 2}}, 5)
    assert "name" not in str(error.value)
    assert "cure:" in str(error.value)
    with pytest.raises(UserError, match=r"cannot listen here.*\n.*rule:.*\n.*cure: "):
        serve("127.0.0.1", coordinator.port, lambda _: None)
    coordinator.kill()
    began = time.monotonic()
    with pytest.raises(
        UserError, match=f"{coordinator.address}: no coordinator answers.*1 s"
    ) as error:
        Members(section_for(coordinator.address), world, {}, 1.0)
    assert "cure: start `anthesis coordinator`" in str(error.value)
    assert 1 <= time.monotonic() - began < 3
    members.leave()


def test_what_talks_nonsense_is_hung_up_on(coordinator):
    for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"do": "meet"}\n', b"\xff\n"):
        with socket.create_connection(("127.0.0.1", coordinator.port), 5) as connection:
            connection.sendall(nonsense)
            assert connection.recv(100) == b""
    assert "Traceback" not in coordinator.log.read_text()


def two_rounds(world, address, value):
    waits = []
    members = Members(section_for(address), world, {}, 20, say=waits.append)
    reports = [take_round(members, 0, value + world.rank)]
    reports.append(take_round(members, 10, value + world.rank))
    # Any rank's failure is its replica's, and so everyone's.
    meeting = members.meet(20)
    reports.append(members.vote(meeting, world.rank == 0 or value == 0))
    reports.append(take_round(members, 20, value + world.rank))
    members.leave()
    return reports


def test_replicas_of_two_ranks(coordinator):
    results = {}

    def launch(value):
        results[value] = run_ranks(2, two_rounds, coordinator.address, value)

    threads = [threading.Thread(target=launch, args=(value,)) for value in (0.0, 10.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        first, other = results[0.0][rank], results[10.0][rank]
        # Each rank averages with those at the same place of the other replicas.
        assert [report["mean"] for report in (first[1], other[1])] == [5.0 + rank] * 2
        assert first[2] is other[2] is False
        assert [report["mean"] for report in (first[3], other[3])] == [5.0 + rank] * 2
        assert first[3]["changed"]


def broken_exchange(pipe, address):
    with join_world(60) as world:
        members = Members(section_for(address), world, {}, 20, exchange_seconds=10.0)
        meeting = members.meet(0)
        kept = meeting.replicas  # someone may still hold it: it is broken all the same
        kept.barrier()
        began = time.monotonic()
        if kept.rank == 0:
            time.sleep(3)
            members.vote(meeting, False)
        else:
            with pytest.raises(RuntimeError, match="onnection"):
                kept.sum(torch.ones(10))
            members.vote(meeting, False)
        pipe.send(time.monotonic() - began)
        pipe.recv()
        members.leave()


def test_who_fails_breaks_the_exchange_of_the_others(coordinator):
    pipes, processes = [], []
    for _ in range(2):
        pipe, end = _CONTEXT.Pipe()
        processes.append(start_single(broken_exchange, end, coordinator.address))
        pipes.append(pipe)
    try:
        assert all(pipe.poll(PATIENCE) for pipe in pipes)
        assert all(3 <= pipe.recv() < 5 for pipe in pipes)
        for pipe in pipes:
            pipe.send("go")
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
