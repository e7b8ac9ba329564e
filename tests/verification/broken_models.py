"""A small model, and the ways to break it that seqpar.verification.verify must find."""

import torch
from torch import nn

import seqpar
from seqpar import Cut, Shard, sequence_parallel
from seqpar.collectives import alone
from seqpar.crossing.replicated import scale_gradient
from seqpar.training.loss import next_token_loss
from seqpar.training.wrap import Output, SequenceParallel
from seqpar.verification.verify import Batch

LENGTHS = (5, 0, 11, 1, 8, 6)
SIZE, WORDS, DIM = sum(LENGTHS), 13, 8


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(WORDS, (2, sum(lengths)), generator=generator)
    labels = torch.where(torch.rand(tokens.shape, generator=generator) < 0.2, -100, tokens)
    return Batch(tokens, labels, lengths)


class Tiny(nn.Module):
    """Embedding, one softmax and one linear attention, head. ``broken`` breaks it in one way; weights are ordinary."""

    def __init__(self, broken="", dtype=torch.float64):
        super().__init__()
        self.broken = broken
        self.embedding = nn.Embedding(WORDS, DIM)
        self.places = nn.Embedding(64, DIM)
        self.qkv, self.mix, self.head = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, WORDS)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = (0.5 * numbers(*parameter.shape, seed=seed)).to(dtype)

    def forward(self, tokens, cut):
        shard, group = cut.shard, cut.group
        places = shard.positions
        if self.broken == "local positions":
            places = torch.arange(shard.num_local)
        elif self.broken == "global positions":
            places = shard.indices_of(shard.rank)
        x = self.embedding(tokens) + self.places(places)
        q, k, v = (part.unflatten(-1, (2, -1)) for part in self.qkv(x).chunk(3, -1))
        if self.broken == "ignores the cut":
            group = alone()
            shard = Shard.of([piece.count for piece in shard.pieces_of(shard.rank)], group)
        elif self.broken == "ignores documents":
            shard = Shard.of([shard.num_tokens], group, shard.layout)
        x = x + seqpar.attention(q, k, v, shard=shard, group=group, transport=cut.transport).flatten(-2)
        x = x + self.mix(seqpar.linear_attention(q, k, v, shard=cut.shard, group=cut.group, scan=cut.scan).flatten(-2))
        if self.broken == "multiplies gradients":
            x = scale_gradient(x, cut.group.size)
        if self.broken == "shifts within its shard":
            x = x.roll(1, 1)
        return self.head(x)


class Casts(Tiny):
    def forward(self, tokens, cut):
        return super().forward(tokens, cut).float()


class OnlyFloat32(Tiny):
    def __init__(self):
        super().__init__(dtype=torch.float32)

    def forward(self, tokens, cut):
        if self.head.weight.dtype != torch.float32:
            raise RuntimeError("no kernel for float64")
        return super().forward(tokens, cut)


class ScalesLoss(SequenceParallel):
    """This one and those below: wrappers of one's own, each wrong in one way."""

    def forward(self, tokens, labels=None, lengths=None):
        output = super().forward(tokens, labels, lengths)
        return output if labels is None else Output(output.loss * self.group.size, output.logits, output.shard)


class ShiftsAfterCutting(SequenceParallel):
    def forward(self, tokens, labels=None, lengths=None):
        whole = super().forward(tokens, None, lengths)
        if labels is None:
            return whole
        labels = labels.clone()
        labels[:, [run.start for runs in whole.shard.runs for run in runs]] = -100
        loss = next_token_loss(whole.logits, labels, shard=whole.shard, group=self.group)
        return Output(loss, whole.logits, whole.shard)


class SumsNoGradients(SequenceParallel):
    def forward(self, tokens, labels=None, lengths=None):
        shard = Shard.of(lengths, self.group, self.options.layout)
        logits = self.module(shard.take(tokens), Cut(shard, self.group))
        loss = None if labels is None else next_token_loss(logits, labels, shard=shard, group=self.group)
        return Output(loss, logits, shard)


class KeepsItsOwnLoss(SequenceParallel):
    def forward(self, tokens, labels=None, lengths=None):
        output = super().forward(tokens, labels, lengths)
        return output if labels is None else Output(output.loss + 1e-15 * self.group.rank, output.logits, output.shard)


class DoublesGradientsOnTheLastRank(SequenceParallel):
    def forward(self, tokens, labels=None, lengths=None):
        output = super().forward(tokens, labels, lengths)
        if labels is not None and self.group.rank == self.group.size - 1:
            self.module.mix.weight.register_hook(lambda gradient: 2 * gradient)
        return output


def wrapped_by(kind, group):
    return kind(Tiny(), group, sequence_parallel(Tiny(), group=alone()).options)
