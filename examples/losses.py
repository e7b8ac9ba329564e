"""Losses of one's own on a cut sequence, each the loss of one device on any number of ranks.

A sum over tokens is given to ``sequence_parallel(model, loss=...)``: z-loss, smoothed labels, values.
What is no sum over tokens (DPO, a reward for each document, the balance of experts) is made of sums over all tokens,
by ``seqpar.sum_over_ranks``. What must not be there is a mean over my tokens: ranks hold different numbers of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar import Cut, Shard, next_token_targets, sum_over_ranks


def each(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy ``[b, t]`` of each token, 0 where there is nothing to predict."""
    found = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return found.view_as(targets)


# Sums over tokens: sequence_parallel(model, loss=z_loss), then model(tokens, labels=labels).


def z_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Keeps the normaliser of each softmax near 1 (PaLM, arXiv 2204.02311)."""
    return ((each(logits, targets) + 1e-2 * logits.logsumexp(-1) ** 2) * weights).sum()


def smoothed(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Label smoothing."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1, reduction="sum")


class WithValues(nn.Module):
    """A model with a second head: a number for each token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.values = model, nn.Linear(model.head.in_features, 1)

    def forward(self, tokens: Tensor, cut: Cut) -> dict[str, Tensor]:
        hidden = self.model.hidden(tokens, cut)
        return {"logits": self.model.head(hidden), "values": self.values(hidden)[..., 0]}


def value_loss(outputs: dict[str, Tensor], returns: Tensor, weights: Tensor) -> Tensor:
    """``model(tokens, targets=returns [b, s], weights=...)``: floating-point targets, one for each token."""
    return ((outputs["values"] - returns) ** 2 * weights).sum()


class SeveralAhead(nn.Module):
    """A head for the next token and one for that after it (multi-token prediction, arXiv 2404.19737)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.second = model, nn.Linear(model.head.in_features, model.head.out_features)

    def forward(self, tokens: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
        hidden = self.model.hidden(tokens, cut)
        return self.model.head(hidden), self.second(hidden)


def ahead(labels: Tensor, lengths: Sequence[int]) -> Tensor:
    """``[b, s, 2]``: what ``model(tokens, targets=ahead(labels, lengths))`` predicts."""
    return torch.stack([next_token_targets(labels, lengths, ahead=n) for n in (1, 2)], -1)


def loss_ahead(outputs: tuple[Tensor, Tensor], targets: Tensor, weights: Tensor) -> Tensor:
    """The sum of both."""
    return sum((each(logits, targets[..., n]).sum() for n, logits in enumerate(outputs)), weights.new_zeros(()))


# Beside the model: what it returned for my tokens, and sums over ranks.


def distilled(student: nn.Module, teacher: nn.Module, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean divergence of a student from a teacher; both are cut, and nobody holds all logits of either."""
    mine = student(tokens, lengths=lengths)
    with torch.no_grad():
        theirs = teacher(tokens, lengths=lengths).logits.log_softmax(-1)
    part = functional.kl_div(mine.logits.log_softmax(-1), theirs, log_target=True, reduction="sum")
    return sum_over_ranks(part, mine.shard) / tokens.numel()


def of_documents(each_token: Tensor, shard: Shard) -> Tensor:
    """``[documents]``: a number of each of my tokens ``[1, t]``, summed by documents over all ranks."""
    document = torch.repeat_interleave(torch.arange(len(shard.lengths)), torch.tensor(shard.lengths))
    mine = shard.take(document[None])[0].to(each_token.device)
    part = each_token.new_zeros(len(shard.lengths)).index_add(0, mine, each_token[0])
    return sum_over_ranks(part, shard)


def log_likelihoods(model: nn.Module, tokens: Tensor, labels: Tensor, lengths: Sequence[int]) -> Tensor:
    """``[documents]`` of packed ``tokens [1, s]``."""
    output = model(tokens, lengths=lengths)
    targets = output.shard.take(next_token_targets(labels, lengths))
    return of_documents(-each(output.logits, targets), output.shard)


def dpo(model: nn.Module, reference: nn.Module, tokens: Tensor, labels: Tensor, lengths: Sequence[int]) -> Tensor:
    """Direct preference optimisation (arXiv 2305.18290); documents are chosen and rejected ones in turn."""
    with torch.no_grad():
        before = log_likelihoods(reference, tokens, labels, lengths)
    chosen, rejected = (log_likelihoods(model, tokens, labels, lengths) - before).view(-1, 2).unbind(1)
    return -functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def preferred(model: nn.Module, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """A reward model: the value at a document's last token; chosen and rejected documents in turn."""
    output = model(tokens, lengths=lengths)
    left = next_token_targets(torch.ones_like(tokens), lengths, 0)  # 0 at the last token of each document
    last = output.shard.take(1 - left)
    chosen, rejected = of_documents(output.outputs["values"] * last, output.shard).view(-1, 2).unbind(1)
    return -functional.logsigmoid(chosen - rejected).mean()


# In a layer: cut.add_loss.


class Experts(nn.Module):
    """A feed-forward part of several experts; the balance of their loads (arXiv 2101.03961) joins the loss."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)) for _ in range(experts)
        )

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        shares = self.router(x).softmax(-1)
        gate, chosen = shares.max(-1)
        loads = functional.one_hot(chosen, len(self.experts)).to(x.dtype)
        tokens = x.shape[0] * cut.shard.num_tokens
        mean_load, mean_share = (sum_over_ranks(y.sum((0, 1)), cut) / tokens for y in (loads, shares))
        cut.add_loss(0.1 * len(self.experts) * (mean_load * mean_share).sum(), "balance")
        outputs = torch.stack([expert(x) for expert in self.experts], -2)
        mine = outputs.gather(-2, chosen[..., None, None].expand(*x.shape[:2], 1, x.shape[-1]))[..., 0, :]
        return x + gate[..., None] * mine
