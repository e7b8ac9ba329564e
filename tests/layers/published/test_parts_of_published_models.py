"""Feed-forward parts, routers, experts and latent attention against the formulas of their papers, written out."""

import pytest
import torch
from torch.nn import functional

from seqpar import Cut, Shard
from seqpar.collectives import Ledger, run_ranks
from seqpar.layers import MLP, Experts, LatentAttention, Rope, Router
from tests.cutting import cut, relative_error, tensors
from tests.oracles.scores import scored_attention


def filled(module, seed=3):
    module = module.double()
    values = tensors(seed, *[each.shape for each in module.parameters()])
    with torch.no_grad():
        for each, value in zip(module.parameters(), values):
            each.copy_(value * 0.5)
    return module


@pytest.mark.parametrize("tile_tokens", [0, 3])
@pytest.mark.parametrize("gated", [True, False])
def test_feed_forward_kinds(gated, tile_tokens):
    x = tensors(0, (2, 7, 5))[0]
    formulas = {
        "silu": lambda z: z / (1 + (-z).exp()),
        "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
        "gelu_tanh": lambda z: z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
        "relu": lambda z: z * (z > 0),
        "relu2": lambda z: z * z * (z > 0),
    }
    for activation, act in formulas.items():
        part = filled(MLP(5, 8, activation=activation, gated=gated, bias=True, tile_tokens=tile_tokens))
        up = x @ part.up.weight.T + part.up.bias
        hidden = act(x @ part.gate.weight.T + part.gate.bias) * up if gated else act(up)
        assert torch.allclose(part(x), hidden @ part.down.weight.T + part.down.bias, atol=1e-13)


def weights_of(logits, router, correction):
    """Of one token: {expert: weight}, by the papers."""
    count = len(logits)
    if router.kind == "top_softmax":
        best = sorted(range(count), key=lambda e: -logits[e])[: router.top]
        norm = sum(logits[e].exp() for e in best)
        return {e: router.scale * logits[e].exp() / norm for e in best}
    if router.kind == "softmax_top":
        rated = allowed = {e: logits[e].exp() / logits.exp().sum() for e in range(count)}
    else:
        rated = {e: 1 / (1 + (-logits[e]).exp()) for e in range(count)}
        corrected = {e: rated[e] + correction[e] for e in range(count)}
        per = count // router.groups
        of_group = [
            sorted((corrected[e] for e in range(g * per, (g + 1) * per)), reverse=True) for g in range(router.groups)
        ]
        groups = sorted(range(router.groups), key=lambda g: -sum(of_group[g][:2]))[: router.top_groups]
        allowed = {e: each for e, each in corrected.items() if e // per in groups}
    best = sorted(allowed, key=lambda e: -allowed[e])[: router.top]
    norm = sum(rated[e] for e in best) if router.normed else 1
    return {e: router.scale * rated[e] / norm for e in best}


ROUTERS = (
    Router("softmax_top", 2),
    Router("softmax_top", 3, normed=False),
    Router("top_softmax", 2),
    Router("sigmoid_groups", 3, groups=4, top_groups=2, scale=2.5),
    Router("sigmoid_groups", 2, normed=False),
)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: f"{r.kind} {r.top}")
def test_experts(router):
    x, upstream, correction = tensors(1, (1, 6, 5), (1, 6, 5), (8,))
    part = filled(Experts(5, 4, 8, router, shared=3, shared_gated=True))
    if part.correction is not None:
        part.correction.copy_(correction)
    shared = functional.silu(x @ part.shared.gate.weight.T) * (x @ part.shared.up.weight.T) @ part.shared.down.weight.T
    right = [shared[0, t] * torch.sigmoid(x[0, t] @ part.shared_gate.weight[0]) for t in range(6)]
    for t in range(6):
        for e, weight in weights_of(part.router(x[0, t]), router, correction).items():
            hidden = functional.silu(part.gate[e] @ x[0, t]) * (part.up[e] @ x[0, t])
            right[t] = right[t] + weight * (part.down[e] @ hidden)
    right, got = torch.stack(right)[None], part(x)
    assert (got - right).abs().max() < 1e-12
    for one, other in zip(*(torch.autograd.grad((y * upstream).sum(), list(part.parameters())) for y in (got, right))):
        assert (one - other).norm() <= 1e-12 * (1 + other.norm())


def test_routers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 of 2 groups do not fit"):
        Experts(4, 4, 8, Router("sigmoid_groups", 2, groups=2, top_groups=3))
    with pytest.raises(ValueError, match="top 5 of 8 experts in 1 of 2 groups"):
        Experts(4, 4, 8, Router("sigmoid_groups", 5, groups=2, top_groups=1))


SIZES = {"latent_dim": 6, "key_dim": 4, "rope_dim": 2, "value_dim": 3}


@pytest.mark.parametrize("options", [{}, {"query_rank": 5, "scale": 0.4}, {"rope_dim": 0}], ids=str)
def test_latent_attention_is_its_expanded_form(options):
    lengths = [5, 0, 1, 9]
    x, upstream = tensors(2, (1, 15, 8), (1, 15, 8))
    sizes = SIZES | options
    make = lambda: filled(LatentAttention(8, 3, **sizes))  # noqa: E731
    alone = make()
    low = x if alone.q_down is None else alone.q_norm(alone.q_down(x))
    q = alone.q(low).unflatten(-1, (3, -1))
    latent, key = alone.kv_down(x).split([6, sizes["rope_dim"]], -1)
    both = alone.kv(alone.kv_norm(latent)).unflatten(-1, (3, -1))
    positions = torch.cat([torch.arange(length) for length in lengths])
    if sizes["rope_dim"]:
        rope = Rope.plain(2, interleaved=True)
        q = torch.cat([q[..., :4], rope(q[..., 4:], positions)], -1)
        key = rope(key.unsqueeze(2), positions)
    k = torch.cat([both[..., :4], key.view(1, 15, 1, -1).expand(-1, -1, 3, -1)], -1)
    out, _ = scored_attention(q, k, both[..., 4:], lengths, scale=options.get("scale"))
    right = alone.out(out.flatten(-2))
    whole = torch.autograd.grad((right * upstream).sum(), list(alone.parameters()))

    def body(group):
        layer, shard = make(), cut(lengths, group, "striped")
        y = layer(shard.take(x), Cut(shard, group))
        grads = torch.autograd.grad((y * shard.take(upstream)).sum(), list(layer.parameters()))
        return (y.detach(), shard.take(right.detach())), grads

    ranks = run_ranks(3, body)
    assert relative_error([pair for pair, _ in ranks], right.detach()) < 1e-12
    for part, expected in zip(zip(*(grads for _, grads in ranks)), whole):
        assert relative_error([(sum(part), expected)], expected) < 1e-11


def test_one_latent_head_travels():
    """Twice the latent dim and the rotated part for each token, whatever the number of heads."""

    def body(group, heads):
        ledger, shard = Ledger(group), Shard.of([8], group)
        layer = LatentAttention(8, heads, **SIZES)
        layer(torch.zeros(1, 4, 8), Cut(shard, ledger))
        return ledger.bytes_

    assert run_ranks(2, body, 2) == run_ranks(2, body, 16) == [4 * (2 * 6 + 2) * 4, 0]
