"""Ranks must agree on what they train: the same batch, the same options, the same weights at the start.

Each rank's fingerprint (a few integers) is gathered, and every rank raises the same error where two differ. Ranks that
silently train on different batches, or from different weights, are the failure this prevents.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.group import where

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 1 << 22  # elements looked at together, so that a large parameter needs little memory


def fingerprint(tensor: Tensor | None) -> int:
    """63 bits that depend on a tensor's shape, dtype and every value."""
    if tensor is None:
        return 0
    bits = tensor.detach().contiguous().flatten().view(_INTEGER[tensor.element_size()])
    sums = torch.zeros(1, dtype=torch.int64, device=tensor.device)
    for number, part in enumerate(bits.split(_PART)):
        place = torch.arange(1, len(part) + 1, device=part.device)
        sums = sums * 31 + number + ((part.to(torch.int64) + 1) * (place * 0x9E3779B1 & 0x7FFFFFFF)).sum()
    return text_fingerprint(f"{tuple(tensor.shape)} {tensor.dtype} {int(sums)}")


def text_fingerprint(text: str) -> int:
    """63 bits that depend on ``text``; the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def check_same(what: Mapping[str, tuple[int, str]], group: Group, device: torch.device) -> None:
    """Raise the same ``ValueError`` on every rank if any rank's numbers differ; ``what`` names them and says them.

    One small all-gather; nothing at size 1.
    """
    if group.size == 1:
        return
    numbers = torch.tensor([number for number, _ in what.values()], dtype=torch.int64, device=device)
    table = torch.stack(group.all_gather(numbers).wait()).tolist()
    for index, (name, (_, description)) in enumerate(what.items()):
        column = [row[index] for row in table]
        if len(set(column)) > 1:
            odd = [rank for rank, number in enumerate(column) if number != column[0]]
            raise ValueError(
                f"{where(group)}: {name} must be the same on every rank, but {_ranks(odd)} from rank 0's; "
                f"mine: {description}"
            )


def _ranks(odd: Sequence[int]) -> str:
    return f"rank {odd[0]}'s differs" if len(odd) == 1 else f"those of ranks {', '.join(map(str, odd))} differ"


def weights_fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> int:
    """63 bits that depend on every parameter's name, shape and values."""
    return text_fingerprint(" ".join(f"{name}:{fingerprint(parameter)}" for name, parameter in parameters))
