"""S4, LSSL, LMU and LMUFormer once more, token by token in fp64, from their papers' equations."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.layers.oracles.oracles_decay import documents, stacked
from tests.layers.oracles.oracles_ssm import gelu, sigmoid, with_conjugates


def sampled(a: Tensor, b: Tensor, step: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """``h' = a h + b u`` for one step: the bilinear rule; or the hold by its series, halved until it converges."""
    one = torch.eye(len(a), dtype=a.dtype)
    if rule == "bilinear":
        inverse = torch.linalg.inv(one - step / 2 * a)
        return inverse @ (one + step / 2 * a), inverse @ (step * b)
    halvings = 3
    small = step / 2**halvings
    kept, sums, term = one, one, one  # exp(s a), and its integral over s
    for order in range(1, 30):
        term = term @ a * small / order
        kept, sums = kept + term, sums + term / (order + 1)
    drive = small * (sums @ b)
    for _ in range(halvings):
        kept, drive = kept @ kept, kept @ drive + drive
    return kept, drive


def systems(
    x: Tensor, lengths: Sequence[int], a: Sequence[Tensor], b: Sequence[Tensor], c: Sequence[Tensor]
) -> list[Tensor]:
    """What each channel of ``x`` makes of its own system: per token ``[b, d, q]``."""
    rows = []
    for document in documents(lengths):
        states: list[Tensor] = [x.new_zeros(len(x), len(each)).to(each.dtype) for each in b]
        for t in document:
            for d, state in enumerate(states):
                states[d] = state @ a[d].T + x[:, t, d, None] * b[d]
            rows.append(torch.stack([state @ c[d].T for d, state in enumerate(states)], 1))
    return rows


# --- S4 --------------------------------------------------------------------------------------------------------------


def s4_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int], rule: str) -> Tensor:
    """With complex states, the conjugates, too, so that the sum over them is real by itself."""
    rate = with_conjugates(torch.complex(-layer.log_rate.exp(), layer.frequency), 1)
    reads = [layer.c] if layer.c_back is None else [layer.c, layer.c_back]
    p, b, *reads = (with_conjugates(torch.view_as_complex(each), 1) for each in (layer.p, layer.b, *reads))
    q = p if layer.q is None else with_conjugates(torch.view_as_complex(layer.q), 1)
    kept, drives = [], []
    for d in range(x.shape[2]):
        a = torch.diag(rate[d]) - torch.outer(p[d], q[d].conj())
        kept_d, drive = sampled(a, b[d], layer.log_step[d].exp(), rule)
        kept.append(kept_d)
        drives.append(drive)
    return both_ways(layer, x, lengths, kept, drives, reads)


def both_ways(
    layer: nn.Module, x: Tensor, lengths: Sequence[int], kept: list[Tensor], drives: list[Tensor], reads: list[Tensor]
) -> Tensor:
    """The systems forwards, and once more (if there are two ``reads``) of all that is turned round."""
    ways = [systems(x, lengths, kept, drives, reads[0][:, None])]
    if len(reads) == 2:
        ways.append(systems(x.flip(1), list(reversed(lengths)), kept, drives, reads[1][:, None])[::-1])
    rows = []
    for t, outs in enumerate(zip(*ways)):
        y = sum(outs[1:], outs[0])
        assert y.imag.abs().max() < 1e-9
        read = gelu(y.real[..., 0] + layer.skip * x[:, t])
        value, gate = (read @ layer.out.weight.T + layer.out.bias).chunk(2, -1)
        rows.append(value * sigmoid(gate))
    return stacked(rows, x)


def s4d_both_ways(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """With a diagonal A, held, whose inputs all have weight 1."""
    rate = with_conjugates(torch.complex(-layer.log_rate.exp(), layer.frequency), 1)
    reads = [with_conjugates(torch.view_as_complex(each), 1) for each in (layer.c, layer.c_back)]
    kept = [torch.diag((step.exp() * each).exp()) for step, each in zip(layer.log_step, rate)]
    drives = [((step.exp() * each).exp() - 1) / each for step, each in zip(layer.log_step, rate)]
    return both_ways(layer, x, lengths, kept, drives, reads)


# --- LSSL ------------------------------------------------------------------------------------------------------------


def lssl_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    each = [sampled(a, b, step.exp(), "bilinear") for a, b, step in zip(layer.a, layer.b, layer.log_step)]
    rows = []
    for t, y in enumerate(systems(x, lengths, [a for a, _ in each], [b for _, b in each], layer.c)):
        read = gelu(y + layer.skip * x[:, t, :, None])
        rows.append(read.flatten(1) @ layer.out.weight.T + layer.out.bias)
    return stacked(rows, x)


# --- LMU -------------------------------------------------------------------------------------------------------------


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def legendre(size: int, theta: float) -> tuple[Tensor, Tensor]:
    """The memory's A and B for one token, entry by entry."""
    a = [[(2 * i + 1) / theta * (-1.0 if i < j else (-1.0) ** (i - j + 1)) for j in range(size)] for i in range(size)]
    b = [(2 * i + 1) / theta * (-1.0) ** i for i in range(size)]
    exact = torch.float64
    return sampled(torch.tensor(a, dtype=exact), torch.tensor(b, dtype=exact), torch.tensor(1.0, dtype=exact), "zoh")


def lmu_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int], size: int, theta: float) -> Tensor:
    a, b = legendre(size, theta)
    u = relu(x @ layer.encode.weight.T + layer.encode.bias)
    memories = systems(u, lengths, [a], [b], [torch.eye(size, dtype=torch.float64)])
    rows = [
        relu(torch.cat([m[:, 0], x[:, t]], -1) @ layer.out.weight.T + layer.out.bias) for t, m in enumerate(memories)
    ]
    return stacked(rows, x)


# --- LMUFormer -------------------------------------------------------------------------------------------------------


def batch_norm(layer: nn.Module, x: Tensor) -> Tensor:
    """Over everything there is."""
    numbers = x.flatten(0, 1)
    mean = sum(numbers.unbind(0)) / len(numbers)
    var = sum((row - mean) ** 2 for row in numbers.unbind(0)) / len(numbers)
    return (x - mean) / (var + 1e-5).sqrt() * layer.weight + layer.bias


def centred_conv(x: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
    rows = []
    for document in documents(lengths):
        for t in document:
            seen = [(t - 1 + i, weight[..., i]) for i in range(3) if t - 1 + i in document]
            rows.append(sum(x[:, s] @ of.T for s, of in seen))
    return stacked(rows, x)


def lmuformer_layer(layer: nn.Module, x: Tensor, lengths: Sequence[int], size: int, theta: float) -> Tensor:
    if layer.embedding is not None:
        *convs, positions = layer.embedding.convs
        for conv, norm in zip(convs, layer.embedding.norms):
            x = batch_norm(norm, relu(centred_conv(x, conv, lengths)))
        x = x + centred_conv(x, positions, lengths)
    h = lmu_layer(layer.lmu, x, lengths, size, theta)
    mixed = batch_norm(layer.norm, h @ layer.out.weight.T + layer.out.bias)
    return mixed if layer.embedding is None else x + mixed
