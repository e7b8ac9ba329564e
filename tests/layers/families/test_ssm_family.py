"""State-space and gated recurrent layers: what the battery does not see of them."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from seqpar import Cut, Shard
from seqpar.collectives import Group, Ledger, alone, run_ranks
from seqpar.collectives.group import Pending
from seqpar.layers.ssm.birdie import GatedSSM, prefixes
from seqpar.layers.ssm.mamba import Mamba
from seqpar.layers.ssm.rg_lru import RGLRU
from seqpar.layers.ssm.s4d import S4D
from seqpar.layers.ssm.s5 import S5, hippo_normal
from seqpar.layers.ssm.state_space import held
from seqpar.models import Decoder, DecoderConfig
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.relayout import relayout
from seqpar.sharding.shard import LAYOUTS
from seqpar.sharding.states import States
from tests.layers.drawn import drawn, relative
from tests.layers.oracles.oracles_ssm import gated_ssm_layer

LENGTHS = [7, 0, 1, 12]
PREFIXES = [4, 2, 1, 9]


# --- Mamba -----------------------------------------------------------------------------------------------------------


def test_mamba_starts_as_in_its_paper_and_a_decoder_keeps_that() -> None:
    config = DecoderConfig(pattern="mamba", dim=40, heads=4, vocabulary=11)
    layer = Decoder(config).blocks[0].mixer
    assert isinstance(layer, Mamba)
    assert (layer.log_a.exp() - torch.arange(1.0, 17)).abs().max() < 1e-5
    steps = functional.softplus(layer.dt_bias.detach())
    assert 0.9e-3 < steps.min() < 4e-3 and 0.03 < steps.max() < 0.101
    assert layer.dt.in_features == 3 and layer.dt.weight.abs().max() > 0.3  # 40 / 16, rounded up; not 0.02
    assert torch.equal(layer.skip, torch.ones(80))


def test_mamba_with_one_state_and_steps_of_one_sums_what_came_before() -> None:
    """With A = 0, dt = 1, B = C = 1 and no skip, ``y`` is a sum over the tokens of the document."""
    layer = Mamba(3, expand=1, state_dim=1, width=1, dt_rank=1).double()
    with torch.no_grad():
        layer.log_a.fill_(-torch.inf)
        layer.dt.weight.zero_()
        layer.dt_bias.fill_(math.log(math.e - 1))
        layer.skip.zero_()
    u = drawn(1, 5, 3).abs()
    with torch.no_grad():
        layer.conv_weight.fill_(1)
        layer.conv_bias.zero_()
        layer.selection.weight.zero_()
        layer.selection.weight[1:] = 1  # B and C are the sum of the channels
        y = layer.mix((u,), Cut.whole([3, 2]))
    v = functional.silu(u)
    weighed = v * v.sum(-1, keepdim=True)
    sums = torch.cat([weighed[:, :3].cumsum(1), weighed[:, 3:].cumsum(1)], 1) * v.sum(-1, keepdim=True)
    assert relative(y, sums) < 1e-13


# --- S4D and S5 ------------------------------------------------------------------------------------------------------


def test_s4d_is_the_long_convolution_by_fft() -> None:
    layer, x = S4D(5).double(), drawn(2, 40, 5)
    log_a, weight = held(layer.log_rate, layer.frequency, layer.log_step[:, None], torch.float64)
    c = torch.complex(*layer.c.unbind(-1))
    powers = (log_a[..., None] * torch.arange(40)).exp()
    kernel = 2 * torch.einsum("dn,dnt->td", c * weight, powers).real
    waves = torch.fft.rfft(kernel, 80, dim=0) * torch.fft.rfft(x, 80, dim=1)
    expected = torch.fft.irfft(waves, 80, dim=1)[:, :40] + layer.skip * x
    assert relative(layer.mix((x,), Cut.whole([40])), expected) < 1e-12


def test_a_small_step_loses_no_digits() -> None:
    """``(exp(z) - 1) / a`` of a step of 1e-6 in fp32 is as exact as fp32 is."""
    inputs = torch.tensor([-0.7]), torch.tensor([3.0]), torch.tensor([-14.0])
    single, double = (held(*inputs, dtype)[1] for dtype in (torch.float32, torch.float64))
    assert (single.to(double.dtype) / double - 1).abs().item() < 1e-6


def test_s5_starts_as_blocks_of_hippo() -> None:
    """The dense system ``h' = A h + B x`` with A the normal part of HiPPO-LegS, sampled by the matrix exponential."""
    torch.manual_seed(0)
    layer, size, step = S5(4, state_dim=16, blocks=2).double(), 8, 0.03
    layer.log_step.data.fill_(math.log(step))
    n = torch.arange(size, dtype=torch.float64)
    legs = torch.outer((2 * n + 1).sqrt(), (2 * n + 1).sqrt())
    a = -(legs.tril(-1) + torch.diag(n + 1)) + torch.outer((n + 0.5).sqrt(), (n + 0.5).sqrt())
    dense = torch.block_diag(a, a)
    basis = torch.block_diag(*[hippo_normal(size)[1].to(torch.complex128)] * 2)
    b = 2 * (basis @ torch.complex(layer.b[:, 0], layer.b[:, 1])).real
    c = 2 * (torch.complex(*layer.c.unbind(-1)) @ basis.mH).real
    kept = torch.linalg.matrix_exp(dense * step)
    taken = torch.linalg.solve(dense, kept - torch.eye(16, dtype=torch.float64)) @ b
    x, state, rows = drawn(1, 12, 4), torch.zeros(1, 16, dtype=torch.float64), []
    for token in x.unbind(1):
        state = state @ kept.T + token @ taken.T
        rows.append(functional.gelu(state @ c.T + layer.skip * token))
    expected = torch.stack(rows, 1)
    expected = expected * torch.sigmoid(layer.gate(expected))
    assert relative(layer(x, Cut.whole([12])), expected) < 1e-5  # its basis was made in fp32


