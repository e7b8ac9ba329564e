"""Titans' memory beside another implementation of it, titans-pytorch, on the same weights (skipped if it is not there).

The same function is configured by ``chunk_size=1`` (gates of every token; there a chunk shares them),
``batch_size=`` our chunk (gradients at the weights of its start), ``pre_rmsnorm=False``, and
``mem_model_norm_add_residual=False`` with a network that adds its input. Its loss is a mean over channels where the
paper and ours sum, so its steps are divided by their number.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.layers.memory.rules import Rule, Tokens
from tests.layers.drawn import drawn, relative

titans_pytorch: Any = pytest.importorskip("titans_pytorch")
DIM = 8


class Added(nn.Module):
    """A network that adds its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def theirs_of(depth: int, chunk: int) -> nn.Module:
    torch.manual_seed(depth)
    network = titans_pytorch.MemoryMLP(DIM, depth=depth, expansion_factor=4.0)
    return titans_pytorch.NeuralMemory(
        DIM,
        chunk_size=1,
        batch_size=chunk,
        model=Added(network) if depth > 1 else network,
        pre_rmsnorm=False,
        mem_model_norm_add_residual=False,
    ).double()


def ours(theirs: Any, x: Tensor, depth: int, chunk: int) -> Tensor:
    """The rule of Titans on the projections and the weights of theirs."""
    q, k, v = (project(x)[:, None] for project in (theirs.to_queries, theirs.to_keys, theirs.to_values))
    forget, step, momentum = (
        gate[0](x).transpose(1, 2) for gate in (theirs.to_decay_factor, theirs.to_adaptive_step, theirs.to_momentum)
    )
    tokens = Tokens(
        q, k, v, functional.logsigmoid(-forget), step.sigmoid() / DIM, functional.logsigmoid(momentum)
    )  # fmt: skip
    rule = Rule(chunk, depth, momentum=True)
    start = rule.start(tuple(weight.mT for weight in theirs.memory_model_parameters))
    out, _ = rule(tokens, tuple(each.expand(len(x), *each.shape) for each in start), 0)
    return out[:, :, 0]


@pytest.mark.parametrize(("depth", "chunk"), [(1, 4), (2, 4), (2, 1), (3, 5)])
def test_titans_pytorch_learns_and_reads_the_same(depth: int, chunk: int) -> None:
    """Outputs, and gradients of tokens and of all weights, through what the memory learned."""
    theirs: Any = theirs_of(depth, chunk)
    x, upstream = (0.5 * drawn(2, 22, DIM, seed=seed) for seed in (3, 4))
    found = []
    for run in (lambda x: theirs(x)[0], lambda x: ours(theirs, x, depth, chunk)):
        given = x.clone().requires_grad_()
        y = run(given)
        of = [given, *theirs.memory_model_parameters, *theirs.to_keys.parameters(), *theirs.to_momentum.parameters()]
        found.append([y.detach(), *torch.autograd.grad(y, of, upstream)])
    errors = [relative(*pair) for pair in zip(*found)]
    assert max(errors) < 1e-10, errors
