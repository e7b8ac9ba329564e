"""TransNormer, Mamba-2 and Liger: what is known of them beyond their equations."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar import Cut, Shard
from seqpar.collectives import Group, Ledger, alone, run_ranks
from seqpar.crossing.recurrences import selective_scan
from seqpar.layers import Block, SoftmaxAttention, SwiGLU
from seqpar.layers.entry import Sizes
from seqpar.layers.linear.catalog_decay import ENTRIES
from seqpar.layers.linear.liger import Liger
from seqpar.layers.linear.lrpe import lrpe, lrpe_angles
from seqpar.layers.linear.transnormer import TransNormer
from seqpar.layers.parts.mlp import SGLU
from seqpar.layers.parts.norm import GatedRMSNorm, SimpleRMSNorm
from seqpar.layers.ssm.mamba2 import Mamba2
from seqpar.models import Decoder, DecoderConfig
from tests.layers.drawn import drawn, loud, relative
from tests.layers.oracles.oracles_decay import liger_recurrence
from tests.oracles.recurrence import decayed_linear_attention

LENGTHS = [5, 0, 9, 1, 3]
TOKENS = sum(LENGTHS)


# --- linearised relative positions -----------------------------------------------------------------------------------


def test_lrpe_by_hand() -> None:
    x = torch.tensor([2.0, -1.0], dtype=torch.float64).view(1, 1, 1, 2)
    placed = lrpe(x, torch.tensor([3]), torch.tensor([[1.0, 0.5]], dtype=torch.float64))
    expected = [2 * math.cos(3), -math.cos(1.5), 2 * math.sin(3), -math.sin(1.5)]
    assert placed.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_lrpe_products_depend_on_the_distance_only() -> None:
    q, k = drawn(2, 1, 1, 2, 8)
    theta = lrpe_angles(2, 8)

    def product(at: int, other: int) -> Tensor:
        return (lrpe(q, torch.tensor([at]), theta) * lrpe(k, torch.tensor([other]), theta)).sum(-1)

    expected = (q * k * (4 * theta).cos()).sum(-1)
    assert relative(product(7, 3), expected) < 1e-12
    assert relative(product(1004, 1000), expected) < 1e-10
    assert relative(product(7, 4), expected) > 1e-3


def test_lrpe_angles_count_the_channels_of_all_heads() -> None:
    expected = torch.tensor([[1.0, 10.0**-2], [10.0**-4, 10.0**-6]], dtype=torch.float64)
    assert relative(lrpe_angles(2, 2, base=10.0**4), expected) < 1e-12


def test_lrpe_is_exact_far_out_in_fp32_and_rounds_once_in_bf16() -> None:
    x, far, theta = drawn(1, 1, 2, 8), torch.tensor([1_000_003]), lrpe_angles(2, 8)
    exact = torch.cat([x * (1_000_003 * theta).cos(), x * (1_000_003 * theta).sin()], -1)
    assert relative(lrpe(x.float(), far, theta).double(), exact) < 1e-6
    assert relative(lrpe(x.bfloat16(), far, theta).double(), lrpe(x.bfloat16().double(), far, theta)) < 0.004


# --- TransNormer -----------------------------------------------------------------------------------------------------


def test_only_the_first_layer_of_transnormer_has_positions() -> None:
    first, later = (TransNormer(8, 2, layer=layer, layers=3) for layer in (0, 2))
    assert isinstance(first.theta, nn.Parameter) and later.theta is None
    assert (first.positions, later.positions) == ("learned", "none")
    assert relative(first.theta.double(), lrpe_angles(2, 4)) < 1e-7


def test_fixed_positions_are_the_learned_ones_before_they_learn() -> None:
    learned = TransNormer(8, 2).double()
    fixed = TransNormer(8, 2, positions="fixed").double()
    fixed.load_state_dict({name: each for name, each in learned.state_dict().items() if name != "theta"})
    x = drawn(1, TOKENS, 8)
    assert relative(fixed(x, Cut.whole(LENGTHS)), learned(x, Cut.whole(LENGTHS))) < 1e-5  # angles started in fp32


def test_transnormer_takes_the_slopes_of_both_conventions() -> None:
    assert TransNormer(8, 2, layer=1, layers=2).log_decay == (0.0, -2.0)
    assert TransNormer(8, 1, slopes="alibi", layer=1, layers=2).log_decay == pytest.approx((-(2**-8) * 1e-5,))


def test_simple_rms_norm_is_the_norm_over_the_root_of_the_dim() -> None:
    x = drawn(3, 5)
    assert relative(SimpleRMSNorm(eps=0.0)(x), x / x.norm(dim=-1, keepdim=True) * 5**0.5) < 1e-14
    assert not list(SimpleRMSNorm().parameters())


@pytest.mark.parametrize("tile_tokens", [0, 3])
def test_sglu_has_no_activation_and_fits_into_a_block(tile_tokens: int) -> None:
    mlp, x = loud(SGLU(6, 7, tile_tokens)), drawn(2, 10, 6)
    expected = ((x @ mlp.gate.weight.T) * (x @ mlp.up.weight.T)) @ mlp.down.weight.T
    assert relative(mlp(x), expected) < 1e-13
    block = Block(6, TransNormer(6, 2), 7, mlp_tokens=tile_tokens).double()
    before = block(x, Cut.whole([10]))
    block.mlp = mlp
    assert relative(block(x, Cut.whole([10])), before) > 1e-3
    assert [n for n, _ in mlp.named_parameters()] == [n for n, _ in SwiGLU(6, 7).named_parameters()]


# --- Mamba-2 ---------------------------------------------------------------------------------------------------------


def parts_of(layer: Mamba2, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, B, C and the step sizes, for one document, by torch's own convolution."""
    xbc, width = (x @ layer.xbc.weight.T).transpose(1, 2), layer.conv_weight.shape[1]
    padded = functional.pad(xbc, (width - 1, 0))
    convolved = functional.conv1d(padded, layer.conv_weight[:, None], layer.conv_bias, groups=xbc.shape[1])
    inner, state = layer.inner, (xbc.shape[1] - layer.inner) // 2
    values, b, c = functional.silu(convolved).transpose(1, 2).split([inner, state, state], -1)
    return values, b, c, functional.softplus(x @ layer.dt.weight.T + layer.dt_bias)


