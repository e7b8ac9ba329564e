"""Where a layer stands: which tokens are mine, who shares the sequence, how information crosses the cuts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from collectives import Group, alone
from seqpar.exchanged import Exchanged, Slot
from seqpar.shard import Shard


@dataclass(frozen=True)
class Cut:
    """What a layer that mixes tokens is called with, besides its input: ``layer(x, cut)``.

    A layer that does not mix tokens does not take one. One cut serves one forward pass, and is passed on explicitly, so
    that what runs again inside backward (activation checkpointing) stands where it stood.
    """

    shard: Shard
    group: Group
    transport: str = "ring"
    scan: str = "all_gather"
    exchanged: Exchanged = field(default_factory=Exchanged, compare=False, repr=False)

    @staticmethod
    def whole(lengths: Sequence[int]) -> "Cut":
        """The cut that is none: all documents of ``lengths`` tokens on one device."""
        return Cut(Shard.of(lengths, alone()), alone())

    def slot(self, layer: torch.nn.Module) -> Slot:
        """Where this call of ``layer`` keeps what crosses the cuts, in case it is computed again."""
        return self.exchanged.slot(layer)
