"""What the tests of cut functions share: inputs from a seed, relative errors over all ranks, lengths and layouts."""

import random
from itertools import pairwise

import torch

from seqpar import Shard

LAYOUTS = ("contiguous", "zigzag", "striped", "fragments")
SIZES = (1, 2, 3, 4, 5, 7, 8)


def tensors(seed, *shapes, dtype=torch.float64):
    """Standard normal tensors, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def cut(lengths, group, layout, seed=0):
    """A shard of any layout; "fragments" deals up to two random ranges to each rank, some of them empty."""
    if layout != "fragments":
        return Shard.of(lengths, group, layout)
    rng, tokens = random.Random(seed), sum(lengths)
    bounds = sorted(rng.choices(range(tokens + 1), k=2 * group.size - 1))
    ranges = list(zip([0, *bounds], [*bounds, tokens]))
    rng.shuffle(ranges)
    return Shard.of(lengths, group, fragments=[sorted(ranges[2 * r : 2 * r + 2]) for r in range(group.size)])


def leaves(shard, *inputs, dtype=torch.float64):
    """My rows of the inputs, as leaves that want gradients."""
    return [shard.take(x).to(dtype).clone().requires_grad_() for x in inputs]


def relative_error(parts, whole):
    """Norm of the difference over all ranks, relative to the norm of the whole. ``parts``: (my part, expected part)."""
    difference = sum((got.double() - expected).norm() ** 2 for got, expected in parts) ** 0.5
    return float(difference / whole.norm().clamp(min=1e-3))


def spread(results):
    """Per output: the pairs (got, expected) of all ranks, from each rank's list of pairs."""
    return list(zip(*results))


def lengths_around(size, per_rank=6):
    """Document lengths whose bounds lie one before, on and one after the edges of a contiguous cut, and odd ones."""
    total = size * per_rank
    edges = [per_rank * r for r in range(1, size)]
    cases = [[1], [total], [total + 1], [total - 1], [0, total, 0], [max(size - 1, 1)], [3, 0, 0, 1, 2 * total, 1, 0]]
    for shift in (-1, 0, 1):
        bounds = [0, *(edge + shift for edge in edges), total]
        cases.append([stop - start for start, stop in pairwise(bounds)])
    return cases