def test_mamba2_is_decayed_linear_attention() -> None:
    """Queries C, keys B, values dt x, log decay dt A."""
    layer, x = loud(Mamba2(8, head_dim=4, state_dim=5)), drawn(2, 13, 8)
    values, b, c, dt = parts_of(layer, x)
    values = values.unflatten(-1, (layer.heads, -1))
    q, k = (each[:, :, None].expand(-1, -1, layer.heads, -1) for each in (c, b))
    o = decayed_linear_attention(q, k, dt[..., None] * values, -layer.log_a.exp() * dt, continues=False)[0]
    y = o + layer.skip[:, None] * values
    assert relative(layer(x, Cut.whole([13])), layer.finish(y, x)) < 1e-12


def test_mamba2_is_a_selective_scan_whose_channels_share_their_decay() -> None:
    layer, x = loud(Mamba2(8, head_dim=4, state_dim=5)), drawn(2, 13, 8)
    values, b, c, dt = parts_of(layer, x)
    a = -layer.log_a.exp().repeat_interleave(4)[:, None].expand(-1, 5)
    here = {"shard": Shard.of([13], alone()), "group": alone()}
    y = selective_scan(values, dt.repeat_interleave(4, -1), a, b, c, **here)
    y = y + layer.skip.repeat_interleave(4) * values
    assert relative(layer(x, Cut.whole([13])), layer.finish(y.unflatten(-1, (layer.heads, -1)), x)) < 1e-12


