"""DeltaNet, Gated DeltaNet, KDA and MoM: what is known of them beyond their equations."""

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqpar import Cut, Shard
from seqpar.collectives import Group, Ledger, run_ranks
from seqpar.layers.delta.delta_parts import softplus_log_decay, unit_length, write_strength
from seqpar.layers.delta.deltanet import DeltaNet
from seqpar.layers.delta.gated_deltanet import GatedDeltaNet
from seqpar.layers.delta.kda import KDA
from seqpar.layers.delta.mom import MoM
from seqpar.models import Decoder, DecoderConfig
from seqpar.sharding.states import States
from tests.layers.drawn import drawn, loud, relative
from tests.layers.rows import ROWS

# --- the parts -------------------------------------------------------------------------------------------------------


def test_keys_have_length_one_and_zero_stays_zero() -> None:
    x = drawn(3, 4)
    assert unit_length(x).norm(dim=-1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    zero = torch.zeros(2, 3, requires_grad=True)
    y = unit_length(zero)
    y.sum().backward()
    assert not y.any() and zero.grad is not None and zero.grad.isfinite().all()


def test_keys_are_normed_in_fp32() -> None:
    x = torch.tensor([300.0, 400.0], dtype=torch.float16)  # the sum of their squares is above the largest fp16
    assert unit_length(x).tolist() == pytest.approx([0.6, 0.8], rel=1e-3)


def test_how_much_is_written_by_hand() -> None:
    logits = torch.tensor([0.0, math.log(3.0)], dtype=torch.bfloat16)
    assert write_strength(logits, False).tolist() == pytest.approx([0.5, 0.75], rel=1e-2)
    assert write_strength(logits, True).tolist() == pytest.approx([1.0, 1.5], rel=1e-2)
    assert write_strength(logits, True).dtype == torch.float32


def test_decay_by_hand() -> None:
    log_a, bias = torch.tensor([math.log(2.0)]), torch.tensor([0.5])
    expected = -2 * math.log1p(math.exp(1.5))
    assert softplus_log_decay(torch.tensor([1.0]), log_a, bias).item() == pytest.approx(expected, rel=1e-6)


def test_first_decays_are_those_of_the_paper() -> None:
    layer = GatedDeltaNet(64, 16, value_heads=64)
    steps = torch.nn.functional.softplus(layer.dt_bias.detach())
    assert steps.min() >= 1e-3 * 0.999 and steps.max() <= 0.1 * 1.001
    rates = layer.log_a.detach().exp()
    assert rates.min() > 0 and rates.max() <= 16.01 and rates.max() > 8


def test_kda_forgets_no_more_than_its_bound() -> None:
    layer, x = loud(KDA(8, 2, lower_bound=-5.0), std=20.0), drawn(2, 30, 8)
    log_decay = layer.project(x, torch.arange(30))[2]
    assert log_decay.shape == (2, 30, 2, 4)
    assert log_decay.min() >= -5 and log_decay.max() <= 0 and log_decay.min() < -4.9


# --- what equals what ------------------------------------------------------------------------------------------------


def projected() -> tuple[Tensor, Tensor, Tensor]:
    """What a convolution reads (two heads of 3 and 5), beta, and log decay."""
    return drawn(2, 12, 2 * 2 * 3 + 2 * 5), drawn(2, 12, 2, seed=1).sigmoid(), -drawn(2, 12, 2, seed=2).square()


def test_without_decay_gated_deltanet_is_deltanet() -> None:
    (qkv, beta, log_decay), cut = projected(), Cut.whole([5, 7])
    plain, gated = DeltaNet(8, 2, key_dim=3, value_dim=5).double(), GatedDeltaNet(8, 2).double()
    gated.sizes, gated.conv_weight = plain.sizes, plain.conv_weight
    expected = plain.mix((qkv, beta), cut)
    assert relative(gated.mix((qkv, beta, 0 * log_decay), cut), expected) < 1e-13
    assert relative(gated.mix((qkv, beta, log_decay), cut), expected) > 0.01


def test_kda_with_one_decay_for_all_channels_is_gated_deltanet() -> None:
    (qkv, beta, log_decay), cut = projected(), Cut.whole([5, 7])
    kda, gated = KDA(8, 2, key_dim=3, value_dim=5).double(), GatedDeltaNet(8, 2).double()
    gated.sizes, gated.conv_weight = kda.sizes, kda.conv_weight
    ours = kda.mix((qkv, beta, log_decay[..., None].expand(-1, -1, -1, 3)), cut)
    assert relative(ours, gated.mix((qkv, beta, log_decay), cut)) < 1e-13


def test_a_token_written_twice_with_beta_two_flips_and_comes_back() -> None:
    layer = loud(DeltaNet(8, 1, key_dim=2, value_dim=2, width=1, negative_eigenvalues=True))
    layer.conv_weight.data.fill_(1.0)
    key, nothing, value = [1.0, 0.0], [0.0, 0.0], [3.0, 0.0]
    qkv = torch.tensor([[[*key, *key, *value], [*key, *key, *nothing], [*key, *key, *nothing]]], dtype=torch.float64)
    beta = torch.tensor([[[1.0], [2.0], [2.0]]], dtype=torch.float64)
    first, flipped, again = layer.mix((qkv, beta), Cut.whole([3]))[0, :, 0]
    assert first[0] > 1
    assert relative(flipped, -first) < 1e-5 and relative(again, first) < 1e-5  # keys are of length 1 - 1e-6


def test_value_heads_share_the_keys_of_their_group() -> None:
    layer, cut = loud(GatedDeltaNet(8, 2, value_heads=4, key_dim=3)), Cut.whole([9])
    qkv, beta, log_decay = layer.project(drawn(1, 9, 8), cut.positions)
    whole = layer.mix((qkv, beta, log_decay), cut)
    keys = qkv[..., : 2 * 2 * 3].clone()
    keys[..., [0, 1, 2, 6, 7, 8]] = 0.0  # queries and keys of the first head
    without = layer.mix((torch.cat([keys, qkv[..., 12:]], -1), beta, log_decay), cut)
    assert not without[:, :, :2].any() and relative(without[:, :, 2:], whole[:, :, 2:]) < 1e-14


# --- mixture of memories ---------------------------------------------------------------------------------------------


def test_one_memory_is_gated_deltanet() -> None:
    gated, mom = loud(GatedDeltaNet(8, 2, key_dim=3)), loud(MoM(8, 2, memories=1, top_k=1, shared=False, key_dim=3))
    for name in ("beta", "decay", "gate", "out", "norm", "log_a", "dt_bias", "conv_weight"):
        setattr(mom, name, getattr(gated, name))
    mom.q.weight.data, mom.kv.weight.data = gated.qkv.weight.data.split([6, 18])
    x, cut = drawn(2, 12, 8), Cut.whole([7, 5])
    assert relative(mom(x, cut), gated(x, cut)) < 1e-13


def test_memories_do_not_see_each_other() -> None:
    """Two memories take turns: what one's tokens say changes nothing for the other's, in this sequence or the next."""
    layer = loud(MoM(8, 2, memories=2, top_k=1, shared=False, key_dim=3))
    layer.router.weight.data.zero_()[:, 0] = torch.tensor([9.0, -9.0], dtype=torch.float64)
    x = drawn(2, 12, 8)
    x[:, ::2, 0], x[:, 1::2, 0] = 1.0, -1.0
    x.requires_grad_()
    (d_x,) = torch.autograd.grad(layer(x, Cut.whole([12]))[0, 9].sum(), x)
    assert d_x[0, 1:10:2].abs().amin(0).amax() > 1e-8 and d_x[0, 1:10:2].any(-1).all()
    assert not d_x[0, ::2].any() and not d_x[0, 10:].any() and not d_x[1].any()


def balance_of(group: Group, layout: str, lengths: list[int]) -> tuple[Tensor, Tensor]:
    layer, shard = loud(MoM(8, 2, memories=3)), Shard.of(lengths, group, layout)
    loss = layer.balance(shard.take(drawn(2, sum(lengths), 8)), Cut(shard, group))
    loss.backward()
    return loss.detach(), group.all_reduce(layer.router.weight.grad).wait()


def expected_balance(lengths: list[int]) -> tuple[Tensor, Tensor]:
    layer, x = loud(MoM(8, 2, memories=3)), drawn(2, sum(lengths), 8)
    shares = torch.stack([(row @ layer.router.weight.T).exp() for row in x.flatten(0, 1)])
    shares = shares / shares.sum(-1, keepdim=True)
    fallen = [sum(float(memory != row.argmin()) for row in shares) for memory in range(3)]  # the best two of three
    loss = 3 * sum(f / (2 * len(shares)) * p for f, p in zip(fallen, shares.mean(0)))
    loss.backward()
    return loss.detach(), layer.router.weight.grad


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_balance_multiplies_sums_over_all_ranks(layout: str) -> None:
    expected, gradient = expected_balance([7, 0, 4])
    for size in (1, 3, 12):
        for loss, d_router in run_ranks(size, balance_of, layout, [7, 0, 4]):
            assert relative(loss, expected) < 1e-13 and relative(d_router, gradient) < 1e-12


def test_balance_is_one_if_all_are_used_alike_and_more_if_not() -> None:
    layer = loud(MoM(4, 1, memories=4, top_k=1))
    layer.router.weight.data = 30 * torch.eye(4, dtype=torch.float64)
    alike, alone = torch.eye(4, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64)[[0, 0, 0, 0]][None]
    assert layer.balance(alike, Cut.whole([4])).item() == pytest.approx(1.0, rel=1e-9)
    assert layer.balance(alone, Cut.whole([4])).item() == pytest.approx(4.0, rel=1e-9)
    assert layer.balance(alone[:, :0], Cut.whole([])).item() == 0


# --- chunks that hold several documents ------------------------------------------------------------------------------

CHUNKS = [[6, 0, 4], [3, 5, 1], [2], [0], [9, 2, 0], [4]]  # each chunk's first document continues the last one before
DOCUMENTS = [6, 0, 7, 5, 12, 2, 4]
NAMES = ["gated deltanet", "kda", "mom", "mom, one of two, none shared"]


@cache
def layer_of(name: str) -> nn.Module:
    """Called before there are ranks: threads share one random state."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return loud(ROWS[name].make())


def in_chunks(group: Group, name: str, layout: str) -> tuple[Tensor, ...]:
    layer, states = copy.deepcopy(layer_of(name)), States()
    x, upstream = drawn(2, 36, 8), drawn(2, 36, 8, seed=1)
    mine, ends, outputs = [], [], []
    sizes = [sum(lengths) for lengths in CHUNKS]
    for lengths, part, d_y in zip(CHUNKS, x.split(sizes, 1), upstream.split(sizes, 1)):
        shard = Shard.of(lengths, group, layout)
        mine.append((shard, shard.take(part).clone().requires_grad_()))
        ends.append((layer(mine[-1][1], Cut(shard, group, states=states)), shard.take(d_y)))
        outputs.append(shard.gather(ends[-1][0].detach()))
        states = states.next(lengths[-1])
    torch.autograd.backward([y for y, _ in ends], [d_y for _, d_y in ends])
    d_x = [shard.gather(torch.zeros_like(each) if each.grad is None else each.grad) for shard, each in mine]
    grads = [group.all_reduce(each.grad).wait() for each in layer.parameters() if each.grad is not None]
    return torch.cat(outputs, 1), torch.cat(d_x, 1), *grads


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_several_documents(name: str, layout: str) -> None:
    layer, x = copy.deepcopy(layer_of(name)), drawn(2, 36, 8).requires_grad_()
    y = ROWS[name].oracle(layer, x, DOCUMENTS)
    y.backward(drawn(2, 36, 8, seed=1))
    expected = [y.detach(), x.grad, *(each.grad for each in layer.parameters() if each.grad is not None)]
    for size in (1, 3):
        for outcome in run_ranks(size, in_chunks, name, layout):
            assert len(outcome) == len(expected)
            assert max(relative(ours, theirs, floor=1e-3) for ours, theirs in zip(outcome, expected)) < 1e-11


# --- in a decoder, and what does not fit -----------------------------------------------------------------------------


def test_a_decoder_of_all_four_is_cut_checkpointed_and_run_token_by_token() -> None:
    config = DecoderConfig(pattern="deltanet gated_deltanet kda mom", vocabulary=11, dim=16, heads=2, checkpoint=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Decoder(config).double()
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    whole, states, steps = model(tokens, Cut.whole([9])).detach(), States(), []
    with torch.no_grad():
        for token in tokens.unbind(1):
            logits, states = model.step(token, states)
            steps.append(logits)
    assert relative(torch.stack(steps, 1), whole) < 1e-12

    def body(group: Group) -> Tensor:
        shard = Shard.of([9], group, "zigzag")
        return shard.gather(copy.deepcopy(model)(shard.take(tokens), Cut(shard, group)).detach())

    assert all(relative(logits, whole) < 1e-12 for logits in run_ranks(2, body))


@pytest.mark.parametrize("name", ["gated deltanet", "kda", "mom"])
def test_a_chain_sends_no_matrix(name: str) -> None:
    """The same numbers, but a gather sends a matrix per head (and memory) besides its state, to every rank."""
    sizes: Any = layer_of(name).sizes
    heads = sizes.values * (4 if name == "mom" else 1)

    def body(group: Group) -> list[int]:
        sent = []
        for scan in ("ring", "all_gather"):
            ledger = Ledger(group)
            shard = Shard.of([20], ledger)
            with torch.no_grad():
                layer_of(name)(shard.take(drawn(2, 20, 8)), Cut(shard, ledger, scan=scan))
            sent.append(ledger.bytes_)
        return sent

    chain, gathered = (sum(sent) for sent in zip(*run_ranks(2, body)))
    state = 2 * heads * sizes.key_dim * sizes.value_dim * 8
    matrix = 2 * heads * sizes.key_dim**2 * 8
    assert gathered - chain == 2 * (state + matrix) - state


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: DeltaNet(8, 3), "heads must divide dim, got dim=8 and heads=3"),
        (lambda: DeltaNet(8, 2, width=0), "width must be at least 1, got 0"),
        (lambda: GatedDeltaNet(8, 2, value_heads=3), "value_heads must be a multiple of heads, got 3 and 2"),
        (lambda: GatedDeltaNet(8, 2, key_dim=0), "key_dim must be at least 1, got 0"),
        (lambda: KDA(8, 2, lower_bound=0.0), "at least -5 and below 0, got 0.0"),
        (lambda: KDA(8, 2, lower_bound=-5.5), "at least -5 and below 0, got -5.5"),
        (lambda: MoM(8, 2, memories=2, top_k=3), "top_k must be at most memories"),
        (lambda: MoM(8, 2, memories=257), "those 256, got 2 and 257"),
        (lambda: MoM(8, 2, top_k=0), "top_k must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_said(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
