"""The face of every dependency that no other test shows from outside: pictures, tables, curves, MPI, kernels.

`make test-newest` runs these and all others that are marked ``newest`` with the newest versions there are.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.test_streams import BUFFERS, JSON, LENGTHS

ROOT = Path(__file__).parents[2]
DEPENDENCIES = ("torch", "gloo", "mpi4py", "mpiexec", "PuLP", "solvers", "rich", "tensorboard", "triton")
LAUNCHERS = (
    "RANK",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "WORLD_",
    "MASTER_",
    "TORCHELASTIC_",
    "PMI_",
    "MPI_",
    "OMPI_",
    "SLURM_",
)
pytestmark = pytest.mark.newest


def needs(name):
    """Skips what is not installed; what is installed and cannot be imported is a failure."""
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@pytest.fixture
def run(tmp_path):
    (tmp_path / "lengths.txt").write_text(LENGTHS)
    (tmp_path / "buffers.csv").write_text(BUFFERS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def run(*words):
        ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return run


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("command", "shows"),
    [("plan", "micro-batch 0"), ("place", "lower bound"), ("memory", "recompute"), ("layers", "SoftmaxAttention")],
)
def test_tables(command, shows, run):
    assert shows in run(sys.executable, "-m", "seqpar", command, *JSON[command])


@pytest.mark.sampled(4)
@needs("matplotlib")
@pytest.mark.parametrize("command", ["plan", "place"])
@pytest.mark.parametrize(("kind", "starts"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_pictures(command, kind, starts, run, tmp_path):
    run(sys.executable, "-m", "seqpar", command, *JSON[command], "--plot", f"picture.{kind}")
    assert (tmp_path / f"picture.{kind}").read_bytes().startswith(starts)


CURVES = """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
with SummaryWriter("runs") as board:
    board.add_scalar("loss", 2.5, 7)
curves = EventAccumulator("runs").Reload()
print([(point.step, point.value) for point in curves.Scalars("loss")])
"""


@needs("tensorboard")
def test_curves(run):
    assert run(sys.executable, "-c", CURVES) == "[(7, 2.5)]\n"


RANKS = """
import torch
from seqpar.collectives import connect, disconnect
group = connect("gloo")
total = group.all_reduce(torch.tensor([float(group.rank + 1)])).wait()
if group.rank == 0:
    print(group.size, total.item())
disconnect()
"""


@needs("mpi4py")
def test_mpi(run, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    assert run("mpiexec", "-n", "2", sys.executable, "-m", "mpi4py", "ranks.py") == "2 3.0\n"


def test_doctor_finds_every_dependency(run):
    """Those of the extras that `make` installs."""
    items = {
        item["name"]: item["state"] for item in json.loads(run(sys.executable, "-m", "seqpar", "doctor", "--json"))
    }
    assert {name: items[name] for name in DEPENDENCIES} == dict.fromkeys(DEPENDENCIES, "found")
