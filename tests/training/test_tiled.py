"""A few tokens at a time: the same numbers, and never more than a tile of what lies between."""

import copy

import pytest
import torch
from torch import nn

from seqpar import Shard, next_token_loss, run_plan, sequence_parallel
from seqpar.collectives import alone, run_ranks
from seqpar.layers.parts.mlp import SwiGLU
from seqpar.models import HybridConfig, HybridLM
from seqpar.offload import Fractions
from seqpar.training.loss import tiled_next_token_loss
from seqpar.training.tiled import tiled
from tests.cutting import LAYOUTS, cut, tensors
from tests.plans import any_plan

LENGTHS = [5, 0, 1, 17, 3]


class Widest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("tokens", [1, 3, 7, 26, 100])
def test_a_feed_forward_part_in_tiles(tokens):
    torch.manual_seed(0)
    mlp = SwiGLU(6, 40).double()
    x, upstream = tensors(1, (2, 26, 6), (2, 26, 6))
    results = []
    for run in (mlp, lambda x: torch.cat(tiled(mlp, x, tokens=tokens), 1)):
        mine = x.clone().requires_grad_()
        mlp.zero_grad()
        y = run(mine)
        y.backward(upstream)
        results.append([y.detach(), mine.grad, *(p.grad for p in mlp.parameters())])
    for whole, tile in zip(*results):
        assert (whole - tile).norm() <= 1e-13 * whole.norm()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("swap", [None, Fractions(0.5, 0.5, 0.0), Fractions(0.2, 0.4, 0.4)])
def test_a_model_with_tiled_feed_forward_parts(checkpoint, swap):
    """Beside checkpointing and swapping, and on two ranks."""
    config = {"vocabulary": 50, "dim": 64, "layers": 3, "heads": 2, "softmax_every": 2, "checkpoint": checkpoint}
    plain = HybridLM(HybridConfig(**config)).double()
    tile = HybridLM(HybridConfig(**config, mlp_tokens=50)).double()
    tile.load_state_dict(plain.state_dict())
    lengths = [50, 0, 1, 350, 40]
    tokens = torch.randint(50, (1, sum(lengths)), generator=torch.Generator().manual_seed(5))

    def gradients(group, model, swap):
        model = sequence_parallel(copy.deepcopy(model), group=group, swap=swap)
        model(tokens, labels=tokens, lengths=lengths).loss.backward()
        assert swap is None or sum(each.swapped_bytes for each in model.swap._swaps[0].saved) > 0
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradients(alone(), plain, None)
    for got in run_ranks(2, gradients, tile, swap):
        assert (got - expected).norm() <= 1e-12 * expected.norm()


def head():
    """The same on every rank; ranks as threads share the global generator."""
    last = nn.Linear(6, 50, bias=False).double()
    last.weight.data = 0.3 * tensors(7, (50, 6))[0]
    return last


def labels_of(num_tokens):
    labels = torch.randint(50, (2, num_tokens), generator=torch.Generator().manual_seed(1))
    return labels.masked_fill(labels < 5, -100)


def losses(group, layout, tokens, dtype=torch.float64):
    """(whole, tiled): each the loss, my part of x's gradient, and the head's."""
    shard = cut(LENGTHS, group, layout)
    (x,) = tensors(3, (2, sum(LENGTHS), 6), dtype=dtype)
    found = []
    for tile in (None, tokens):
        mine, last = shard.take(x).clone().requires_grad_(), head().to(dtype)
        where = {"shard": shard, "group": group}
        labels = labels_of(sum(LENGTHS))
        if tile is None:
            loss = next_token_loss(last(mine), labels, **where)
        else:
            loss = tiled_next_token_loss(mine, last, labels, tokens=tile, **where)
        loss.backward()
        found.append((loss.detach(), mine.grad, last.weight.grad))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_in_tiles_on_any_ranks(size, layout):
    """Some ranks have no token at all, others less than a tile."""
    for tokens in (1, 4, 64):
        for whole, tile in run_ranks(size, losses, layout, tokens):
            for expected, got in zip(whole, tile):
                assert (expected - got).norm() <= 1e-13 * expected.norm().clamp(min=1e-3)


def test_parts_of_a_batch_are_divided_by_the_whole():
    x, labels = tensors(3, (1, 9, 6))[0], torch.arange(9).unsqueeze(0)
    shard = Shard.of([4, 5], alone())
    half, whole = (
        tiled_next_token_loss(x, head(), labels, tokens=2, shard=shard, group=alone(), divisor=divisor)
        for divisor in (14, None)
    )
    assert half.item() == pytest.approx(whole.item() / 2, rel=1e-14)


