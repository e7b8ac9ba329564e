"""The options of softmax attention, as published models have them, against the formulas written out in fp64."""

import pytest
import torch
from torch.nn import functional

from seqpar import Cut
from seqpar.collectives import run_ranks
from seqpar.layers import SoftmaxAttention
from seqpar.layers.parts.rope import Rope
from tests.cutting import cut, relative_error, tensors
from tests.oracles.scores import scored_attention

DIM, HEADS, LENGTHS = 12, 4, [5, 1, 0, 9]
ROPE = Rope(Rope.plain(4, 500.0).inv_freq, 1.2)
OPTIONS = {
    "qwen2": {"kv_heads": 2, "bias": True},
    "qwen3": {"kv_heads": 2, "key_dim": 6, "value_dim": 6, "qk_norm": "head"},
    "qwen3-next": {"key_dim": 6, "qk_norm": "head", "norm": "rms_from_one", "gated": True, "rope": ROPE, "eps": 1e-5},
    "olmo2": {"qk_norm": "all", "key_dim": 4, "window": 3},
    "gemma2": {"softcap": 2.0, "scale": 0.3, "window": 4, "key_dim": 4},
    "gpt-oss": {"sinks": True, "bias": True, "out_bias": True, "key_dim": 4, "window": 3},
    "modernbert": {"causal": False, "window": (2, 2), "key_dim": 4},
    "cohere": {"rope": Rope.plain(4, interleaved=True), "key_dim": 4, "qk_norm": "head", "norm": "layer_plain"},
}


def layer_of(name):
    layer = SoftmaxAttention(DIM, HEADS, **({"key_dim": 4} | OPTIONS[name])).double()
    values = tensors(7, *[each.shape for each in layer.parameters()])
    with torch.no_grad():
        for each, value in zip(layer.parameters(), values):
            each.copy_(value * 0.5)
    return layer


def normed(x, options, weight):
    kind, eps = options.get("norm", "rms"), options.get("eps", 1e-6)
    if kind == "layer_plain":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * (1 + weight if kind == "rms_from_one" else weight)


def written_out(layer, x, options):
    """The layer on whole documents."""
    q, k, v = (functional.linear(x, part.weight, part.bias) for part in (layer.q, layer.k, layer.v))
    heads = lambda y, dim: y.unflatten(-1, (-1, dim))  # noqa: E731
    per_head = options.get("qk_norm", "none")
    if per_head == "all":
        q, k = normed(q, options, layer.q_norm.weight), normed(k, options, layer.k_norm.weight)
    q, k, v = heads(q, layer.key_dim), heads(k, layer.key_dim), heads(v, layer.value_dim)
    if per_head == "head":
        q, k = normed(q, options, layer.q_norm.weight), normed(k, options, layer.k_norm.weight)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    rope = options.get("rope") or Rope.plain(layer.key_dim)
    causal, window = options.get("causal", True), options.get("window")
    left, right = window if isinstance(window, tuple) else (None if window is None else window - 1, None)
    out, _ = scored_attention(
        rope(q, positions), rope(k, positions), v, LENGTHS, causal=causal, left=left, right=right,
        scale=options.get("scale"), softcap=options.get("softcap"), sinks=layer.sinks,
    )  # fmt: skip
    out = out.flatten(-2)
    if layer.gate is not None:
        out = out / (1 + (-functional.linear(x, layer.gate.weight, layer.gate.bias)).exp())
    return functional.linear(out, layer.out.weight, layer.out.bias)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_over_the_cut(name):
    x, upstream = tensors(1, (1, sum(LENGTHS), DIM), (1, sum(LENGTHS), DIM))
    alone = layer_of(name)
    right = written_out(alone, x, OPTIONS[name])
    whole = torch.autograd.grad((right * upstream).sum(), list(alone.parameters()))

    def body(group):
        layer, shard = layer_of(name), cut(LENGTHS, group, "zigzag")
        y = layer(shard.take(x), Cut(shard, group))
        return (y.detach(), shard.take(right.detach())), torch.autograd.grad(
            (y * shard.take(upstream)).sum(), list(layer.parameters())
        )

    ranks = run_ranks(2, body)
    assert relative_error([pair for pair, _ in ranks], right.detach()) < 1e-12
    for part, expected in zip(zip(*(grads for _, grads in ranks)), whole):
        assert relative_error([(sum(part), expected)], expected) < 1e-11
