"""Where a layer stands: which tokens are mine, who shares the sequence, how information crosses the cuts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from collectives import Group, alone
from seqpar.exchanged import Exchanged, Slot
from seqpar.shard import Shard

Tensors = tuple[Tensor, ...]
TokenWise = Callable[[str, Callable[..., Tensors], Tensors], Tensors]  # name, function(rows, *inputs), inputs


def at_once(name: str, function: Callable[..., Tensors], inputs: Tensors) -> Tensors:
    """What a layer does with each of its tokens, for all of them and once."""
    return function(slice(None), *inputs)


@dataclass(frozen=True)
class Cut:
    """What a layer that mixes tokens is called with, besides its input: ``layer(x, cut)``.

    A layer that does not mix tokens does not take one. One cut serves one forward pass, and is passed on explicitly, so
    that what runs again inside backward (activation checkpointing) stands where it stood. ``token_wise`` runs the parts
    of a layer that mix no tokens, so that offload can run them again for some of the tokens.
    """

    shard: Shard
    group: Group
    transport: str = "ring"
    scan: str = "all_gather"
    exchanged: Exchanged = field(default_factory=Exchanged, compare=False, repr=False)
    token_wise: TokenWise = field(default=at_once, compare=False, repr=False)

    @staticmethod
    def whole(lengths: Sequence[int]) -> "Cut":
        """The cut that is none: all documents of ``lengths`` tokens on one device."""
        return Cut(Shard.of(lengths, alone()), alone())

    def slot(self, layer: torch.nn.Module) -> Slot:
        """Where this call of ``layer`` keeps what crosses the cuts, in case it is computed again."""
        return self.exchanged.slot(layer)
