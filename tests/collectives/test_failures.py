"""When a rank fails: its own error is shown, its peers end, the next test runs. In every world, and in a job."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from seqpar.collectives.launcher import _free_port

pytestmark = pytest.mark.timeout(300)  # each waits for jobs, and ends with them

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PYTEST = ("-m", "pytest", "-p", "tests.worlds", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"))

TESTS = """
import os, time
import pytest, torch
from hypothesis import given, settings, strategies

@pytest.mark.spmd(2)
def test_rank_1_raises(group):
    rows = group.partition([[1, 0]])
    if group.rank == 1:
        raise ValueError("boom 17")
    rows.exchange(None, None, torch.empty(3), 0).wait()

@pytest.mark.spmd(2)
def test_sum(group):
    assert int(group.all_reduce(torch.tensor(group.rank + 1)).wait()) == 3

@pytest.mark.spmd(2)
@settings(max_examples=5)
@given(number=strategies.integers(0, 9))
def test_drawn(group, number):
    assert int(group.all_reduce(torch.tensor(number)).wait()) == 2 * number

@pytest.mark.spmd(2)
def test_rank_1_skips(group):
    if group.rank == 1:
        pytest.skip("no reason")
"""

DEATH = """
@pytest.mark.spmd(2)
def test_rank_1_dies(group):
    if group.rank == 1:
        os._exit(7)
    group.all_reduce(torch.ones(1)).wait()

@pytest.mark.spmd(2)
def test_sum_again(group):
    assert int(group.all_reduce(torch.tensor(group.rank + 1)).wait()) == 3
"""

JOB = """
import os, sys, threading
import torch
from seqpar.collectives import connect, disconnect
group = connect("gloo", timeout_seconds={seconds})
group.all_reduce(torch.ones(1)).wait()
if group.rank == 1:
    {fate}
group.exchange(None, None, torch.empty(1), 1).wait()
disconnect()
"""


def run(*command: str, limit_seconds: float, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command; it must end by itself, long before the limit."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PMI_", "OMPI_", "SLURM_", "PYTEST_"))}
    inherited["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_seconds,
    )
    return done.returncode, done.stdout


def launch(world: str, num_ranks: int = 2) -> list[str]:
    """The beginning of a command that starts ranks in a world."""
    if world == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    if world == "mpirun":
        return [str(BIN / "mpiexec"), "-n", str(num_ranks), sys.executable]
    return [sys.executable]


@pytest.mark.sampled(4)
@pytest.mark.slow
@pytest.mark.parametrize("world", ["threads", "processes", "torchrun", "mpirun"])
def test_a_failing_rank_shows_its_error_and_the_next_test_runs(world: str, tmp_path: Path) -> None:
    if world == "mpirun" and not (BIN / "mpiexec").exists():
        pytest.skip("mpich is not installed")
    (tmp_path / "test_small.py").write_text(TESTS + (DEATH if world == "processes" else ""))
    code, output = run(*launch(world, 3), *PYTEST, "--world", world, str(tmp_path), limit_seconds=280)
    assert code == 1, output
    assert "ValueError: boom 17" in output
    assert "raised on rank 1 of 2" in output
    if world == "processes":
        assert "died with exit code 7" in output
        assert "2 failed, 3 passed, 1 skipped" in output
    else:
        assert "1 failed, 2 passed, 1 skipped" in output


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB.format(seconds=20, fate="threading.Event().wait()"))
    code, output = run(*launch("torchrun"), str(job), limit_seconds=280)
    assert code != 0
    assert "GroupError: rank 0 of 2: exchange with rank 1 failed: Timed out waiting 20000ms" in output


@pytest.mark.sampled(4)
@pytest.mark.slow
@pytest.mark.parametrize("world", ["torchrun", "mpirun"])
@pytest.mark.parametrize("fate", ["os._exit(7)", "raise ValueError('boom 17')"])
def test_a_rank_that_dies_ends_the_job(world: str, fate: str, tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB.format(seconds=600, fate=fate))
    code, output = run(*launch(world), str(job), limit_seconds=280)
    assert code != 0
    assert "boom 17" in output or "boom" not in fate
    assert "exitcode  : 7" in output or world == "mpirun" or "7)" not in fate


ATTEMPT = """
import os, sys
import torch
import torch.distributed as dist
from seqpar.collectives import connect, disconnect
group = connect("gloo")
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    group.all_reduce(torch.ones(1)).wait()
    os._exit(7)
keys = dist.distributed_c10d._get_default_store()
assert keys.add("collectives/groups", 0) == 1, "a group of the attempt before is counted"
assert int(group.partition([[1, 0]]).all_reduce(torch.tensor(1)).wait()) == 2
disconnect()
"""


@pytest.mark.nightly
def test_ranks_that_torchrun_starts_again_find_nothing_of_the_attempt_before(tmp_path: Path) -> None:
    """The agent's store is the same in every attempt, and full of addresses of ranks that are dead."""
    job = tmp_path / "job.py"
    job.write_text(ATTEMPT)
    code, output = run(*launch("torchrun"), "--max-restarts=1", str(job), limit_seconds=280)
    assert code == 0, output


@pytest.mark.slow
def test_the_peer_of_a_dead_rank_says_who_died(tmp_path: Path) -> None:
    """Two processes and no launcher, so that nothing but the broken connection ends rank 0."""
    job = tmp_path / "job.py"
    job.write_text(JOB.format(seconds=600, fate="os._exit(7)"))
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    other = subprocess.Popen([sys.executable, str(job)], env=os.environ | told | {"RANK": "1"}, cwd=ROOT)
    code, output = run(sys.executable, str(job), limit_seconds=280, RANK="0", **told)
    assert (other.wait(), code) == (7, 1)
    assert re.search(
        r"GroupError: rank 0 of 2: (exchange|all_reduce) with rank 1 failed: .*Connection (closed|reset) by peer",
        output,
    )
    assert "RuntimeError" in output, "the cause is chained"
