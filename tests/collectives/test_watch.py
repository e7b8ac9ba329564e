"""Ranks as processes that wait in vain: every rank ends with the reason, at once, and the group is closed for good."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.collectives import Group, GroupError
from seqpar.collectives.agreed import agree, tell_of_errors
from seqpar.collectives.watch import SECONDS, Family, Waiting, Watch, differing
from tests.worlds.anew import run_cases

SIZE = 3


def round_trip(group: Group, send: int, receive: int, dtype: torch.dtype = torch.float32) -> None:
    to, source = (group.rank + 1) % SIZE, (group.rank - 1) % SIZE
    group.exchange(torch.ones(send, dtype=dtype), to, torch.empty(receive, dtype=dtype), source).wait()


def total(group: Group, numbers: int = 2) -> None:
    group.all_reduce(torch.ones(numbers)).wait()


def too_long(group: Group) -> None:
    round_trip(group, 6 if group.rank == 1 else 4, 4)


def too_short(group: Group) -> None:
    round_trip(group, 4, 6 if group.rank == 1 else 4)


def other_dtype(group: Group) -> None:
    round_trip(group, 4, 4, torch.int32 if group.rank == 1 else torch.float32)


def large_sums(group: Group) -> None:
    total(group, 50_000 if group.rank == 1 else 40_000)


def circle(group: Group) -> None:
    group.exchange(None, None, torch.empty(1), (group.rank + 1) % SIZE).wait()


def another_way(group: Group) -> None:
    """Both places are known; no message tells them apart but for the course."""
    agree(group, "a place", 1)
    agree(group, "a place", 2)
    agree(group, "a place", 1 if group.rank == 1 else 2)


def out_of_memory(group: Group) -> None:
    with tell_of_errors(group, "call 4 of the model"):
        if group.rank == 1:
            raise MemoryError("no 3 GiB left")
        total(group)


def one_way(group: Group) -> None:
    """The sender waits for nothing; it is told by its next message."""
    if group.rank == 0:
        group.exchange(torch.ones(4), 1, None, None).wait()
    if group.rank == 1:
        group.exchange(None, None, torch.empty(6), 0).wait()


CASES = {
    "too_long": (too_long, r"waits for exchange of \[4\] torch.float32 from rank 1, which sent exchange of \[6\]"),
    "too_short": (too_short, r"rank 1 waits for exchange of \[6\] \S+ from rank 0, which sent exchange of \[4\]"),
    "other_dtype": (other_dtype, r"exchange of \[4\] torch.\w+32 .* sent exchange of \[4\] torch.\w+32"),
    "large_sums": (large_sums, r"all_reduce of \[[45]0000\] in parts .* sent all_reduce of \[[45]0000\] in parts"),
    "circle": (circle, r"ranks wait for each other: rank \d for rank \d for rank \d for rank \d"),
    "another_way": (another_way, r"in a place, course \w+ from rank \d, which sent .* in a place, course \w+"),
    "out_of_memory": (out_of_memory, r"rank 1 left a call that others are in: MemoryError in call 4 .* no 3 GiB left"),
    "one_way": (one_way, r"rank 1 waits for exchange of \[6\] torch.float32 from rank 0, which sent exchange of \[4\]"),
}  # fmt: skip


def attempt(group: Group, case: str) -> str:
    """The error of a case, and whether the group is closed from then on, with the same reason."""
    if case == "well":
        total(group)
        return "well"
    try:
        total(group)
        CASES[case][0](group)
        total(group)
        total(group)
    except GroupError as error:
        try:
            total(group)
        except GroupError as again:
            return f"{error}\nagain: {again}"
        return "unexpected: the group can be used again"
    except MemoryError:
        return "mine"
    return "silent"


def test_every_rank_is_told_why_and_the_group_is_closed():
    for case, outcomes, _ in run_cases(attempt, [*CASES, "well"], SIZE):
        if case == "well":
            assert outcomes == ["well"] * SIZE, "a new group works"
            continue
        told = [outcome for outcome in outcomes if outcome != "mine"]
        assert len(told) == SIZE - (case == "out_of_memory"), (case, outcomes)
        assert any(re.search(CASES[case][1], outcome) for outcome in told), (case, outcomes)
        assert all(re.search(r"again: rank \d of 3: all_reduce: the group is closed, since ", each) for each in told)


def state(rank: int, *entries: tuple[str, int, str]) -> dict:
    family = Family(rank)
    for way, peer, what in entries:
        family.log("g").add(way, peer, what, lambda number: number)
    return family.state()


def test_the_first_message_that_is_two_things_is_found():
    mine = state(0, ("sent", 1, "a"), ("expected", 1, "b"), ("sent", 2, "x"))
    assert differing(0, mine, 1, state(1, ("expected", 0, "a"), ("sent", 0, "b"))) == ""
    assert differing(0, mine, 1, state(1, ("expected", 0, "a"))) == "", "what was not sent yet may come"
    assert "rank 0 waits for b from rank 1, which sent c" in differing(0, mine, 1, state(1, ("sent", 0, "c")))
    assert "rank 1 waits for c from rank 0, which sent a" in differing(0, mine, 1, state(1, ("expected", 0, "c")))


class Store(dict):
    """The store of a job, as far as the watch uses it."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    delete_key = dict.pop


