"""Where a layer stands: which tokens are mine, who shares the sequence, how information crosses the cuts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from seqpar.collectives import Group, alone
from seqpar.ops.compiling import apart, compiling
from seqpar.sharding.added import Added
from seqpar.sharding.chance import Chance, Random
from seqpar.sharding.exchanged import Exchanged, Slot
from seqpar.sharding.shard import Shard
from seqpar.sharding.states import States

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
    of a layer that mix no tokens, so that offload can run them again for some of the tokens. ``states``: what layers
    remember between calls, if anything. ``impl``: ``"auto"``, ``"reference"`` (torch) or ``"triton"``.
    """

    shard: Shard
    group: Group
    transport: str = "ring"
    scan: str = "all_gather"
    exchanged: Exchanged = field(default_factory=Exchanged, compare=False, repr=False)
    token_wise: TokenWise = field(default=at_once, compare=False, repr=False)
    states: States | None = field(default=None, compare=False, repr=False)
    chance: Chance = field(default_factory=Chance, compare=False, repr=False)
    impl: str = "auto"
    added: Added = field(default_factory=Added, compare=False, repr=False)
    _known: ClassVar[Tensor | None] = None  # no field: FSDP2's mixed precision makes a cut anew from all of its fields

    def __post_init__(self) -> None:
        if compiling():  # a tensor that is there is an input of compiled code; making it would be a graph break
            object.__setattr__(self, "_known", self._positions())
        if self.states is not None:
            self.states.called(self.shard.lengths)

    @staticmethod
    def whole(lengths: Sequence[int], states: States | None = None) -> "Cut":
        """The cut that is none: all documents of ``lengths`` tokens on one device."""
        return Cut(Shard.of(lengths, alone()), alone(), states=states)

    @property
    def positions(self) -> Tensor:
        """``[t]`` int64: the position of each of my tokens in its document, counted over all calls; ``[b, t]`` where
        rows of the batch stand at different positions (:meth:`States.joined`)."""
        return self._positions() if self._known is None else self._known

    @apart
    def _positions(self) -> Tensor:
        positions = self.shard.positions
        if self.states is None or not any(self.states.positions):
            return positions
        before = torch.tensor(self.states.rows or (self.states.position,))[:, None]
        positions = positions.repeat(len(before), 1)
        for piece in self.shard.pieces_of(self.shard.rank):
            if piece.document == 0:
                positions[:, piece.row : piece.row + piece.count] += before
        return positions if self.states.rows else positions[0]

    def random(self, layer: torch.nn.Module, device: torch.device | None = None) -> Random:
        """The random numbers of this call of ``layer``, those of one device: see :mod:`seqpar.sharding.chance`.

        Every rank asks for them alike. ``device``: that of its tensors, on which ranks agree.
        """
        (number, call), key = self.chance.stream(layer), self.chance.key(self.group, device or torch.device("cpu"))
        if number >= 1 << 16 or call >= 1 << 16:
            raise ValueError(f"there are random numbers for 65536 layers and calls of each, got {number} and {call}")
        return Random(self.shard, key, number << 16 | call)

    def add_loss(self, term: Tensor, name: str = "an auxiliary loss") -> None:
        """Add one number to the loss of this pass: a term of the whole batch, the same on every rank.

        Law: it is added once, whatever the number of ranks, and its gradients are those of one device. Make it of sums
        over all tokens (:func:`seqpar.sum_over_ranks`), not of means over mine: that ranks have the same number is
        checked. Raises ``ValueError`` as :meth:`seqpar.sharding.added.Added.add` does.
        """
        self.added.add(term, name)

    @apart
    def slot(self, layer: torch.nn.Module) -> Slot:
        """Where this call of ``layer`` keeps what crosses the cuts, in case it is computed again."""
        return self.exchanged.slot(layer)
