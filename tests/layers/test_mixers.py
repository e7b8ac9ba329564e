"""Every layer computes its paper's equations, on packed documents, forward and backward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqpar import Cut
from seqpar.layers import GLA, LightningAttention, LinearAttention, Retention, SoftmaxAttention
from tests.layers import mixers
from tests.layers.drawn import relative

LENGTHS = [5, 0, 9, 1, 3]

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "softmax": (lambda: SoftmaxAttention(16, 4), mixers.softmax_attention_layer),
    "softmax, grouped queries, window": (
        lambda: SoftmaxAttention(16, 4, kv_heads=2, window=3, key_dim=6, value_dim=5),
        mixers.softmax_attention_layer,
    ),
    "softmax, not causal, no positions": (
        lambda: SoftmaxAttention(12, 3, kv_heads=1, causal=False, rope_base=None, key_dim=5),
        mixers.softmax_attention_layer,
    ),
    "linear, silu": (lambda: LinearAttention(16, 4, feature_map="silu"), mixers.linear_attention_layer),
    "linear, elu plus one": (
        lambda: LinearAttention(16, 2, key_dim=3, value_dim=5),
        mixers.linear_attention_layer,
    ),
    "linear, normaliser": (
        lambda: LinearAttention(16, 4, normaliser=True),
        mixers.linear_attention_layer,
    ),
    "linear, identity": (lambda: LinearAttention(16, 4, feature_map="identity"), mixers.linear_attention_layer),
    "lightning, alibi": (
        lambda: LightningAttention(16, 2, layer=1, layers=3, value_dim=6),
        partial(mixers.lightning_attention_layer, slopes=[0.0625 * 0.50001, 0.00390625 * 0.50001]),
    ),
    "lightning, arange": (
        lambda: LightningAttention(16, 4, layer=1, layers=4, slopes="arange"),
        partial(mixers.lightning_attention_layer, slopes=[0.0, 1.5, 3.0, 4.5]),
    ),
    "retention": (lambda: Retention(16, 4), mixers.retention_layer),
    "retention, own dims": (lambda: Retention(18, 3, key_dim=2, value_dim=7), mixers.retention_layer),
    "gla": (lambda: GLA(16, 4), mixers.gla_layer),
    "gla, own dims": (lambda: GLA(16, 2, key_dim=3, value_dim=5, gate_rank=4), mixers.gla_layer),
}


def outcome(run: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = run(x)
    names, parameters = zip(*layer.named_parameters())
    grads = torch.autograd.grad(y, [x, *parameters], upstream)
    return dict(zip(["output", "input", *names], [y.detach(), *grads]))


@pytest.mark.parametrize("name", CASES)
def test_layer_is_its_papers_equations(name: str) -> None:
    torch.manual_seed(1)
    make, oracle = CASES[name]
    layer = make().double()
    dim = layer.q.in_features
    x, upstream = torch.randn(2, 2, sum(LENGTHS), dim, dtype=torch.float64)
    ours = outcome(lambda x: layer(x, Cut.whole(LENGTHS)), layer, x, upstream)
    theirs = outcome(lambda x: oracle(layer, x, LENGTHS), layer, x, upstream)
    errors = {part: relative(ours[part], theirs[part]) for part in theirs}
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("name", CASES)
def test_documents_do_not_see_each_other(name: str) -> None:
    torch.manual_seed(2)
    layer = CASES[name][0]().double()
    x = torch.randn(1, sum(LENGTHS), layer.q.in_features, dtype=torch.float64)
    packed = layer(x, Cut.whole(LENGTHS))
    apart = [layer(part, Cut.whole([part.shape[1]])) for part in x.split(LENGTHS, 1) if part.shape[1]]
    assert relative(packed, torch.cat(apart, 1)) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_no_tokens_are_fine(name: str) -> None:
    layer = CASES[name][0]()
    x = torch.zeros(1, 0, layer.q.in_features, requires_grad=True)
    y = layer(x, Cut.whole([0]))
    y.sum().backward()
    assert y.shape == x.shape


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_near_fp32(name: str) -> None:
    torch.manual_seed(3)
    layer = CASES[name][0]()
    lengths = [300, 50]
    x = torch.randn(1, sum(lengths), layer.q.in_features).bfloat16()
    half = CASES[name][0]().bfloat16()
    half.load_state_dict(layer.state_dict())
    layer.load_state_dict({key: value.bfloat16().float() for key, value in layer.state_dict().items()})
    exact, rounded = layer(x.float(), Cut.whole(lengths)), half(x, Cut.whole(lengths))
    assert rounded.dtype == torch.bfloat16
    assert relative(rounded.float(), exact) < 0.03


def test_normaliser_survives_keys_whose_features_vanish() -> None:
    layer = LinearAttention(4, 2, normaliser=True)
    torch.nn.init.constant_(layer.k.weight, -1000.0)
    x = torch.ones(1, 3, 4, requires_grad=True)
    y = layer(x, Cut.whole([3]))
    y.sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


WRONG: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], str]] = {
    "heads": (SoftmaxAttention, {"dim": 10, "heads": 3}, "heads must divide dim, got dim=10 and heads=3"),
    "kv heads": (SoftmaxAttention, {"dim": 12, "heads": 3, "kv_heads": 2}, "kv_heads must divide heads"),
    "odd rotary": (SoftmaxAttention, {"dim": 9, "heads": 3}, "even key_dim, got 3"),
    "window": (SoftmaxAttention, {"dim": 8, "heads": 2, "window": 0}, "window must be at least 1, got 0"),
    "feature map": (LinearAttention, {"dim": 8, "heads": 2, "feature_map": "relu"}, "elu_plus_one, silu, identity"),
    "normaliser": (
        LinearAttention,
        {"dim": 8, "heads": 2, "feature_map": "silu", "normaliser": True},
        "positive feature map, elu_plus_one, got 'silu'",
    ),
    "slopes": (LightningAttention, {"dim": 8, "heads": 2, "slopes": "steep"}, "alibi, arange, got 'steep'"),
    "layer": (LightningAttention, {"dim": 8, "heads": 2, "layer": 2, "layers": 2}, "layer must be 0 to 1"),
    "retention": (Retention, {"dim": 9, "heads": 3}, "even key_dim"),
    "gate": (GLA, {"dim": 8, "heads": 2, "gate_rank": 0}, "gate_rank must be at least 1, got 0"),
    "temperature": (GLA, {"dim": 8, "heads": 2, "temperature": 0.0}, "temperature must be above 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_say_what_is_expected(name: str) -> None:
    make, arguments, text = WRONG[name]
    with pytest.raises(ValueError, match=text):
        make(**arguments)