class Told:
    """Ranks that begin to wait at given times, on a clock that only the test moves; when was each told why?"""

    def __init__(self, starts: list[float], peers: list[int], phases: list[float]) -> None:
        self.starts, self.peers = starts, peers
        self.families = [Family(rank) for rank in range(len(starts))]
        store = Store()
        self.watches = [Watch("g", family, store, lambda: None) for family in self.families]
        self.looks, self.next, self.at = [0] * len(starts), list(phases), [float("inf")] * len(starts)

    def send(self, sender: int, receiver: int, sent: str, expected: str) -> None:
        self.families[sender].log("g").add("sent", receiver, sent, lambda number: number)
        self.families[receiver].log("g").add("expected", sender, expected, lambda number: number)

    def wait(self, rank: int, now: float) -> None:
        family, peer = self.families[rank], self.peers[rank]
        number = max(1, family.log("g").counts["expected", peer])
        family.waiting = Waiting(1, "g", "expected", peer, number, "a message", now)

    def run(self, until: float) -> None:
        now = 0.0
        while now < until and not all(family.why for family in self.families):
            rank = min(range(len(self.next)), key=self.next.__getitem__)
            now, family = self.next[rank], self.families[rank]
            if family.waiting is None and now >= self.starts[rank]:
                self.wait(rank, self.starts[rank])
            if not family.why:
                self.watches[rank].look(now)
                self.looks[rank] += now >= max(self.starts)
                self.at[rank] = now if family.why else self.at[rank]
            self.next[rank] = now + (SECONDS / 2 if now >= self.starts[rank] else SECONDS)


starts = st.lists(st.floats(0, 20), min_size=3, max_size=3)
phases = st.lists(st.floats(0, SECONDS), min_size=3, max_size=3)


@pytest.mark.parametrize("kind", ["circle", "another message"])
@given(starts=starts, phases=phases)
@settings(max_examples=40, deadline=None)
def test_however_long_some_have_waited_all_are_told_ten_looks_after_the_last(kind, starts, phases):
    told = Told(starts, [1, 2, 0], phases)
    if kind == "another message":
        told.send(0, 1, "a", "b")
    told.run(until=100)
    assert max(told.looks) <= 10
    assert max(told.at) <= max(starts) + 10 * SECONDS / 2


def test_whoever_waits_for_a_rank_that_computes_waits_on():
    told = Told([0.0, 0.0, 1000.0], [1, 2, 0], [0.0, 0.1, 0.15])
    told.run(until=900)
    assert not any(family.why for family in told.families)