def test_groups_of_mamba2_with_equal_keys_and_queries_are_one_group() -> None:
    """Neighbouring heads share a group: only the norm, by groups, tells two groups of the same B and C from one."""
    one, two = loud(Mamba2(8, head_dim=4, state_dim=3)), Mamba2(8, head_dim=4, state_dim=3, groups=2).double()
    rows = [*range(16), *[16, 17, 18] * 2, *[19, 20, 21] * 2]  # x, then B and C twice
    state = one.state_dict()
    for name in ("xbc.weight", "conv_weight", "conv_bias"):
        state[name] = state[name][rows]
    two.load_state_dict(state)
    x, cut = drawn(2, 9, 8), Cut.whole([9])
    assert relative(two.mix(two.project(x, cut.positions), cut), one.mix(one.project(x, cut.positions), cut)) < 1e-12


def test_mamba2_begins_as_the_paper_says() -> None:
    torch.manual_seed(0)
    layer = Mamba2(256, head_dim=2, state_dim=2)
    steps, rates = functional.softplus(layer.dt_bias), layer.log_a.exp()
    assert 0.999e-3 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.1001
    assert abs(steps.log().median().item() - math.log(0.01)) < 0.5  # even in the logarithm
    assert 1 <= rates.min() < 1.5 and 15.5 < rates.max() <= 16 and abs(rates.mean().item() - 8.5) < 1
    assert layer.skip.eq(1).all() and layer.norm.weight.eq(1).all()
    sizes = Mamba2(256)
    assert (sizes.heads, sizes.inner, sizes.conv_weight.shape) == (8, 512, (512 + 2 * 128, 4))


def test_a_decoder_keeps_the_decays_of_mamba2() -> None:
    mixer = Decoder(DecoderConfig("mamba2", dim=64)).blocks[0].mixer
    assert functional.softplus(mixer.dt_bias).max() < 0.1001 and mixer.log_a.min() >= 0
    assert mixer.conv_weight.std() > 0.2


def test_gated_norm_gates_first_and_norms_every_group() -> None:
    norm, x, gate = GatedRMSNorm(6, groups=2, eps=0.0).double(), *drawn(2, 4, 6)
    norm.weight.data = drawn(6, seed=3)
    gated = x * gate / (1 + (-gate).exp())
    parts = [part / part.square().mean(-1, keepdim=True).sqrt() for part in gated.split(3, -1)]
    assert relative(norm(x, gate), torch.cat(parts, -1) * norm.weight) < 1e-13
    scaled = torch.cat([x[:, :3], 7 * x[:, 3:]], -1)
    assert relative(norm(scaled, gate), norm(x, gate)) < 1e-13  # groups do not see each other