class _Seen(Ledger):
    """A group that notes whether complex numbers were sent, which not every backend sends."""

    complex_ = False

    def all_to_all(self, sends: list[Tensor], receives: list[Tensor]) -> Pending[list[Tensor]]:
        self.complex_ |= any(x.is_complex() for x in (*sends, *receives))
        return super().all_to_all(sends, receives)


def test_complex_rows_change_layout_as_real_numbers() -> None:
    whole = torch.view_as_complex(drawn(2, 11, 3, 2)).conj()

    def body(group: Group) -> bool:
        seen = _Seen(group)
        old, new = (Shard.of([4, 7], seen, layout) for layout in ("striped", "contiguous"))
        moved = relayout(old.take(whole), old, new, seen, Slot())
        return torch.equal(moved, new.take(whole)) and not seen.complex_ and seen.bytes_ > 0

    assert run_ranks(3, body) == [True] * 3


# --- RG-LRU ----------------------------------------------------------------------------------------------------------


def test_rg_lru_starts_between_09_and_0999_and_keeps_its_width_to_heads() -> None:
    layer = RGLRU(64, 4)
    kept = torch.sigmoid(layer.decay) ** 8
    assert 0.9 <= kept.min() < 0.93 and 0.97 < kept.max() <= 0.9991
    assert layer.out.in_features == 88  # 4 / 3 of 64 is 85.3


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_rg_lru_has_finite_gradients_where_a_gate_is_shut_or_open(logit: float) -> None:
    layer = RGLRU(6, 2)
    with torch.no_grad():
        layer.gates_bias[:, : layer.gates_bias.shape[1] // 2] = logit
    x = torch.randn(1, 9, 6, requires_grad=True)
    layer(x, Cut.whole([9])).square().sum().backward()
    grads = [x.grad, *(p.grad for p in layer.parameters())]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_rg_lru_that_forgets_nothing_of_inputs_of_one_variance_keeps_it() -> None:
    """``sqrt(1 - a^2)``: whatever the decay, white noise in is noise of the same variance out."""
    layer = RGLRU(8, 2, inner_dim=8, width=1).double()
    with torch.no_grad():
        layer.gates.zero_()
        layer.gates_bias.fill_(40.0)  # both gates open
        layer.conv_weight.fill_(1)
        layer.conv_bias.zero_()
        variance = layer.mix((drawn(2, 4000, 8),), Cut.whole([4000])).var((0, 1))
    assert variance.mean().sub(1).abs() < 0.25


# --- Birdie ----------------------------------------------------------------------------------------------------------


def test_the_last_token_of_a_prefix_sees_the_first_after_it_and_no_one_sees_more() -> None:
    layer, x = GatedSSM(4, prefix=3).double(), drawn(1, 6, 4).requires_grad_()
    y = layer(x, Cut.whole([6]))
    seen = [torch.autograd.grad(row.square().sum(), x, retain_graph=True)[0][0].norm(dim=-1) > 0 for row in y[0]]
    latest = [max(t for t in range(6) if by[t]) for by in seen]
    assert latest == [3, 3, 3, 3, 4, 5]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_document_may_have_its_own_prefix(layout: str) -> None:
    torch.manual_seed(0)
    layer, x, upstream = GatedSSM(6, prefix=prefixes(PREFIXES)).double(), drawn(2, 20, 6), drawn(2, 20, 6, seed=1)
    whole = x.clone().requires_grad_()
    expected = gated_ssm_layer(layer, whole, LENGTHS, PREFIXES)
    (d_whole,) = torch.autograd.grad(expected, whole, upstream)

    def body(group: Group) -> tuple[Tensor, Tensor]:
        shard = Shard.of(LENGTHS, group, layout)
        mine = shard.take(x).clone().requires_grad_()
        y = layer(mine, Cut(shard, group))
        (d_mine,) = torch.autograd.grad(y, mine, shard.take(upstream))
        return shard.gather(y.detach()), shard.gather(d_mine)

    for y, d_x in run_ranks(3, body):
        assert relative(y, expected.detach()) < 1e-12
        assert relative(d_x, d_whole) < 1e-12


def test_a_prefix_is_refused_where_it_cannot_be_honoured() -> None:
    x = drawn(1, 4, 6)
    with pytest.raises(ValueError, match="keeps no states"):
        GatedSSM(6, prefix=2).double()(x, Cut.whole([4], States()))
    with pytest.raises(ValueError, match="prefixes of 2 documents"):
        GatedSSM(6, prefix=prefixes([1, 1])).double()(x, Cut.whole([4]))
    with pytest.raises(ValueError, match=r"bool \[4\], got torch.int64 \[4\]"):
        GatedSSM(6, prefix=lambda cut: cut.positions).double()(x, Cut.whole([4]))


def test_a_prefix_sends_half_a_state_each_way() -> None:
    def body(group: Group) -> int:
        torch.manual_seed(0)
        ledger = Ledger(group)
        shard = Shard.of([10], ledger)
        layer = GatedSSM(6, prefix=4)
        layer(torch.randn(1, shard.num_local, 6), Cut(shard, ledger, scan="ring"))
        return ledger.bytes_

    assert run_ranks(2, body) == [3 * 4, 3 * 4]


# --- all of them -----------------------------------------------------------------------------------------------------


def test_a_decoder_of_all_of_them_steps_as_it_reads() -> None:
    torch.manual_seed(0)
    config = DecoderConfig(pattern="mamba s4d s5 rg_lru birdie", vocabulary=7, dim=8, heads=2)
    model, tokens = Decoder(config).double(), torch.arange(9)[None] * 5 % 7
    expected = model(tokens, Cut.whole([9]))
    states, logits = States(), []
    for token in tokens.unbind(1):
        each, states = model.step(token, states)
        logits.append(each)
    assert relative(torch.stack(logits, 1), expected) < 1e-12


def test_states_of_bfloat16_are_fp32() -> None:
    """Ones summed up: in bfloat16 sums stop growing at 256."""
    ones = torch.ones(1, 1000, 4).bfloat16()
    h = GatedSSM(4).mix((ones, torch.zeros(1, 1000, 4)), Cut.whole([1000]))
    assert h.dtype == torch.bfloat16 and torch.equal(h[0, -1].float(), torch.full((4,), 1000.0))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Mamba(8, state_dim=0), "state_dim must be at least 1, got 0"),
        (lambda: Mamba(8, dt_rank=0), "dt_rank must be at least 1, got 0"),
        (lambda: Mamba(8, width=0), "width must be at least 1"),
        (lambda: S4D(8, state_dim=5), "must be even, got 5"),
        (lambda: S5(8, state_dim=12, blocks=4), "multiple of 2 \\* blocks, got 12 and 4 blocks"),
        (lambda: S5(8, blocks=0), "blocks must be at least 1"),
        (lambda: RGLRU(8, 3, inner_dim=8), "heads must divide inner_dim, got inner_dim=8 and heads=3"),
        (lambda: RGLRU(8, 0), "heads must be at least 1"),
        (lambda: GatedSSM(8, prefix=-1), "prefix must be at least 0 tokens"),
        (lambda: GatedSSM(7, prefix=2), "state_dim must be even, got 7"),
    ],
)
def test_what_cannot_be_built_is_refused(make, says) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_tokens_that_are_not_mine_are_refused() -> None:
    shard = Shard.of([6], alone())
    for layer in (Mamba(4), S4D(4), S5(4, state_dim=8, blocks=1), RGLRU(4, 2), GatedSSM(4)):
        with pytest.raises(ValueError, match="6 tokens"):
            layer(torch.zeros(1, 5, 4), Cut(shard, alone()))
