"""Faults that users of cut sequences make: a model or a step with one of them, and a right one."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

import seqpar
from seqpar import Shard, next_token_targets, sequence_parallel, sum_over_ranks
from seqpar.collectives import alone
from seqpar.crossing.replicated import scale_gradient
from seqpar.verification.verify import Batch
from tests.verification.broken_models import DIM, LENGTHS, SIZE, WORDS, numbers


def batch():
    tokens = torch.randint(WORDS, (2, SIZE), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, torch.where(torch.arange(SIZE) % 4 == 1, -100, tokens), LENGTHS)


class Part(nn.Module):
    """A layer; ``fault`` breaks it."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.out = nn.Linear(DIM, DIM)


class Mixer(Part):
    def __init__(self, fault):
        super().__init__(fault)
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x, cut):
        shard, group, causal = cut.shard, cut.group, True
        heads = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, -1)) for part in heads)
        if self.fault == "attends to its shard only":
            shard = Shard.of([piece.count for piece in shard.pieces_of(shard.rank)], alone())
            group = alone()
        if self.fault == "drops the mask":
            causal = group.size == 1
        if self.fault == "no documents":
            shard = Shard.of([shard.num_tokens], group, shard.layout)
        if self.fault == "heads by count":  # a part of the channels, as tensor parallelism leaves, as many heads
            q, k, v = (part[..., : DIM // group.size].unflatten(-1, (2, -1)) for part in heads)
        if self.fault == "detached keys":
            k = k.detach() if group.size > 1 else k
        mixed = seqpar.attention(q, k, v, shard=shard, group=group, causal=causal).flatten(2)
        if self.fault == "own all-reduce":  # right forward, nothing comes back
            mixed = functional.pad(mixed, (0, DIM - mixed.shape[-1]))
            sums = mixed.sum(1, keepdim=True)
            total = group.all_reduce(sums.detach()).wait() if group.size > 1 else sums
            mixed = mixed + 0.1 * total
        return x + self.out(functional.pad(mixed, (0, DIM - mixed.shape[-1])))


class Local(Part):
    """What mixes tokens without a word to the other ranks."""

    def forward(self, x, cut):
        gate = self.out(x)
        local = {
            "roll": lambda: gate.roll(1, 1),
            "shift": lambda: functional.pad(gate, (0, 0, 1, 0))[:, :-1],
            "running sum": lambda: gate.cumsum(1) / SIZE,
            "mean of tokens": lambda: gate.mean(1, keepdim=True).expand_as(gate),
            "softmax over tokens": lambda: gate.softmax(1),
            "normalised over tokens": lambda: (gate - gate.mean(1, True)) / (1e-5 + gate.std(1, keepdim=True)),
            "convolution": lambda: functional.avg_pool1d(gate.mT, 3, 1, 1).mT,
            "best tokens": lambda: gate * (gate >= gate.amax(1, keepdim=True)),
            "cumulative max": lambda: gate.cummax(1).values,
            "dropout": lambda: functional.dropout(gate, 0.5),
            "noise": lambda: gate + torch.randn_like(gate),
        }
        return x + (local[self.fault]() if self.fault in local else gate)


class Places(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.fault, self.places = fault, nn.Embedding(64, DIM)

    def forward(self, x, cut):
        at = cut.positions
        if self.fault == "positions by arange":
            at = torch.arange(x.shape[1])
        if self.fault == "positions of the batch":
            at = cut.shard.indices_of(cut.shard.rank)
        if self.fault == "positions by rank":
            at = torch.arange(x.shape[1]) + cut.group.rank * x.shape[1]
        return x + self.places(at)


class Model(nn.Module):
    """An embedding, places, attention, a token-wise part and a head; weights are the same everywhere."""

    def __init__(self, fault=""):
        super().__init__()
        self.fault = fault
        self.embed, self.places = nn.Embedding(WORDS, DIM), Places(fault)
        self.mixer, self.local, self.head = Mixer(fault), Local(fault), nn.Linear(DIM, WORDS)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = 0.5 * numbers(*parameter.shape, seed=seed)

    def forward(self, tokens, cut):
        x = self.local(self.mixer(self.places(self.embed(tokens), cut), cut), cut)
        if self.fault == "scaled by ranks":
            x = scale_gradient(x, cut.group.size)
        return self.head(x)


@dataclass(frozen=True)
class Steps:
    """Steps of one's own; each returns its loss."""

    group: object

    def made(self, sync=True, options=None):
        def make(group):
            return sequence_parallel(Model(), group=group, sync_gradients=sync, **(options or {}))

        return make

    def right(self, model, data):
        out = model(data.tokens, lengths=data.lengths)
        wanted = out.shard.take(next_token_targets(data.labels, data.lengths))
        part = functional.cross_entropy(out.logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        return sum_over_ranks(part, out.shard) / (next_token_targets(data.labels, data.lengths) != -100).sum()

    def mean_of_mine(self, model, data):
        out = model(data.tokens, lengths=data.lengths)
        wanted = out.shard.take(next_token_targets(data.labels, data.lengths))
        return functional.cross_entropy(out.logits.flatten(0, 1), wanted.flatten())

    def mean_of_means(self, model, data):
        out = model(data.tokens, lengths=data.lengths)
        return sum_over_ranks(self.mean_of_mine(model, data), out.shard) / out.shard.size

    def shifted_in_my_shard(self, model, data):
        out = model(data.tokens, lengths=data.lengths)
        wanted = out.shard.take(data.labels)[:, 1:]
        part = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), wanted.flatten(), reduction="sum")
        return sum_over_ranks(part, out.shard) / (next_token_targets(data.labels, data.lengths) != -100).sum()

    def z_of_mine(self, model, data):
        out = model(data.tokens, labels=data.labels, lengths=data.lengths)
        return out.loss + 1e-2 * (out.logits.logsumexp(-1) ** 2).mean()

    def sum_not_divided(self, model, data):
        out = model(data.tokens, labels=data.labels, lengths=data.lengths)
        return out.loss_sum / (out.logits.shape[1] * out.shard.size)

    def loss_times_ranks(self, model, data):
        out = model(data.tokens, labels=data.labels, lengths=data.lengths)
        return out.loss * out.shard.size

    def loss_summed_again(self, model, data):
        out = model(data.tokens, labels=data.labels, lengths=data.lengths)
        return sum_over_ranks(out.loss, out.shard)

    def loss_reduced_by_hand(self, model, data):
        """The number is right, and the gradient is my part's, of a mean over ranks."""
        loss = self.right(model, data)
        return loss.detach() + (loss - loss.detach()) / model.group.size

    def gradients_summed_again(self, model, data):
        loss = self.right(model, data)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = model.group.all_reduce(parameter.grad).wait()
        return loss

    def gradients_averaged(self, model, data):
        loss = self.right(model, data)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = model.group.all_reduce(parameter.grad).wait() / model.group.size**2
        return loss

    def one_rank_steps(self, model, data):
        loss = self.right(model, data)
        loss.backward()
        if model.group.rank == 0:
            torch.optim.SGD(model.parameters(), 0.1).step()
        return loss

    def rates_by_rank(self, model, data):
        loss = self.right(model, data)
        loss.backward()
        torch.optim.SGD(model.parameters(), 0.1 * (1 + model.group.rank)).step()
        return loss

    def clipped_by_rank(self, model, data):
        loss = self.right(model, data)
        loss.backward()
        nn.utils.clip_grad_norm_(list(model.parameters())[model.group.rank :], 1e-3)
        return loss

    def reward_of_my_last(self, model, data):
        out = model(data.tokens, lengths=data.lengths)
        return functional.softplus(out.logits[:, -1, 0]).mean() if out.shard.num_local else out.logits.sum()

    def draws(self, model, data):
        return self.right(model, data) * (1 + torch.rand(()))
