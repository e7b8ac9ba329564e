"""The parts that layers share: decay slopes, rotary positions, norms, blocks."""

import math

import pytest
import torch
from torch import Tensor

from seqpar import Cut, Shard
from seqpar.collectives import alone
from seqpar.layers import Block, LinearAttention, RMSNorm, SoftmaxAttention, SwiGLU, decay_slopes, rotary
from seqpar.layers.linear.lightning_attention import constant_decay
from seqpar.layers.linear.retention import retention_log_decay


def test_alibi_slopes_of_four_heads() -> None:
    # 2^-2, 2^-4, 2^-6, 2^-8 in the first layer, next to nothing in the last.
    expected = [0.25, 0.0625, 0.015625, 0.00390625]
    assert decay_slopes("alibi", 4, 0, 3) == pytest.approx([slope * 1.00001 for slope in expected], rel=1e-12)
    assert decay_slopes("alibi", 4, 1, 3) == pytest.approx([slope * 0.50001 for slope in expected], rel=1e-12)
    assert decay_slopes("alibi", 4, 2, 3) == pytest.approx([slope * 1e-5 for slope in expected], rel=1e-9)


def test_alibi_slopes_of_six_heads() -> None:
    # ALiBi: those of four heads, then every other one of eight: 2^-1, 2^-3.
    expected = [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    assert decay_slopes("alibi", 6, 0, 2) == pytest.approx([slope * 1.00001 for slope in expected], rel=1e-12)


def test_alibi_slopes_of_a_single_layer() -> None:
    assert decay_slopes("alibi", 1, 0, 1) == pytest.approx([2**-8 * 1.00001])


def test_arange_slopes() -> None:
    assert decay_slopes("arange", 4, 0, 2) == (0.0, 2.0, 4.0, 6.0)
    assert decay_slopes("arange", 4, 1, 2) == (0.0, 1.0, 2.0, 3.0)
    assert decay_slopes("arange", 16, 3, 4)[15] == pytest.approx(15 / 8)


def test_retention_decays() -> None:
    # 1 - 1/32, 1 - 1/64, 1 - 1/128
    assert [math.exp(decay) for decay in retention_log_decay(3)] == pytest.approx([0.96875, 0.984375, 0.9921875])


def test_constant_decays_are_not_rounded_to_the_models_dtype() -> None:
    decay = constant_decay(retention_log_decay(8), torch.zeros(1, dtype=torch.bfloat16))
    assert decay.dtype == torch.float32
    assert constant_decay((0.1,), torch.zeros(1, dtype=torch.float64)).item() == 0.1


def test_rotary_restarts_in_every_document() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 7, 2, 6, dtype=torch.float64)
    both = torch.cat([x[:, :4], x[:, :3]], 1)
    positions = Shard.of([4, 0, 3], alone()).positions
    assert positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    turned = rotary(both, positions)
    assert torch.equal(turned[:, 4:], turned[:, :3])
    assert torch.equal(turned[:, 0], both[:, 0])


def test_rotary_products_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(at: int, other: int) -> Tensor:
        return (rotary(q, torch.tensor([at])) * rotary(k, torch.tensor([other]))).sum()

    assert torch.allclose(product(7, 3), product(1004, 1000), rtol=1e-10)
    assert not torch.allclose(product(7, 3), product(7, 4), rtol=1e-3)


def test_rotary_by_hand() -> None:
    x = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=torch.float64).view(1, 1, 1, 4)
    # Channels 0 and 2 turn by 3, channels 1 and 3 by 3 * 100^(-1/2).
    expected = [math.cos(3), -2 * math.sin(0.3), math.sin(3), 2 * math.cos(0.3)]
    assert rotary(x, torch.tensor([3]), base=100.0).flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_rotary_is_exact_far_out_in_fp32() -> None:
    torch.manual_seed(0)
    x, positions = torch.randn(1, 3, 1, 64), torch.tensor([999_983, 1_000_003, 16_000_057])
    error = (rotary(x, positions).double() - rotary(x.double(), positions)).norm() / x.norm()
    assert error < 1e-6


def test_rms_norm_and_swiglu_by_hand() -> None:
    x = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    norm = RMSNorm(2, eps=0.0).double()
    assert norm(x).tolist()[0] == pytest.approx([3 / math.sqrt(12.5), -4 / math.sqrt(12.5)])
    mlp = SwiGLU(1, 1).double()
    for parameter, value in zip((mlp.gate.weight, mlp.up.weight, mlp.down.weight), (2.0, 3.0, 5.0)):
        torch.nn.init.constant_(parameter, value)
    assert mlp(torch.ones(1, 1, dtype=torch.float64)).item() == pytest.approx(5 * 3 * 2 / (1 + math.exp(-2)))


@pytest.mark.parametrize("make", [LinearAttention, SoftmaxAttention])
def test_checkpointing_changes_no_bit(make: type) -> None:
    torch.manual_seed(0)
    block = Block(8, make(8, 2), 12).double()
    x, upstream = torch.randn(2, 1, 9, 8, dtype=torch.float64)
    grads = []
    for checkpoint in (False, True):
        block.checkpoint = checkpoint
        x = x.detach().requires_grad_()
        grads.append(torch.autograd.grad(block(x, Cut.whole([4, 5])), [x, *block.parameters()], upstream))
    assert all(torch.equal(plain, again) for plain, again in zip(*grads))