@pytest.mark.parametrize("dim, heads, expected", [(64, 4, (32, 64)), (32, 4, (16, 32)), (2048, 16, (64, 128))])
def test_sizes_of_mamba2_in_a_decoder(dim: int, heads: int, expected: tuple[int, int]) -> None:
    (entry,) = (entry for entry in ENTRIES if entry.name == "mamba2")
    with torch.device("meta"):
        layer: Any = entry.make(Sizes(dim, heads))
    assert (layer.inner // layer.heads, (layer.conv_bias.shape[0] - layer.inner) // 2) == expected


# --- Liger -----------------------------------------------------------------------------------------------------------


def softmax_layer(**options: Any) -> Any:
    return loud(SoftmaxAttention(16, 4, kv_heads=2, key_dim=6, value_dim=5, **options))


@pytest.mark.parametrize("options", [{}, {"rope_base": None}, {"rope_base": 100.0}])
def test_half_of_liger_is_the_layer_it_is_made_of_with_a_window(options: dict[str, Any]) -> None:
    trained, x, cut = softmax_layer(**options), drawn(2, TOKENS, 16), Cut.whole(LENGTHS)
    liger = Liger.of(trained, window=4)
    half = 2 * liger(x, cut) - trained.out(liger_recurrence(liger, x, LENGTHS).flatten(-2))
    assert relative(half, softmax_layer(window=4, **options)(x, cut)) < 1e-12
    assert relative(half, softmax_layer(window=5, **options)(x, cut)) > 1e-3


def test_within_the_window_half_of_liger_is_all_of_the_layer() -> None:
    trained, x, cut = softmax_layer(), drawn(2, TOKENS, 16), Cut.whole(LENGTHS)
    liger = Liger.of(trained, window=max(LENGTHS))
    half = 2 * liger(x, cut) - trained.out(liger_recurrence(liger, x, LENGTHS).flatten(-2))
    assert relative(half, trained(x, cut)) < 1e-12


def test_liger_has_the_projections_of_softmax_attention_and_nothing_else() -> None:
    trained = softmax_layer()
    liger = Liger.of(trained)
    assert {name: id(each) for name, each in liger.named_parameters()} == {
        name: id(each) for name, each in trained.named_parameters()
    }
    assert Liger(16, 4, kv_heads=2).state_dict().keys() == SoftmaxAttention(16, 4, kv_heads=2).state_dict().keys()


def test_liger_keeps_the_shorter_window() -> None:
    assert Liger.of(softmax_layer(window=3)).window == 3
    assert Liger.of(softmax_layer(window=300)).window == 64
    assert Liger.of(softmax_layer()).window == 64


def test_liger_forgets_with_the_same_state_however_many_queries_share_it() -> None:
    """With equal queries, heads that share keys and values give the same output."""
    layer = loud(Liger(8, 4, kv_heads=2, window=3))
    rows = layer.q.weight.data.unflatten(0, (4, -1))
    rows[1], rows[3] = rows[0], rows[2]
    x = drawn(1, 9, 8)
    o = layer.mix(layer.project(x, torch.arange(9)), Cut.whole([9]))
    assert relative(o[:, :, 1], o[:, :, 0]) < 1e-14 and relative(o[:, :, 3], o[:, :, 2]) < 1e-14
    assert relative(o[:, :, 2], o[:, :, 0]) > 1e-3


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, sizes, tokens",
    [
        ("transnormer", Sizes(16, 2, layer=0, layers=2), 5),
        ("transnormer", Sizes(16, 2, layer=1, layers=2), 5),
        ("mamba2", Sizes(16, 2), 2),
        ("liger", Sizes(16, 2), 62),
        ("liger", Sizes(16, 2), 70),
    ],
)
def test_bytes_of_first_layers_and_of_shards_shorter_and_longer_than_a_window(
    name: str, sizes: Sizes, tokens: int
) -> None:
    (entry,) = (entry for entry in ENTRIES if entry.name == name)

    def body(group: Group) -> int:
        ledger, shard = Ledger(group), Shard.of([2 * tokens], group)
        with torch.no_grad():
            entry.make(sizes)(torch.randn(1, tokens, sizes.dim), Cut(shard, ledger, scan="ring"))
        return ledger.bytes_

    assert sum(run_ranks(2, body)) == entry.bytes_per_cut(sizes, tokens)


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Liger.of(SoftmaxAttention(8, 2, causal=False)), "needs causal attention"),
        (lambda: Liger(8, 2, temperature=0.0), "temperature must be above 0, got 0.0"),
        (lambda: Liger(8, 4, kv_heads=3), "kv_heads must divide heads"),
        (lambda: Liger(6, 2), "even key_dim, got 3"),
        (lambda: Mamba2(8, head_dim=5), "head_dim must divide expand . dim, got head_dim=5 and 2 . 8"),
        (lambda: Mamba2(8, head_dim=4, groups=3), "groups must divide the heads, got groups=3 and 4 heads"),
        (lambda: Mamba2(8, head_dim=4, state_dim=0), "state_dim must be at least 1, got 0"),
        (lambda: GatedRMSNorm(6, groups=4), "groups must divide dim"),
        (lambda: TransNormer(8, 2, positions="sine"), "learned, fixed, none, got 'sine'"),
        (lambda: TransNormer(8, 2, slopes="steep"), "alibi, arange, got 'steep'"),
        (lambda: TransNormer(8, 2, layer=2, layers=2), "layer must be 0 to 1"),
        (lambda: TransNormer(8, 2, base=0.0), "base must be above 0"),
        (lambda: SGLU(8, 8, -1), "tile_tokens must be 0"),
    ],
)
def test_what_does_not_fit_is_said(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
