"""Ranks of a Slurm step that wait for others say so, after a number of looks and not after seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqpar.collectives import GroupError
from seqpar.collectives.launcher import Place, _free_port
from seqpar.collectives.meeting import wait_for_all

ROOT = Path(__file__).parents[2]


class Shared:
    """A store in which the other ranks come, ``arrivals[n]`` of them at look number n."""

    def __init__(self, *arrivals):
        self.arrivals, self.here = list(arrivals), 0

    def add(self, key, amount, /):
        self.here += amount + (self.arrivals.pop(0) if self.arrivals else 0)
        return self.here


def place(rank=0, size=8):
    return Place(rank, size, 0, 1, "node1", 12345, "Slurm")


def waited(store, rank=0, timeout_seconds=60.0):
    """The lines that were said, and the seconds that would have been slept."""
    lines, slept = [], []
    wait_for_all(store, place(rank), timeout_seconds, sleep=slept.append, say=lines.append)
    return lines, sum(slept)


def test_ranks_that_come_at_once_are_not_waited_for():
    assert waited(Shared(7)) == ([], 0)


def test_one_line_says_for_how_many_rank_0_waits():
    lines, slept = waited(Shared(2, *[0] * 80, 4, 1))
    assert lines == ["rank 0 of 8: waiting for 5 more ranks that Slurm should have started"]
    assert slept == pytest.approx(8.2)
    assert waited(Shared(*[0] * 80, 7), rank=3)[0] == [], "one of them is enough"
    assert waited(Shared(2, 0, 0, 5))[0] == [], "who is a little late is no news"


def test_at_the_timeout_it_is_an_error():
    for seconds in (0.01, 2.0, 60.0):
        with pytest.raises(GroupError, match=f"rank 0 of 8: connect failed: 1 more rank did not come .* {seconds:g} s"):
            waited(Shared(6), timeout_seconds=seconds)


STEP = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
JOB = """
import sys, torch
from seqpar.collectives import connect, disconnect
group = connect("gloo", timeout_seconds=float(sys.argv[1]))
print(int(group.all_reduce(torch.tensor(group.rank + 1)).wait()))
disconnect()
"""


def start(words, told):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PMI_", "OMPI_", "SLURM_", "RANK", "WORLD_"))}
    environment = inherited | told | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_step_of_two_meets_and_one_of_one_says_who_is_missing():
    told = STEP | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    both = [start(["-c", JOB, "300"], told | {"SLURM_PROCID": str(rank)}) for rank in (1, 0)]
    for job in both:
        out, err = job.communicate(timeout=600)
        assert job.returncode == 0 and out == "3\n", err
    lonely = start(["-c", JOB, "6"], told | {"SLURM_PROCID": "0", "MASTER_PORT": str(_free_port())})
    _, err = lonely.communicate(timeout=600)
    assert lonely.returncode == 1
    assert "rank 0 of 2: waiting for 1 more rank that Slurm should have started\n" in err
    assert "GroupError: rank 0 of 2: connect failed: 1 more rank did not come within 6 s" in err


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967290"}, {"SLURM_STEP_ID": "0"}])
def test_verify_in_a_shell_of_slurm_has_threads_for_ranks(step):
    """No step, salloc's own one, or (its others will never come) with --ranks that say threads."""
    told = STEP | {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"} | step
    told = {name: value for name, value in told.items() if name != "SLURM_STEP_ID" or step}
    job = start(["-m", "seqpar", "verify", "--tokens", "20", *(["--ranks", "3"] if step else [])], told)
    out, err = job.communicate(timeout=600)
    assert job.returncode == 0, err
    assert f"{3 if step else 4} ranks, contiguous layout" in out and "Equal" in out


def test_a_store_of_torch_is_one():
    store = torch.distributed.HashStore()
    wait_for_all(store, place(size=1), 1.0, sleep=pytest.fail, say=pytest.fail)
