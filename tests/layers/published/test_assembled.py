"""Decoders assembled of blocks that differ: orders of norms, multipliers, learned positions, caps, tied embeddings."""

import pytest
import torch

from seqpar import Cut, sequence_parallel
from seqpar.collectives import Ledger, run_ranks
from seqpar.layers import MLP, Block, Experts, LatentAttention, Router, SoftmaxAttention
from seqpar.models import Decoder, Frame
from tests.cutting import tensors

DIM, TOKENS = 8, [6, 1, 0, 9]


def filled(module, seed=3):
    module = module.double()
    with torch.no_grad():
        for each, value in zip(module.parameters(), tensors(seed, *[each.shape for each in module.parameters()])):
            each.copy_(value * 0.4)
    return module


def normed(x, norm):
    if isinstance(norm, torch.nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (norm.weight + norm.from_one)


ORDERS = {
    "pre": lambda x, n, m, f, o, r: (h := x + r * m(n[0](x))) + r * f(n[1](h)),
    "post": lambda x, n, m, f, o, r: n[1]((h := n[0](x + r * m(x))) + r * f(h)),
    "after": lambda x, n, m, f, o, r: (h := x + r * n[0](m(x))) + r * n[1](f(h)),
    "sandwich": lambda x, n, m, f, o, r: (h := x + r * o[0](m(n[0](x)))) + r * o[1](f(n[1](h))),
    "parallel": lambda x, n, m, f, o, r: x + r * m(n[0](x)) + r * f(n[1](x)),
    "parallel_shared": lambda x, n, m, f, o, r: x + r * m(n[0](x)) + r * f(n[0](x)),
}


@pytest.mark.parametrize("tile_tokens", [0, 4])
@pytest.mark.parametrize("norm", ["rms", "rms_from_one", "layer"])
@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_norms(order, norm, tile_tokens):
    (x,) = tensors(0, (1, sum(TOKENS), DIM))
    mlp = MLP(DIM, 12, activation="gelu", gated=False, bias=True, tile_tokens=tile_tokens)
    options = {"mlp": mlp, "norm": norm, "eps": 1e-5, "order": order, "residual": 0.7}
    block = filled(Block(DIM, SoftmaxAttention(DIM, 2), 1, **options))
    cut = Cut.whole(TOKENS)
    norms = [lambda y, n=n: normed(y, n) for n in (block.mixer_norm, block.mlp_norm)]
    outs = [lambda y, n=n: normed(y, n) for n in (getattr(block, f"{p}_out_norm", None) for p in ("mixer", "mlp"))]
    right = ORDERS[order](x, norms, lambda y: block.mixer(y, cut), block.mlp, outs, 0.7)
    assert (block(x, cut) - right).norm() < 1e-12 * right.norm()
    assert len(list(block.mlp_norm.parameters())) == (2 if norm == "layer" else 1)


def model():
    blocks = [
        Block(DIM, SoftmaxAttention(DIM, 2, window=3, softcap=2.0), 12, order="sandwich", norm="rms_from_one"),
        Block(
            DIM, LatentAttention(DIM, 4, latent_dim=4, key_dim=2, rope_dim=2, value_dim=3), 12, checkpoint=True,
            mlp=Experts(DIM, 6, 4, Router("sigmoid_groups", 2, scale=1.5), shared=4),
        ),
        Block(DIM, SoftmaxAttention(DIM, 2, rope_base=None, sinks=True), 12, order="parallel_shared", residual=0.5),
    ]  # fmt: skip
    frame = Frame(
        11, DIM, norm="layer", tied=True, positions=9, first_position=2, embedding_scale=DIM**0.5, logit_scale=0.5,
        logit_cap=3.0,
    )  # fmt: skip
    return filled(Decoder.assembled(blocks, frame))


def batch():
    return torch.randint(11, (1, sum(TOKENS)), generator=torch.Generator().manual_seed(1))


def trained(group, loss_tokens):
    net = sequence_parallel(model(), group=group, loss_tokens=loss_tokens)
    loss = net(batch(), labels=batch(), lengths=TOKENS).loss
    loss.backward()
    return loss.item(), [each.grad for each in net.parameters()]


@pytest.mark.parametrize("loss_tokens", [0, 5])
def test_a_decoder_of_many_kinds_is_that_of_one_device(loss_tokens):
    net, tokens = model(), batch()
    hidden = net.embedding.weight[tokens] * DIM**0.5
    positions = torch.cat([torch.arange(length) for length in TOKENS])
    hidden = hidden + net.positions.weight[positions + 2]
    for block in net.blocks:
        hidden = block(hidden, Cut.whole(TOKENS))
    logits = 3 * torch.tanh(normed(hidden, net.norm) @ net.embedding.weight.T * 0.5 / 3)
    ends = torch.tensor(TOKENS).cumsum(0) - 1
    targets = [t for t in range(sum(TOKENS)) if t not in ends.tolist() and t + 1 < sum(TOKENS)]
    loss = torch.nn.functional.cross_entropy(logits[0, targets], tokens[0, [t + 1 for t in targets]])
    whole = torch.autograd.grad(loss, list(net.parameters()))
    for got, grads in run_ranks(3, trained, loss_tokens):
        assert got == pytest.approx(loss.item(), rel=1e-12)
        for one, other in zip(grads, whole):
            assert (one - other).norm() <= 1e-11 * (1 + other.norm())


def test_a_document_longer_than_the_learned_positions_is_refused():
    def body(group):
        ledger = Ledger(group)
        net = sequence_parallel(model(), group=ledger)
        before = ledger.messages
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 2: a document of 10 tokens, but only 9 learned"):
            net(torch.zeros(1, 10, dtype=torch.int64), lengths=[10])
        return ledger.messages - before

    run_ranks(2, body)
