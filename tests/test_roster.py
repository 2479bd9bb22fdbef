"""Who is in a round, as the coordinator decides it, with a clock that is set by hand."""

from pretrain.sync.roster import NEVER, Roster


class Rehearsal:
    """A roster, a clock that is set by hand, and what was said."""

    def __init__(self):
        self.now, self.said = 0.0, []
        self.roster = Roster(self.said.append, lambda: self.now)

    def hello(self, key, mark=NEVER, expect=2):
        who = {"id": key, "host": key, "facts": {}, "expect": expect, "lost_after": 30.0}
        assert self.roster.hello({**who, "mark": mark}, "10.0.0.1") is None
        self.roster.heard(key, hash(key))

    def meet(self, key, step, mark=NEVER):
        self.roster.meet(key, step, mark)

    def wait(self, seconds, *beating):
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.roster.tick()
            for key in beating:
                self.hello(key)

    def commit(self, *keys):
        """All vote for the round that they were told of; their new mark."""
        epoch = self.roster.meeting(keys[0])["epoch"]
        for key in keys:
            assert self.roster.meeting(key)["epoch"] == epoch
        for key in keys:
            self.roster.vote(key, epoch, True)
        return self.roster.outcome(keys[0], epoch)["mark"]


def test_start_waits_for_all_and_the_furthest_hands_over():
    stage = Rehearsal()
    for key in "abc":
        stage.hello(key)
    stage.meet("a", 0)
    stage.meet("b", 50)
    assert stage.roster.meeting("a") is None, "c said hello and has yet to read its checkpoint"
    assert "c" in stage.roster.awaited()
    stage.meet("c", 50)
    answer = stage.roster.meeting("a")
    assert answer["members"] == ["b", "a", "c"]
    assert answer["contributors"] == 1


def test_answers_that_were_lost_are_given_again():
    stage = Rehearsal()
    for key in "ab":
        stage.hello(key)
        stage.meet(key, 0)
    answer = stage.roster.meeting("a")
    stage.meet("a", 0)
    assert stage.roster.meeting("a") == answer
    mark = stage.commit("a", "b")
    stage.roster.vote("a", answer["epoch"], True)
    assert stage.roster.outcome("a", answer["epoch"]) == {"mark": mark}


def test_steps_that_differ_are_refused_by_name():
    stage = Rehearsal()
    for key in "ab":
        stage.hello(key)
        stage.meet(key, 0)
    mark = stage.commit("a", "b")
    stage.meet("a", 10, mark)
    assert stage.roster.meeting("a") is None
    stage.meet("b", 20, mark)
    for key in "ab":
        refusal = stage.roster.meeting(key)["refused"]
        assert "a (a) at step 10, b (b) at step 20" in refusal
        assert "cure:" in refusal


def test_vote_of_one_that_is_lost_counts_and_no_vote_is_left_behind():
    stage = Rehearsal()
    for key in "abc":
        stage.hello(key, expect=3)
        stage.meet(key, 0)
    epoch = stage.roster.meeting("a")["epoch"]
    stage.roster.vote("b", epoch, True)
    stage.roster.bye("b")
    stage.roster.bye("c")
    assert stage.roster.outcome("a", epoch) is None
    stage.roster.vote("a", epoch, True)
    mark = stage.roster.outcome("a", epoch)["mark"]
    assert mark[2] == 2
    for key in "bc":
        stage.hello(key)
        stage.roster.vote(key, epoch, True)
    assert stage.roster.outcome("b", epoch)["mark"] == mark
    assert stage.roster.outcome("c", epoch)["mark"] is None


def test_round_that_is_done_again_waits_for_newcomers_too():
    stage = Rehearsal()
    for key in "ab":
        stage.hello(key)
        stage.meet(key, 0)
    mark = stage.commit("a", "b")
    stage.hello("c")
    stage.meet("c", 0)
    for key in "ab":
        stage.meet(key, 10, mark)
    epoch = stage.roster.meeting("c")["epoch"]
    assert {stage.roster.meeting(key)["epoch"] for key in "ab"} == {epoch}
    stage.roster.vote("a", epoch, False)
    for key in "ab":
        assert stage.roster.outcome(key, epoch) == {"mark": None}
        stage.meet(key, 10, mark)
    assert stage.roster.meeting("a") is None
    stage.roster.vote("c", epoch, True)
    assert stage.roster.outcome("c", epoch) == {"mark": None}
    stage.meet("c", 0)
    again = stage.roster.meeting("a")
    assert again["members"] == ["a", "b", "c"]
    assert again["contributors"] == 2
    assert again["group"] == again["epoch"] != epoch


def test_last_round_of_all_is_what_counts():
    stage = Rehearsal()
    stage.hello("behind", (6, "old", 2))
    stage.meet("behind", 60, (6, "old", 2))
    assert stage.roster.meeting("behind") is None, "its mate may come back"
    stage.hello("ahead", (7, "old", 1))
    assert stage.roster.meeting("behind") == {"behind": True}
    stage.meet("behind", 60, NEVER)
    stage.meet("ahead", 70, (7, "old", 1))
    answer = stage.roster.meeting("ahead")
    assert answer["members"] == ["ahead", "behind"]
    assert answer["contributors"] == 1
    assert answer["epoch"][0] == 8


def test_mates_are_waited_for_after_all_were_lost():
    stage = Rehearsal()
    for key in "ab":
        stage.hello(key)
        stage.meet(key, 0)
    mark = stage.commit("a", "b")
    stage.wait(31)
    assert stage.said[-1] == "b (b) lost, silent for 30 s; 0 replicas"
    stage.hello("a", mark)
    stage.meet("a", 10, mark)
    stage.wait(29, "a")
    assert stage.roster.meeting("a") is None
    stage.wait(2, "a")
    assert stage.roster.meeting("a")["members"] == ["a"]


def test_coordinator_that_was_frozen_gives_nobody_up():
    stage = Rehearsal()
    stage.hello("a")
    stage.wait(1, "a")
    stage.now += 1000
    stage.roster.tick()
    assert "lost" not in "".join(stage.said)
    stage.wait(31)
    assert "lost, silent for 3" in stage.said[-1]


def test_nobody_waits_to_connect_to_one_that_is_lost():
    stage = Rehearsal()
    for key in "ab":
        stage.hello(key)
        stage.meet(key, 0)
    epoch = stage.roster.meeting("a")["epoch"]
    stage.roster.put(epoch, "0", "address of a")
    assert stage.roster.take(epoch, "0") == {"value": "address of a"}
    assert stage.roster.take(epoch, "1") is None
    stage.roster.bye("b")
    assert "over" in stage.roster.take(epoch, "1")
    stage.roster.vote("a", epoch, False)
    assert "over" in stage.roster.take(epoch, "0")
