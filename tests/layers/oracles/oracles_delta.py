"""DeltaNet, Gated DeltaNet, KDA and MoM once more, token by token in fp64, from their papers' equations."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from tests.oracles.delta import delta_rule


def swish(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


def unit(x: Tensor) -> Tensor:
    return x / ((x * x).sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(o: Tensor, weight: Tensor) -> Tensor:
    return o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def starts_of(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)][:-1]


def convolved(layer: nn.Module, rows: list[Tensor]) -> Tensor:
    """The convolution's output for the last of the rows ``[b, d]`` of a document (or of a stream of one)."""
    taps = reversed(layer.conv_weight.unbind(1))
    return swish(sum(tap * row for tap, row in zip(taps, reversed(rows))))


def projected(layer: nn.Module, x: Tensor, lengths: Sequence[int], heads: int) -> tuple[Tensor, ...]:
    """Queries and keys of ``heads`` heads, and values of ``layer.value_dim``, after the convolution."""
    inputs, rows = x @ layer.qkv.weight.T, []
    for start, length in zip(starts_of(lengths), lengths):
        for t in range(start, start + length):
            rows.append(convolved(layer, [inputs[:, s] for s in range(start, t + 1)]))
    keys = heads * layer.sizes.key_dim
    q, k, v = torch.stack(rows, 1).split([keys, keys, inputs.shape[-1] - 2 * keys], -1)
    q, k = (unit(y.unflatten(-1, (heads, -1))) for y in (q, k))
    return q, k, v.unflatten(-1, (-1, layer.sizes.value_dim))


def rule(
    layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, x: Tensor, log_decay: Tensor | None, lengths: Sequence[int]
) -> Tensor:
    beta = sigmoid(x @ layer.beta.weight.T) * (2 if layer.negative_eigenvalues else 1)
    o, _ = delta_rule(q, k, v, beta, log_decay, starts=starts_of(lengths), scale=q.shape[-1] ** -0.5)
    return rms(o, layer.norm.weight).flatten(-2)


def deltanet_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int], heads: int) -> Tensor:
    q, k, v = projected(layer, x, lengths, heads)
    return rule(layer, q, k, v, x, None, lengths) @ layer.out.weight.T


def gated_deltanet_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int], heads: int) -> Tensor:
    q, k, v = projected(layer, x, lengths, heads)
    group = v.shape[2] // heads
    q, k = (torch.stack([y[:, :, head // group] for head in range(v.shape[2])], 2) for y in (q, k))
    log_decay = -layer.log_a.exp() * softplus(x @ layer.decay.weight.T + layer.dt_bias)
    o = rule(layer, q, k, v, x, log_decay, lengths)
    return (o * swish(x @ layer.gate.weight.T)) @ layer.out.weight.T


def kda_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int], heads: int) -> Tensor:
    q, k, v = projected(layer, x, lengths, heads)
    logits = (x @ layer.decay[0].weight.T @ layer.decay[1].weight.T + layer.dt_bias).unflatten(-1, (heads, -1))
    rates = layer.log_a.exp()[:, None]
    bound = layer.lower_bound
    log_decay = -rates * softplus(logits) if bound is None else bound * sigmoid(rates * logits)
    o = rule(layer, q, k, v, x, log_decay, lengths)
    gate = x @ layer.gate[0].weight.T @ layer.gate[1].weight.T + layer.gate[1].bias
    return (o * sigmoid(gate)) @ layer.out.weight.T


# --- mixture of memories ---------------------------------------------------------------------------------------------


def mom_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """One sequence and document at a time; each memory a list of the inputs it got, and its state."""
    sequences = []
    for sequence in x:
        rows: list[Tensor] = []
        for start, length in zip(starts_of(lengths), lengths):
            rows += mom_document(layer, sequence[start : start + length])
        sequences.append(torch.stack(rows))
    return torch.stack(sequences)


def mom_document(layer: nn.Module, tokens: Tensor) -> list[Tensor]:
    memories: dict[int, tuple[list[Tensor], Tensor]] = {}
    heads, key_dim, value_dim = layer.sizes.keys, layer.sizes.key_dim, layer.sizes.value_dim
    rows = []
    for x in tokens:
        o = torch.zeros(heads, value_dim, dtype=torch.float64)
        for memory, weight in mom_weights(layer, x).items():
            inputs, state = memories.get(memory, ([], torch.zeros(heads, key_dim, value_dim, dtype=torch.float64)))
            inputs = [*inputs, torch.cat([layer.q.weight @ x, part(layer.kv.weight, memory, layer) @ x])]
            q, k, v = convolved(layer, inputs).split([heads * key_dim, heads * key_dim, heads * value_dim])
            q, k, v = unit(q.view(heads, -1)), unit(k.view(heads, -1)), v.view(heads, -1)
            if layer.decay is not None:
                rate = softplus(part(layer.decay.weight, memory, layer) @ x + layer.dt_bias)
                state = (-layer.log_a.exp() * rate).exp()[:, None, None] * state
            beta = sigmoid(part(layer.beta.weight, memory, layer) @ x)[:, None]
            error = v - (k[:, :, None] * state).sum(1) * layer.update.endswith("delta")
            state = state + k[:, :, None] * (beta * error)[:, None]
            memories[memory] = (inputs, state)
            o = o + weight * (q[:, :, None] * state).sum(1) / key_dim**0.5
        normed = rms(o, layer.norm.weight).flatten()
        rows.append(layer.out.weight @ (normed * swish(layer.gate.weight @ x)))
    return rows


def mom_weights(layer: nn.Module, x: Tensor) -> dict[int, Tensor | float]:
    """The memories that a token ``x [dim]`` is sent to, and what their outputs count."""
    shares = (layer.router.weight @ x).exp()
    best = sorted(range(layer.memories), key=lambda memory: -shares[memory].item())[: layer.top_k]
    total = sum(shares[memory] for memory in best)
    weights: dict[int, Tensor | float] = {memory: shares[memory] / total for memory in best}
    return weights | {layer.memories: 1.0} if layer.shared else weights


def part(weight: Tensor, memory: int, layer: nn.Module) -> Tensor:
    """The rows of a projection that are one memory's."""
    return weight.chunk(layer.memories + layer.shared)[memory]
