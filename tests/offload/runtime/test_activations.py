"""Swapping changes no bit of the loss or of any gradient, whatever else happens, and leaves nothing behind."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from seqpar.offload.planning.strategies import Fractions
from seqpar.offload.runtime.activations import activations
from seqpar.offload.runtime.file_tier import FileTier
from seqpar.offload.runtime.runs import LAYER_INPUT
from seqpar.offload.runtime.tiers import HostTier
from tests.offload.runtime.models import HALF, SWAP, Stack, data, gradients, same, step, swapping


def tiers(tmp_path):
    return {"host": HostTier(), "file": FileTier(tmp_path, checksum=True)}


@pytest.fixture(params=["host", "file"])
def tier(request, tmp_path):
    made = tiers(tmp_path)[request.param]
    yield made
    made.close()


def is_clean(swap):
    gc.collect()
    return swap.machinery.tier.used == 0 and not swap._depth and not swap._leaving


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fate", [SWAP, HALF, Fractions(0.9, 0.1, 0.0), Fractions(1.0, 0.0, 0.0)])
@pytest.mark.parametrize("threads", [False, True])
def test_ten_steps_are_the_same_bit_for_bit(tier, fate, threads):
    model = Stack()
    swap = swapping(model, fate, tier=tier, **({"lanes": None} if threads else {}))
    for number in range(10):
        assert same(step(model, swap, number), step(model, seed=number))
    assert is_clean(swap)
    assert (sum(saved.swapped_bytes for saved in swap.saved) > 0) == (fate.swap > 0)


def test_the_tier_is_used_again_in_every_step(tier):
    model = Stack()
    swap = swapping(model, tier=tier)
    step(model, swap)
    size = tier.size
    for _ in range(3):
        step(model, swap)
    assert tier.size == size > 0


def test_every_length_and_batch_works_in_turn(tier):
    model = Stack()
    swap = swapping(model, HALF, tier=tier)
    for batch, tokens in [(1, 1), (3, 50), (1, 129), (2, 2), (1, 7)]:
        assert same(step(model, swap, batch=batch, tokens=tokens), step(model, batch=batch, tokens=tokens))


@pytest.mark.parametrize("keep_last", [0, 1, 3, 4, 9])
def test_the_last_layers_stay_on_the_device(keep_last):
    model = Stack()
    swap = swapping(model, keep_last=keep_last)
    assert same(step(model, swap), step(model))
    assert {saved.layer for saved in swap.saved} == set(range(max(0, 4 - keep_last)))


def test_a_layer_that_is_called_twice():
    model = Stack(2, order=[0, 1, 0, 0, 1])
    swap = swapping(model, HALF, lanes=None)
    assert same(step(model, swap), step(model))
    assert is_clean(swap)


def test_accumulation_over_forwards_before_their_backwards():
    model, swaps = Stack(), {}
    for swap in (None, swapping(model, HALF, lanes=None)):
        model.zero_grad()
        losses = []
        for seed in range(3):
            x, w = data(seed, tokens=20 + seed)
            if swap is None:
                losses.append((model(x) * w).sum())
            else:
                with swap:
                    losses.append((model(x) * w).sum())
        losses[1].backward()
        (losses[0] + losses[2]).backward()
        swaps[swap is None] = gradients(model)
    assert same(swaps[False], swaps[True])


def test_backward_twice_gives_the_same_and_needs_the_memory_once():
    model = Stack()
    x, w = data()
    (model(x) * w).sum().backward()
    expected = gradients(model, x)
    swap = swapping(model, HALF, lanes=None)
    with swap:
        loss = (model(x) * w).sum()
    for _ in range(3):
        model.zero_grad()
        x.grad = None
        loss.backward(retain_graph=True)
        assert same(gradients(model, x), expected)
        assert not swap._arrived
    del loss
    assert is_clean(swap)


def test_gradients_of_gradients():
    model, found = Stack(2), []
    for swap in (None, swapping(model, HALF)):
        model.zero_grad()
        x, w = data()
        if swap is None:
            y = model(x)
        else:
            with swap:
                y = model(x)
        (g,) = torch.autograd.grad((y * w).sum(), x, create_graph=True)
        g.square().sum().backward()
        found.append(gradients(model, x))
    assert same(*found)


class Checkpointed(Stack):
    """Every layer keeps only its input. As the bundled blocks do it: inside of the layer."""

    def __init__(self, reentrant, inside):
        super().__init__()
        self.reentrant, self.inside = reentrant, inside
        if inside:
            for block in self.blocks:
                block.forward = self.wrapped(block.forward)

    def wrapped(self, run):
        return lambda x: checkpoint(run, x, use_reentrant=self.reentrant)

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.inside else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointed_layers(reentrant, inside):
    model = Checkpointed(reentrant, inside)
    swap = swapping(model, lanes=None)
    for seed in range(2):
        assert same(step(model, swap, seed), step(model, seed=seed))
    assert is_clean(swap)
    if inside:
        assert [saved.name for saved in swap.saved] == [LAYER_INPUT] * 4, "checkpointed inputs leave, nothing else"


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_runs_again_inside_of_backward_is_let_alone(reentrant):
    model = Checkpointed(reentrant, inside=False)
    expected = step(model)
    swap = swapping(model, lanes=None)
    model.zero_grad()
    x, w = data()
    with swap:
        loss = (model(x) * w).sum()
        before = swap.saved
        loss.backward()
    assert same([loss.detach(), *gradients(model, x)], expected)
    assert swap.saved == before, "nothing leaves during backward"


# --- what may not disturb --------------------------------------------------------------------------------------------


def test_no_grad_passes_store_nothing_and_disturb_nothing():
    model = Stack()
    swap = swapping(model, HALF, lanes=None)
    expected = step(model)
    x, w = data()
    with torch.no_grad(), swap:
        model(x)
    assert swap.saved == ()
    model.zero_grad()
    with swap:
        loss = (model(x) * w).sum()
        with torch.no_grad():
            model(x)
    with torch.no_grad(), swap:
        model(x)
    loss.backward()
    assert same([loss.detach(), *gradients(model, x)], expected)


class Trips(nn.Module):
    """Fails in forward or in backward, as often as it is told to."""

    def __init__(self):
        super().__init__()
        self.forward_errors = self.backward_errors = 0

    def forward(self, x):
        if self.forward_errors:
            self.forward_errors -= 1
            raise KeyboardInterrupt if self.forward_errors else ArithmeticError("in forward")
        y = x * 1
        if self.backward_errors:
            self.backward_errors -= 1
            y.register_hook(self.fail)
        return y

    def fail(self, gradient):
        raise ArithmeticError("in backward")


class Tripping(Stack):
    def __init__(self):
        super().__init__()
        self.trip = Trips()
        self.blocks[2].down = nn.Sequential(self.blocks[2].down, self.trip)


@pytest.mark.parametrize("where", ["forward", "interrupt", "backward"])
def test_errors_leak_nothing_and_the_next_step_is_right(where, tier):
    model = Tripping()
    expected = step(model)
    swap = swapping(model, HALF, tier=tier, lanes=None)
    assert same(step(model, swap), expected)
    if where == "backward":
        model.trip.backward_errors = 1
    else:
        model.trip.forward_errors = 1 if where == "forward" else 2
    with pytest.raises((ArithmeticError, KeyboardInterrupt)):
        step(model, swap)
    model.trip.forward_errors = 0
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None, "nobody else's tensors are packed"
    assert is_clean(swap)
    assert same(step(model, swap), expected)


def test_an_unused_graph_gives_its_room_back():
    model = Stack()
    swap = swapping(model, lanes=None)
    x, _ = data()
    with swap:
        y = model(x)
    assert swap.machinery.tier.used > 0
    del y
    assert is_clean(swap)


def test_another_thread_is_let_alone():
    import threading

    model, results = Stack(), []
    swap = swapping(model)
    with swap:
        thread = threading.Thread(target=lambda: results.append(step(model)))
        thread.start()
        thread.join()
    assert same(results[0], step(model))
    assert swap.saved == ()


# --- which tensors ---------------------------------------------------------------------------------------------------


class Alone(nn.Module):
    """One layer that is a function."""

    def __init__(self, function, *parameters):
        super().__init__()
        self.function = function
        self.parameters_ = nn.ParameterList(parameters)

    def forward(self, x):
        return self.function(x, *self.parameters_)


def saved_by(function, *parameters, x=None, **options):
    model = nn.ModuleList([Alone(function, *parameters)])
    swap = swapping(model, **options)
    x = torch.randn(2, 8, 4, requires_grad=True) if x is None else x
    with swap:
        y = model[0](x)
    y.sum().backward()
    return swap.saved


def test_views_of_one_storage_leave_once():
    saved = saved_by(lambda x: (x.sin() * x.transpose(1, 2).sin().transpose(1, 2)) * x.flatten(1).cos().view_as(x))
    inputs = [row for row in saved if row.name == LAYER_INPUT]
    assert [row.swapped_bytes for row in inputs] == [2 * 8 * 4 * 4]
    assert len(saved) == len({row.name for row in saved})


def test_parameters_buffers_and_their_views_stay():
    weight = nn.Parameter(torch.randn(4, 4))
    saved = saved_by(lambda x, w: x @ w.t() @ w[:2].t() @ w.detach()[:2], weight)
    assert [(row.name, row.swapped_bytes) for row in saved] == [(LAYER_INPUT, 256), ("mixed0", 256)]


def test_small_storages_stay():
    assert saved_by(torch.sin, smallest_bytes=257) == ()
    assert len(saved_by(torch.sin, smallest_bytes=256)) == 1


def test_an_address_that_is_used_again_is_another_storage():
    """Made, saved and freed in one layer: the next tensor may get the same memory, even the same storage number."""

    def function(x):
        for _ in range(20):
            x = (x * 1.01).sin()
        return x

    model = nn.ModuleList([Alone(function)])
    swap = swapping(model)
    x = torch.randn(1, 64, 8, requires_grad=True)
    with swap:
        y = model[0](x)
    (found,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    assert torch.equal(found, expected)
    assert len(swap.saved) == 20


def test_a_storage_that_was_changed_between_two_saves_leaves_twice():
    def function(x):
        y = x * 1
        first = Save.apply(y)
        y.mul_(2)
        return first + Save.apply(y)

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y.detach())
            return y.clone()

        @staticmethod
        def backward(ctx, *grads):
            return grads[0] * ctx.saved_tensors[0]

    model = nn.ModuleList([Alone(function)])
    x = torch.randn(1, 8, 4, requires_grad=True)
    with swapping(model):
        y = model[0](x)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, x.detach() + 2 * (2 * x.detach()))


@pytest.mark.parametrize("fate", [Fractions(1.0, 0.0, 0.0), SWAP])
def test_a_kept_tensor_that_is_changed_in_place_is_noticed(fate):
    model = nn.ModuleList([Alone(lambda x: (x * 1).sin())])
    x = torch.randn(1, 8, 4, requires_grad=True)
    weight = nn.Parameter(torch.ones(4))
    model[0].function = lambda x: (x * weight).sum()
    with swapping(model, fate):
        y = model[0](x)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"Linear has no nn.ModuleList of layers"):
        activations(nn.Linear(1, 1), SWAP)
    with pytest.raises(ValueError, match="keep_last must not be negative, got -1"):
        activations(Stack(), SWAP, keep_last=-1)
    with pytest.raises(ValueError, match="smallest_bytes must be at least 1"):
        activations(Stack(), SWAP, smallest_bytes=0)
    with pytest.raises(ValueError, match="at least one saved tensor"):
        activations(Stack(), {})
    with pytest.raises(ValueError, match="shares of 'q' must be at least 0 and sum to 1"):
        activations(Stack(), {"q": Fractions(0.5, 0.0, 0.0)})
    swap = swapping(Stack())
    with swap, pytest.raises(ValueError, match="entered already"):
        swap.__enter__()


def test_names_have_their_own_shares_and_unknown_names_the_mean():
    plan = {LAYER_INPUT: Fractions(1.0, 0.0, 0.0), "mixed0": Fractions(0.0, 1.0, 0.0)}
    model = Stack(1)
    swap = swapping(model, plan)
    assert same(step(model, swap), step(model))
    rows = {row.name: row for row in swap.saved}
    assert rows[LAYER_INPUT].swapped_bytes == 0
    assert rows["mixed1"].swapped_bytes == rows["mixed1"].kept_bytes > 0
