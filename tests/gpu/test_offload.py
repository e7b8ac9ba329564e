"""Copies beside the computation, and memory that is registered with CUDA."""

import pytest
import torch

from seqpar import Cut, next_token_loss
from seqpar.models import HybridLM
from seqpar.models.hybrid import HybridConfig
from seqpar.offload.planning.strategies import Fractions
from seqpar.offload.runtime.activations import activations
from seqpar.offload.runtime.host_memory import Slab
from seqpar.offload.runtime.streams import StreamLane, lanes_for
from seqpar.offload.runtime.tiers import HostTier
from seqpar.training.swapped import swapped_cut
from tests.gpu.here import DEVICE, ON_GPU, only_gpu, sized

pytestmark = pytest.mark.gpu

BYTES = sized(64 << 20, 1 << 16)


def step(swap_of):
    """Loss and gradients of one step, with what ``swap_of(model)`` swaps."""
    torch.manual_seed(0)
    model = HybridLM(HybridConfig(dim=64, layers=4)).to(DEVICE)
    tokens = torch.randint(256, (1, sized(4096, 64)), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    cut, swap = Cut.whole([tokens.shape[1]]), swap_of(model)
    if swap is None:
        logits = model(tokens, cut)
    else:
        with swap:
            logits = model(tokens, swapped_cut(cut, swap))
    loss = next_token_loss(logits, tokens, shard=cut.shard, group=cut.group)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("fate", [Fractions(0.0, 1.0, 0.0), Fractions(0.25, 0.75, 0.0)], ids=["all", "most"])
def test_swapping_activations_changes_no_bit(fate):
    kept = step(lambda model: None)
    swapped = step(lambda model: activations(model, fate, keep_last=0, smallest_bytes=1))
    assert all(torch.equal(x, y) for x, y in zip(kept, swapped, strict=True))


def test_bytes_come_back_from_the_host_tier():
    tier = HostTier(pinned=ON_GPU)
    source = torch.randint(0, 256, (4, BYTES // 4), dtype=torch.uint8, device=DEVICE)
    region = tier.reserve(BYTES)
    leaving, returning = lanes_for(DEVICE)
    left = leaving.submit(lambda: tier.write(region, source), [source])
    target = torch.zeros_like(source)
    returning.submit(lambda: tier.read(region, target), [target], after=[left]).wait()
    assert torch.equal(source, target)
    for lane in (leaving, returning):
        lane.close()
    tier.close()


@only_gpu
def test_registered_memory_is_pinned_and_can_be_given_back():
    for _ in range(3):
        slab = Slab(BYTES + 64, pinned=True)
        assert slab.data.is_pinned()
        slab.close()
        assert not slab.data.is_pinned()


@only_gpu
def test_a_lane_waits_for_the_computation_and_the_computation_for_the_lane():
    lane, host = StreamLane(), Slab(BYTES, pinned=True)
    x = torch.zeros(BYTES // 4, device=DEVICE)
    for number in range(20):
        x.fill_(number)
        torch.cuda._sleep(1_000_000)  # the copy must not overtake this
        x.add_(0.5)
        left = lane.submit(lambda: host.data.view(torch.float32).copy_(x, non_blocking=True), [x])
        left.wait()
        x.zero_()  # and this must not overtake the copy
        torch.cuda.synchronize()
        assert torch.equal(host.data.view(torch.float32), torch.full_like(host.data.view(torch.float32), number + 0.5))
    lane.close()


@only_gpu
def test_copies_run_beside_the_computation():
    """A copy and a computation of about the same length take less than both in turn."""
    lane, host, x = StreamLane(), Slab(BYTES, pinned=True), torch.ones(BYTES // 4, device=DEVICE)
    copy = lambda: host.data.view(torch.float32).copy_(x, non_blocking=True)  # noqa: E731
    seconds_copy = elapsed(copy)
    cycles = int(1e6 * seconds_copy / max(elapsed(lambda: torch.cuda._sleep(1_000_000)), 1e-6))

    def together():
        done = lane.submit(copy, [x])
        torch.cuda._sleep(cycles)
        done.wait()

    assert min(elapsed(together) for _ in range(5)) < 1.6 * seconds_copy
    lane.close()


def elapsed(work):
    work()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3
