"""Who does what: some ranks share a sequence, the others train on other sequences of the same step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from options import Options, Stop
from torch import Tensor

from seqpar.collectives import Group, Ledger, alone


@dataclass(frozen=True)
class Ranks:
    """Where a rank stands. Both groups count what this rank sends."""

    sequence: Ledger
    """The ranks that share my sequence."""
    replicas: Ledger
    """The ranks that hold my part of the other sequences."""
    mine: Sequence[int]
    """Which of a step's sequences this rank works on: one of them; alone, all."""
    num_sequences: int
    """Sequences per step."""
    device: torch.device

    @property
    def bytes_(self) -> int:
        """Sent so far."""
        return self.sequence.bytes_ + self.replicas.bytes_

    def sum_over_replicas(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the sequences of the step: one message for all."""
        if self.replicas.size == 1:
            return
        exact = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
        total = self.replicas.all_reduce(torch.cat([tensor.flatten().to(exact) for tensor in tensors])).wait()
        for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def split_ranks(options: Options, group: Group, device: torch.device) -> Ranks:
    """Ranks 0 to N - 1 share the first sequence of each step, the next N the second one, and so on."""
    share = options.sequence_ranks or group.size
    if group.size % share:
        raise ValueError(f"--sequence-ranks {share} must divide the number of ranks, {group.size}")
    num_sequences = group.size // share
    sequence = group.partition([range(first, first + share) for first in range(0, group.size, share)])
    replicas = group.partition([range(place, group.size, share) for place in range(share)])
    return Ranks(Ledger(sequence), Ledger(replicas), [group.rank // share], num_sequences, device)


def one_rank(like: Ranks) -> Ranks:
    """A single rank that does the work of all, with every sequence whole."""
    return Ranks(Ledger(alone()), Ledger(alone()), range(like.num_sequences), like.num_sequences, like.device)


def any_stop(prepared: object, group: Group, device: torch.device) -> int | None:
    """The exit code if any rank has to stop; the first that has to says why, the others nothing."""
    stop = prepared if isinstance(prepared, Stop) else None
    code = -1 if stop is None else stop.code
    codes = torch.cat(group.all_gather(torch.tensor([code], device=device)).wait()).tolist()
    first = next((rank for rank, other in enumerate(codes) if other >= 0), None)
    if first is None:
        return None
    if stop is not None and first == group.rank:
        stop.print()
    return int(codes[first])
