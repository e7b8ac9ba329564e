"""Token-wise parts that run again for the last tokens give what they gave for all, and wrong ones are refused."""

import pytest
import torch
from torch import nn

from seqpar.offload.planning.strategies import Fractions
from seqpar.offload.runtime.runs import BLOCK
from seqpar.offload.runtime.saved import Buffers, View, users
from tests.offload.runtime.models import AGAIN, MIXED, SWAP, data, gradients, same, swapping


class Layer(nn.Module):
    """Two token-wise parts around a running mean; what ``before`` returns is used in both."""

    def __init__(self, dim):
        super().__init__()
        self.first, self.last = nn.Linear(dim, 3 * dim), nn.Linear(2 * dim, dim)
        self.token_wise = lambda name, function, inputs: function(slice(None), *inputs)
        self.calls, self.spoil = [], None

    def before(self, rows, x):
        self.calls.append(("before", x.shape[1]))
        a, b, c = self.first(x).chunk(3, -1)
        return a.sigmoid() * b, c.tanh()

    def after(self, rows, x, mean, gate):
        self.calls.append(("after", x.shape[1]))
        y = x + self.last(torch.cat([mean * gate, mean.exp()], -1)).sin()
        return (y if self.spoil is None else self.spoil(y),)

    def forward(self, x):
        steps = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        values, gate = self.token_wise("before", self.before, (x,))
        mean = torch.cumsum(values, 1) / steps
        return self.token_wise("after", self.after, (x, mean, gate))[0]


