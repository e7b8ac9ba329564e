"""Copies that are as late as they may be find every published race; and each guard is shown to be needed."""

import gc
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from seqpar.offload.runtime.runs import Run
from seqpar.offload.runtime.saved import Buffers
from seqpar.offload.runtime.streams import StreamLane, ThreadLane, _Flight
from tests.offload.runtime.late_copies import LateCuda, LateTier, PoisonedBuffers
from tests.offload.runtime.models import HALF, SWAP, Stack, data, gradients, same, step, swapping


class Harness:
    """Swapping on late streams, with poison everywhere."""

    def __init__(self, lane=StreamLane, buffers=PoisonedBuffers, fate=SWAP, layers=4):
        self.cuda = LateCuda()
        self.model = Stack(layers)
        self.swap = swapping(self.model, fate, tier=LateTier(self.cuda), lanes=(lane(self.cuda), lane(self.cuda)))
        self.swap.machinery = replace(self.swap.machinery, buffers=buffers())

    def right(self, work=step):
        """Whether ``work`` gives the same bits with and without swapping, and no copy touched freed memory."""
        expected = work(self.model, None)
        found = work(self.model, self.swap)
        self.swap.machinery.leaving.settle()
        self.swap.machinery.returning.settle()
        return same(found, expected) and not self.cuda.violations


@pytest.mark.parametrize("fate", [SWAP, HALF])
def test_late_copies_change_nothing(fate):
    harness = Harness(fate=fate)
    for _ in range(10):
        assert harness.right()
    gc.collect()
    assert harness.swap.machinery.tier.used == 0


# --- bug classes, each with the guard taken away ---------------------------------------------------------------------


class WaitsInside(StreamLane):
    """Asks for the current stream inside of `with stream`: it waits for itself."""

    def submit(self, work, holds, after=(), finished=None):
        home = self._api.current_stream()
        flight = _Flight(self._api, home, list(holds), finished)
        with self._api.stream(self._stream):
            self._stream.wait_event(self._api.current_stream().record_event())
            for done in after:
                done.wait()
            work()
            flight.event = self._stream.record_event()
        self._flying.append(flight)
        return flight


class CachesStream(StreamLane):
    """Asks for the current stream once."""

    def __init__(self, api):
        super().__init__(api)
        self._cached = api.current_stream()

    def submit(self, work, holds, after=(), finished=None):
        self._stream.wait_event(self._cached.record_event())
        flight = _Flight(self._api, self._cached, list(holds), finished)
        with self._api.stream(self._stream):
            for done in after:
                done.wait()
            work()
            flight.event = self._stream.record_event()
        self._flying.append(flight)
        return flight


class ReloadsTooSoon(StreamLane):
    """Does not wait for the bytes to have left before it fetches them."""

    def submit(self, work, holds, after=(), finished=None):
        return super().submit(work, holds, (), finished)


class HoldsNothing(StreamLane):
    """Lets tensors go before they are copied."""

    def submit(self, work, holds, after=(), finished=None):
        return super().submit(work, [], after, None)


def on_another_stream(model, swap):
    """A step on a stream that the user made current after the lanes were made."""
    if swap is None:
        return step(model)
    cuda = swap.machinery.tier.cuda
    with cuda.stream(cuda.Stream()):
        return step(model, swap)


@pytest.mark.parametrize("lane", [WaitsInside, ReloadsTooSoon, HoldsNothing])
def test_a_lane_without_its_guard_is_caught(lane):
    assert Harness(StreamLane).right()
    assert not Harness(lane).right()


def test_a_cached_stream_is_caught():
    harness = Harness(StreamLane)
    assert harness.right() and harness.right(on_another_stream) and harness.right()
    assert Harness(CachesStream).right(), "it is right as long as nobody changes the stream"
    assert not Harness(CachesStream).right(on_another_stream)


class Greedy(PoisonedBuffers):
    """Uses memory again that somebody still has a view of."""

    def give(self, base):
        base.fill_(255)
        self._idle.append(base)


class KeepsView(torch.autograd.Function):
    """Keeps a part of what was saved until after the backward pass, as checkpointing caches do."""

    @staticmethod
    def forward(ctx, x, kept):
        y = x * 2
        ctx.save_for_backward(y)
        ctx.kept = kept
        return y.clone()

    @staticmethod
    def backward(ctx, *grads):
        (y,) = ctx.saved_tensors
        ctx.kept.append(y[:, 1:3])
        return grads[0] * 2, None


def keeps_views(model, swap):
    kept = []
    block = model.blocks[3]
    handle = block.register_forward_pre_hook(lambda module, args: (KeepsView.apply(args[0], kept),))
    x, w = data()
    model.zero_grad()
    inner = block.up.register_forward_pre_hook(lambda module, args: (KeepsView.apply(args[0], kept),))
    if swap is None:
        loss = (model(x) * w).sum()
    else:
        with swap:
            loss = (model(x) * w).sum()
    loss.backward()
    handle.remove()
    inner.remove()
    return [*gradients(model, x), *kept]