def test_all_logits_are_never_there():
    """Not in forward and not in backward, where the head's weight is the largest tensor that remains."""
    num_tokens, vocabulary = 512, 300
    x, last = torch.randn(1, num_tokens, 8, requires_grad=True), nn.Linear(8, vocabulary)
    labels = torch.randint(vocabulary, (1, num_tokens))
    where = {"shard": Shard.of([num_tokens], alone()), "group": alone()}
    with Widest() as tiles:
        tiled_next_token_loss(x, last, labels, tokens=16, **where).backward()
    with Widest() as all_at_once:
        next_token_loss(last(x), labels, **where).backward()
    assert all_at_once.numel == num_tokens * vocabulary
    assert tiles.numel <= max(16 * vocabulary, num_tokens * 8)


def test_without_gradients_nothing_is_kept():
    x = torch.randn(1, 8, 4)
    with torch.no_grad():
        parts = tiled(torch.exp, x, tokens=3)
    assert [part.shape[1] for part in parts] == [3, 3, 2]
    assert torch.equal(torch.cat(parts, 1), x.exp())


def test_what_does_not_fit_is_refused():
    where = {"shard": Shard.of([4], alone()), "group": alone()}
    with pytest.raises(ValueError, match="tiles of at least 1 token, got 0"):
        tiled_next_token_loss(torch.zeros(1, 4, 6), head(), torch.zeros(1, 4, dtype=int), tokens=0, **where)
    with pytest.raises(ValueError, match=r"x must be \[batch, 4, dim\], got \[1, 3, 6\]"):
        tiled_next_token_loss(torch.zeros(1, 3, 6), head(), torch.zeros(1, 4, dtype=int), tokens=2, **where)
    with pytest.raises(ValueError, match=r"labels must be \[batch, 4\], unshifted, got \[1, 3\]"):
        tiled_next_token_loss(torch.zeros(1, 4, 6), head(), torch.zeros(1, 3, dtype=int), tokens=2, **where)


def trained(group, loss_tokens, sync_gradients=True):
    """Loss, logits and gradients of one step of a bundled model."""
    model = sequence_parallel(
        copy.deepcopy(MODEL), group=group, layout="zigzag", sync_gradients=sync_gradients, loss_tokens=loss_tokens
    )
    labels = labels_of(sum(LENGTHS))
    out = model(labels.clamp(min=0), labels=labels, lengths=LENGTHS)
    out.loss.backward()
    return out.loss.item(), out.logits, torch.cat([p.grad.flatten() for p in model.parameters()])


with torch.random.fork_rng():
    torch.manual_seed(0)  # the same weights in every process
    MODEL = HybridLM(HybridConfig(vocabulary=50, dim=16, layers=2, heads=2, softmax_every=2)).double()


@pytest.mark.spmd(1, 2, 3)
@pytest.mark.parametrize("sync_gradients", [True, False])
def test_the_decorator_never_holds_all_logits(group, sync_gradients):
    loss, logits, expected = trained(group, 0, sync_gradients)
    tiled_loss, none, got = trained(group, 4, sync_gradients)
    assert logits is not None and none is None
    assert tiled_loss == pytest.approx(loss, rel=1e-13)
    assert (got - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.spmd(3)
def test_planned_steps_in_tiles(group):
    labels = labels_of(26)
    lengths = [5, 1, 17, 3]
    found = []
    for loss_tokens in (0, 2):
        model = sequence_parallel(copy.deepcopy(MODEL), group=group, loss_tokens=loss_tokens)
        plan = any_plan(lengths, group.size, 4)
        loss = run_plan(model, plan, labels.clamp(min=0), labels=labels, lengths=lengths)
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-13)
    assert (found[1][1] - found[0][1]).norm() <= 1e-12 * found[0][1].norm()


def test_models_without_hidden_and_head_are_refused():
    class Headless(torch.nn.Module):
        def forward(self, tokens, cut):
            return tokens

    model = sequence_parallel(Headless(), group=alone(), loss_tokens=3)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"loss_tokens needs a model with a head"):
        model(tokens, labels=tokens)
    with pytest.raises(ValueError, match="tile_tokens must be 0"):
        SwiGLU(4, 8, -1)
    with pytest.raises(ValueError, match="loss_tokens must be 0"):
        sequence_parallel(SwiGLU(4, 8), group=alone(), loss_tokens=-1)
