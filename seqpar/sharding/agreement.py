"""Ranks must agree on what they train: the same batch, the same options, the same weights.

Each rank's fingerprint (a few integers) is gathered, and every rank raises the same error where two differ. Ranks that
silently train on different batches, or from different weights, are the failure this prevents.

A digest of a tensor is a number on the tensor's device, made without waiting for it; so is the table of everyone's. On
the CPU it is read at once. On another device reading it would wait for all that is queued there, so a caller may read
it later (:class:`Comparison`).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.group import where

_PART = {"cpu": 1 << 16}  # words looked at together: what a core's cache holds; on a GPU launches cost more
_ODD = (-0x61C8864680B583EB, -0x4B47D0C5A1A6B2D3, -0x40A7B892E31B1A47)


class Fact(NamedTuple):
    """What must be the same on every rank: a number, the words for mine (or what finds them, if they cost), and, if the
    number itself tells something, how to say it (``"call {}"``)."""

    number: int | Tensor
    description: str | Callable[[], str]
    says: str = ""


Facts = Mapping[str, Fact | tuple[int | Tensor, str | Callable[[], str]]]


def words(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as int64, filled up with zeros."""
    bytes_ = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if bytes_.storage_offset() % 8 or bytes_.numel() % 8:
        bytes_ = torch.cat([bytes_, bytes_.new_zeros(-bytes_.numel() % 8)])
    return bytes_.view(torch.int64)


def digest(tensor: Tensor) -> Tensor:
    """64 bits that depend on a tensor's shape, dtype, every value and its place: a number on the tensor's device.

    Each word is multiplied, moved by a multiple of its place, and mixed (xor of shifted bits, multiply, xor) before all
    are added. Without the mixing the sum would be linear, and two documents that are swapped would often cancel.
    """
    sums = torch.tensor(text_fingerprint(f"{tuple(tensor.shape)} {tensor.dtype}"), device=tensor.device)
    first = 1
    for part in words(tensor).split(_PART.get(tensor.device.type, 1 << 22)):
        mixed = torch.arange(first, first + len(part), device=part.device).mul_(_ODD[1]).add_(part, alpha=_ODD[0])
        mixed ^= mixed >> 32
        mixed *= _ODD[2]
        mixed ^= mixed >> 29
        sums = sums + mixed.sum()
        first += len(part)
    return sums


def fingerprint(tensor: Tensor | None) -> int:
    """63 bits that depend on a tensor's shape, dtype and every value."""
    return 0 if tensor is None else int(digest(tensor)) & (2**63 - 1)


def text_fingerprint(text: str) -> int:
    """63 bits that depend on ``text``; the same in every process."""
    return _fingerprint_of(text.encode())


def lengths_fingerprint(lengths: Sequence[int]) -> int:
    """63 bits that depend on the lengths of documents; whole numbers are hashed together, not one by one."""
    try:
        whole = sum(lengths).__index__()  # of whole numbers only, so that no part of one is cut off below
        numbers = np.fromiter(lengths, np.int64, len(lengths))
    except (TypeError, ValueError, AttributeError, OverflowError):
        return text_fingerprint(str(list(lengths)))
    return text_fingerprint(f"{whole} {hashlib.sha256(numbers.data).hexdigest()}")


def _fingerprint_of(bytes_: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(bytes_, digest_size=8).digest(), "big") >> 1


def weights_fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> int:
    """63 bits that depend on every parameter's name, shape and values."""
    return text_fingerprint(" ".join(f"{name}:{fingerprint(parameter)}" for name, parameter in parameters))


class Comparison:
    """Everyone's numbers, gathered; :meth:`conclude` reads them."""

    def __init__(self, facts: Facts, group: Group, device: torch.device) -> None:
        self._facts = {name: Fact(*fact) for name, fact in facts.items()}
        self._group = group
        table = torch.stack(group.all_gather(_numbers(self._facts.values(), device)).wait())
        self._event = torch.cuda.Event() if table.is_cuda else None
        if self._event is not None:
            table = torch.empty_like(table, device="cpu", pin_memory=True).copy_(table, non_blocking=True)
            self._event.record()
        self._table = table

    def __deepcopy__(self, memo: object) -> "Comparison":
        return self

    def columns(self) -> dict[str, list[int]]:
        """Every rank's number of each fact. Waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._facts, self._table.t().tolist()))

    def conclude(self, but: Sequence[str] = ()) -> dict[str, list[int]]:
        """The columns; raises the same ``ValueError`` on every rank if the numbers of a fact not in ``but`` differ."""
        columns = self.columns()
        for name, column in columns.items():
            if name not in but and len(set(column)) > 1:
                raise ValueError(f"{where(self._group)}: {_difference(name, column, self._facts[name])}")
        return columns


def _numbers(facts: Iterable[Fact], device: torch.device) -> Tensor:
    """All numbers in one tensor on the device; those that are there already do not leave it."""
    known = [0 if isinstance(fact.number, Tensor) else fact.number for fact in facts]
    numbers = torch.tensor(known, dtype=torch.int64).to(device, non_blocking=True)
    for index, fact in enumerate(facts):
        if isinstance(fact.number, Tensor):
            numbers[index] = fact.number
    return numbers


def _difference(name: str, column: Sequence[int], fact: Fact) -> str:
    odd = odd_ranks(column)
    mine = fact.description if isinstance(fact.description, str) else fact.description()
    if not fact.says:
        return f"{name} must be the same on every rank, but {ranks_differ(odd)}; mine: {mine}"
    told = ", ".join(f"rank {rank} is at {fact.says.format(column[rank])}" for rank in odd[:8])
    return (
        f"{name} must be the same on every rank, but {told}{', ...' if len(odd) > 8 else ''}, the others at "
        f"{fact.says.format(_usual(column))}: did a rank skip or repeat one? Mine: {mine}"
    )


def _usual(column: Sequence[int]) -> int:
    """The number that most ranks have."""
    return max(Counter([column[0], *column]).items(), key=lambda item: item[1])[0]


def odd_ranks(column: Sequence[int]) -> list[int]:
    """The ranks whose number is not the one that most ranks have (of two that are as frequent, rank 0's)."""
    usual = _usual(column)
    return [rank for rank, number in enumerate(column) if number != usual]


def ranks_differ(odd: Sequence[int]) -> str:
    """Whose numbers differ from the others', in words."""
    others = "the others'" if 0 in odd else "rank 0's"
    if len(odd) == 1:
        return f"rank {odd[0]}'s differs from {others}"
    return f"those of ranks {', '.join(map(str, odd))} differ from {others}"


def check_same(what: Facts, group: Group, device: torch.device) -> None:
    """Raise the same ``ValueError`` on every rank if any rank's numbers differ; ``what`` names them and says them.

    One small all-gather; nothing at size 1.
    """
    if group.size > 1:
        Comparison(what, group, device).conclude()