class Stack(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList(Layer(dim) for _ in range(3))
        self.double()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def step(model, swap=None, backwards=1, **sizes):
    x, w = data(**sizes)
    for block in model.blocks:
        block.calls.clear()
        block.token_wise = swap.token_wise if swap else (lambda name, function, inputs: function(slice(None), *inputs))
    if swap is None:
        loss = (model(x) * w).sum()
    else:
        with swap:
            loss = (model(x) * w).sum()
    for left in reversed(range(backwards)):
        model.zero_grad()
        x.grad = None
        loss.backward(retain_graph=left > 0)
    return [loss.detach(), *gradients(model, x)]


def close(found, expected):
    return all((a - b).norm() <= 1e-12 * b.norm() for a, b in zip(found, expected))


@pytest.mark.parametrize("fate", [AGAIN, MIXED, Fractions(0.0, 0.3, 0.7), Fractions(0.5, 0.0, 0.5)])
@pytest.mark.parametrize("sizes", [{"batch": 1, "tokens": 300}, {"batch": 3, "tokens": 130}, {"batch": 2, "tokens": 1}])
@pytest.mark.parametrize("lanes", ["threads", "at once"])
def test_some_of_the_tokens_again(fate, sizes, lanes):
    model = Stack()
    swap = swapping(model, fate, **({"lanes": None} if lanes == "threads" else {}))
    for _ in range(3):
        assert close(step(model, swap, **sizes), step(model, **sizes))
    if sizes["tokens"] > 1:
        assert sum(row.recomputed_bytes for row in swap.saved) > 0


def test_all_tokens_again_are_the_same_bits():
    model = Stack()
    assert same(step(model, swapping(model, AGAIN), tokens=200), step(model, tokens=200))


def test_every_part_runs_again_once_and_for_the_last_tokens_only():
    model = Stack()
    step(model, swapping(model, MIXED), tokens=300)
    tail = 300 - (300 - 150) // BLOCK * BLOCK
    for block in model.blocks:
        assert block.calls == [("before", 300), ("after", 300), ("before", tail), ("after", tail)]


def test_a_second_backward_runs_them_again():
    model = Stack()
    swap = swapping(model, MIXED)
    expected = step(model, tokens=300)
    assert close(step(model, swap, backwards=3, tokens=300), expected)
    assert len(model.blocks[0].calls) == 2 + 3 * 2


def test_without_tokens_to_compute_nothing_runs_again():
    model = Stack()
    step(model, swapping(model, SWAP), tokens=300)
    assert all(block.calls == [("before", 300), ("after", 300)] for block in model.blocks)


def test_shares_by_name():
    """Different tensors of a part are computed again for different numbers of tokens."""
    model = Stack()
    names = {row.name for row in _saved(model, AGAIN)}
    plan = {name: Fractions(0.0, 1 - share / 4, share / 4) for share, name in enumerate(sorted(names)[:5])}
    swap = swapping(model, plan)
    assert close(step(model, swap, tokens=400), step(model, tokens=400))
    assert len({row.recomputed_bytes / (row.swapped_bytes + row.recomputed_bytes) for row in swap.saved}) >= 4


def _saved(model, fate):
    swap = swapping(model, fate)
    step(model, swap, tokens=300)
    return swap.saved


def test_layer_inputs_and_what_mixes_tokens_are_swapped_not_computed_again():
    rows = _saved(Stack(), AGAIN)
    assert {row.name.split(".")[0].rstrip("0123456789") for row in rows} == {"layer_input", "mixed", "before", "after"}
    for row in rows:
        again = row.name.startswith(("before", "after"))
        assert (row.recomputed_bytes > 0, row.swapped_bytes > 0) == (again, not again), row


def test_a_dim_as_long_as_the_tokens_leaves_no_doubt():
    """Which of the two are the tokens cannot be told, so it is swapped; 24 is the dim of the first product."""
    model = Stack()
    for tokens in (8, 16, 24):
        assert same(step(model, swapping(model, AGAIN), tokens=tokens), step(model, tokens=tokens))


# --- parts that are not token-wise -----------------------------------------------------------------------------------


def test_a_part_that_saves_other_tensors_the_second_time_is_refused():
    model = Stack()
    layer = model.blocks[1]
    layer.spoil = lambda y: y.sin() if y.shape[1] == 300 else y.sin().cos()
    with pytest.raises(RuntimeError, match=r"segment 'after' saved \d+ tensors in forward and \d+ when it ran again"):
        step(model, swapping(model, MIXED), tokens=300)


def test_a_part_that_gives_other_shapes_is_refused():
    model = Stack()
    layer = model.blocks[1]

    def spoil(y):
        return y.sin() if y.shape[1] == 300 else y.repeat(1, 2, 1).sin()[:, : y.shape[1]]

    layer.spoil = spoil
    with pytest.raises(RuntimeError, match="the segment is not token-wise"):
        step(model, swapping(model, MIXED), tokens=300)


# --- the small pieces ------------------------------------------------------------------------------------------------


def test_views_come_back_with_their_strides():
    whole = torch.randn(2, 10, 4, 6)
    base = torch.empty(0, dtype=torch.uint8).set_(whole.untyped_storage()).clone()
    for view in (whole, whole.transpose(1, 2), whole[..., 3:], whole[:, ::2], whole[1]):
        again = View.of(view).on(base)
        assert torch.equal(again, view) and again.stride() == view.stride()


@pytest.mark.parametrize(
    ("view", "dim"),
    [
        (lambda x: x, 1),
        (lambda x: x.transpose(1, 2), 2),
        (lambda x: x.flatten(2).flatten(0, 1), 0),
        (lambda x: x.flatten(2).flatten(0, 1).t(), 1),
        (lambda x: x[..., 3:], 1),
        (lambda x: x[:, ::2], None),
        (lambda x: x.transpose(1, 2).contiguous(), None),
        (lambda x: x.flatten(2).transpose(1, 2).contiguous(), None),
    ],
)
def test_where_the_tokens_are(view, dim):
    x = view(torch.randn(2, 10, 4, 6))
    assert View.of(x).token_dim(2, 10, x.untyped_storage().nbytes() // 20) == dim


def test_memory_is_used_again_only_if_nobody_looks_at_it():
    buffers, device = Buffers(), torch.device("cpu")
    base = buffers.take(100, device)
    address, view = base.data_ptr(), base[3:5]
    assert users(base) == 2
    buffers.give(base)
    assert buffers.take(100, device).data_ptr() != address
    del view
    buffers.give(base)
    del base
    assert buffers.take(100, device).data_ptr() == address
    buffers.clear()
    assert buffers._idle == []
