"""A sequence that is cut over ranks which share one GPU: threads of one process, and two processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqpar import Shard, linear_attention
from seqpar.collectives import run_ranks
from seqpar.crossing.attention import attention
from seqpar.ops.selfcheck import random_tensors, relative_error
from tests.gpu.here import DEVICE, ON_GPU, only_gpu, sized
from tests.gpu.through_host import ThroughHost

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent.parent
LENGTHS = sized((700, 1, 300, 23), (17, 1, 9))
DIM = sized(64, 16)
IMPL = "auto"  # kernels on a GPU, the reference elsewhere


def inputs():
    shape = (1, sum(LENGTHS), 2, DIM)
    q, k, v, gates, d_out = random_tensors(0, *[shape] * 5)
    return q, k, v, torch.nn.functional.logsigmoid(gates), d_out


def linear(q, k, v, gates, shard, group):
    return linear_attention(q, k, v, log_decay=gates, shard=shard, group=group, scale=DIM**-0.5)


def softmax(q, k, v, gates, shard, group):
    return attention(q, k, v + 0 * gates, shard=shard, group=group)


OPS = {"linear": linear, "softmax": softmax}


def mine(name, group, layout, dtype, device):
    """My rows of the output and of all gradients, and which rows these are."""
    shard = Shard.of(LENGTHS, group, layout)
    *leaves, d_out = (shard.take(x).to(device, dtype) for x in inputs())
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = OPS[name](*leaves, shard, group)
    # Each rank's backward in its own thread: torch has one for all of a GPU, where they would wait for each other.
    with torch.autograd.set_multithreading_enabled(False):
        gradients = torch.autograd.grad(out, leaves, d_out)
    return [x.detach().cpu() for x in (out, *gradients)]


def whole(name):
    """The same on one device: the reference in fp64 on the CPU."""
    (results,) = run_ranks(1, lambda group: mine(name, group, "contiguous", torch.float64, torch.device("cpu")))
    return results


def errors(parts, name, shards):
    """The largest relative error of the ranks' results, put together."""
    found = []
    for number, exact in enumerate(whole(name)):
        difference = sum((part[number].double() - shard.take(exact)).norm() ** 2 for part, shard in zip(parts, shards))
        found.append(float(difference**0.5 / exact.norm().clamp(min=1e-30)))
    return max(found)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", OPS)
def test_threads_that_share_a_gpu_give_what_one_device_gives(name, ranks, layout):
    def body(group):
        return mine(name, group, layout, torch.float32, DEVICE), Shard.of(LENGTHS, group, layout)

    parts, shards = zip(*run_ranks(ranks, body))
    assert errors(parts, name, shards) < 1e-5


@only_gpu
def test_two_processes_that_share_a_gpu_give_what_one_device_gives():
    """Over gloo, through host memory: NCCL wants a GPU for each rank."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.gpu.two"],
        cwd=ROOT, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("agree") == 2 * len(OPS)


def test_host_memory_between_two_ranks_changes_nothing():
    """The group that the two processes use, here between threads."""

    def body(group):
        staged = ThroughHost(group)
        assert (staged.rank, staged.size) == (group.rank, group.size)
        return mine("linear", staged, "zigzag", torch.float32, DEVICE), Shard.of(LENGTHS, group, "zigzag")

    parts, shards = zip(*run_ranks(2, body))
    assert errors(parts, "linear", shards) < 1e-5


@pytest.mark.skipif(not ON_GPU, reason="streams are CUDA's")
def test_a_stream_of_its_own_changes_nothing():
    """Ranks as threads, each on a stream of its own: what travels between them is waited for."""
    streams = [torch.cuda.Stream() for _ in range(2)]

    def body(group):
        with torch.cuda.stream(streams[group.rank]):
            return mine("linear", group, "contiguous", torch.float32, DEVICE), Shard.of(LENGTHS, group)

    parts, shards = zip(*run_ranks(2, body))
    assert errors(parts, "linear", shards) < 1e-5


def test_an_error_would_be_seen():
    parts, shards = zip(
        *run_ranks(
            2, lambda group: (mine("linear", group, "contiguous", torch.float32, DEVICE), Shard.of(LENGTHS, group))
        )
    )
    parts[1][2].mul_(1.01)
    assert errors(parts, "linear", shards) > 1e-3
    assert relative_error(parts[0][0], parts[0][0]) == 0
