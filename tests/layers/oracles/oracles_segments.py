"""Models run segment by segment once more: each segment from its rows and what came of those before, token by token."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from tests.layers.mixers import softmax_attention_layer


def model_of(cell: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    return softmax_attention_layer(cell.inner, torch.stack(list(rows), 1), [len(rows)])


def rmt_document(cell: nn.Module, rows: Sequence[Tensor]) -> list[Tensor]:
    tokens, outs = [slot.expand_as(rows[0]) for slot in cell.memory.slots] if rows else [], []
    for number, first in enumerate(range(0, len(rows), cell.segment)):
        if cell.bptt_depth and number and number % cell.bptt_depth == 0:
            tokens = [token.detach() for token in tokens]
        x = rows[first : first + cell.segment]
        z = model_of(cell, [*tokens, *x, *tokens]).unbind(1)
        outs += z[len(tokens) : len(tokens) + len(x)]
        tokens = list(z[len(tokens) + len(x) :])
    return outs


def hmt_document(cell: nn.Module, rows: Sequence[Tensor]) -> list[Tensor]:
    own, memories, summary, outs = cell.memory, [], None, []
    last = [torch.zeros_like(rows[0]) for _ in range(own.kept)] if rows else []
    for first in range(0, len(rows), cell.segment):
        x = list(rows[first : first + cell.segment])
        mark = own.first[0].expand_as(rows[0])
        p = mark
        if memories:
            query = summary @ own.query.weight.T
            scores = torch.stack([(query * (m @ own.key.weight.T)).sum(-1) for m in memories], -1)
            shares = (scores / query.shape[-1] ** 0.5).softmax(-1)
            p = sum(shares[:, place, None] * m for place, m in enumerate(memories))
        z = model_of(cell, [p, *last, *x, p]).unbind(1)
        outs += z[1 + own.kept : 1 + own.kept + len(x)]
        memories = [*memories, z[-1]][-own.memories :]
        last = [*last, *x][-own.kept :]
        summary = model_of(cell, [mark, *x[cell.segment // 2 :], mark])[:, -1]
    return outs


def rmt_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    outs: list[Tensor] = []
    for start, length in zip((0, *accumulate(lengths)), lengths):
        outs += rmt_document(layer.cell, x[:, start : start + length].unbind(1))
    return torch.stack(outs, 1)


def hmt_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    outs: list[Tensor] = []
    for start, length in zip((0, *accumulate(lengths)), lengths):
        outs += hmt_document(layer.cell, x[:, start : start + length].unbind(1))
    return torch.stack(outs, 1)