def test_a_view_of_an_unpacked_tensor_stays_what_it_was():
    assert Harness().right(keeps_views)
    assert not Harness(buffers=Greedy).right(keeps_views), "the guard is needed"


def prefetched(swap, model):
    """For each layer, from the last: which layers are back when its backward begins."""
    seen = []
    x, _ = data()
    runs = []
    with swap:
        y = model(x)
        run = swap._last() if swap._last is not None else None
        while run is not None:
            runs.append(run)
            run = run.previous() if run.previous is not None else None
    original = swap.begins

    def begins(run, itself=True):
        original(run, itself)
        seen.append({r.layer for r in runs if any(entry.loaded for entry in r._living())})

    for run in runs:
        run.begins_backward = begins
    swap.begins = begins
    y.sum().backward(retain_graph=True)  # so that nothing goes by itself
    return [layers for number, layers in enumerate(seen) if number == 0 or layers != seen[number - 1]]


def test_a_pass_without_gradients_does_not_use_up_the_warm_up(monkeypatch):
    """There is none to use up: each pass knows its own layers. Then the layer before is fetched in time."""

    def after_no_grad():
        model = Stack()
        swap = swapping(model)
        with torch.no_grad(), swap:
            model(data()[0])
        with torch.no_grad(), swap:
            model(data()[0])
        return prefetched(swap, model)

    assert {2, 3} in after_no_grad() and {0, 1} in after_no_grad()
    assert all(len(layers) <= 2 for layers in after_no_grad()), "two layers are back at a time, no more"
    monkeypatch.setattr(Run, "saved_anything", lambda run: False)
    assert not {2, 3} <= set().union(*after_no_grad()[:1] or [set()]), "without the chain nothing is fetched ahead"


def test_the_layer_below_those_that_stay_is_fetched_while_they_go_backward():
    model = Stack()
    swap = swapping(model, keep_last=2)
    assert prefetched(swap, model)[:2] == [{1}, {0, 1}]


def drops_what_it_fetched(model, swap):
    """Backward through the last layer only: the layer before was fetched for nothing."""
    model.zero_grad()
    x, w = data()
    if swap is None:
        middle = model.blocks[1](model.blocks[0](x))
        return [torch.autograd.grad((model.blocks[2](middle) * w).sum(), middle)[0]]
    with swap:
        middle = model.blocks[1](model.blocks[0](x))
        y = model.blocks[2](middle)
    found = [torch.autograd.grad((y * w).sum(), middle)[0]]
    del middle, y
    gc.collect()
    return found


def test_what_was_fetched_for_nothing_is_not_copied_into_freed_memory():
    assert Harness(layers=3, buffers=Buffers).right(drops_what_it_fetched)
    harness = Harness(HoldsNothing, layers=3, buffers=Buffers)
    assert not harness.right(drops_what_it_fetched)
    assert any("target was freed" in violation for violation in harness.cuda.violations)


class Spoils(nn.Module):
    """Changes in place what it saved."""

    def forward(self, x):
        y = x * 1
        z = y.sin()
        with torch.no_grad():
            y.mul_(2)
        return z


def test_what_is_changed_in_place_before_it_has_left_is_noticed():
    """As without swapping: the copy may have taken the old bytes, the new ones, or some of each."""
    cuda = LateCuda()
    model = nn.ModuleList([Spoils()])
    x, _ = data()
    lanes = (StreamLane(cuda), StreamLane(cuda))
    for swap in (None, swapping(model, tier=LateTier(cuda), lanes=lanes)):
        with swap or nullcontext():
            y = model[0](x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# --- threads ---------------------------------------------------------------------------------------------------------


class SlowTier:
    """Another tier, every call of which takes its time."""

    def __init__(self, tier, gate):
        self._tier, self._gate = tier, gate
        self.reserve, self.release, self.close = tier.reserve, tier.release, tier.close

    def write(self, region, source):
        self._gate.wait(0.02)
        self._tier.write(region, source)

    def read(self, region, target):
        target.fill_(255)
        self._gate.wait(0.02)
        self._tier.read(region, target)


def test_slow_threads_change_nothing():
    import threading

    from seqpar.offload.runtime.tiers import HostTier

    model = Stack(3)
    lanes = (ThreadLane("leaving"), ThreadLane("returning"))
    swap = swapping(model, HALF, tier=SlowTier(HostTier(), threading.Event()), lanes=lanes)
    for seed in range(2):
        assert same(step(model, swap, seed, batch=1, tokens=5), step(model, seed=seed, batch=1, tokens=5))


def test_at_most_two_layers_are_on_their_way():
    harness = Harness()
    x, _ = data()
    flying = []
    lane = harness.swap.machinery.leaving
    for block in harness.model.blocks:
        block.register_forward_hook(lambda *_: flying.append(sum(bool(f._holds) for f in lane._flying)))
    with harness.swap:
        y = harness.model(x)
    per_layer = len(harness.swap.saved) // 4
    assert max(flying) <= 3 * per_layer
    del y
