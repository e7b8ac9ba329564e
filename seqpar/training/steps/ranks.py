"""Who does what: some ranks share a sequence, the others train on other sequences of the same step."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from seqpar.collectives import Group, Ledger
from seqpar.training.gradients import sum_over_ranks


@dataclass(frozen=True)
class Ranks:
    """``world``: all; ``sequence``: those that share my sequence; ``replicas``: those that stand where I do in the
    other sequences. ``world`` counts what this rank sends in any of them."""

    world: Ledger
    sequence: Group
    replicas: Group


def split_ranks(group: Group, share: int = 0) -> Ranks:
    """Ranks 0 to ``share - 1`` share the first sequence, the next ones the second, and so on (0: all share one).

    Raises ``ValueError`` unless ``share`` divides the number of ranks.
    """
    share = share or group.size
    if group.size % share:
        raise ValueError(f"{share} ranks to a sequence must divide the number of ranks, {group.size}")
    world = Ledger(group)
    sequence = world.partition([range(first, first + share) for first in range(0, group.size, share)])
    replicas = world.partition([range(place, group.size, share) for place in range(share)])
    return Ranks(world, sequence, replicas)


def sum_over_replicas(parameters: Iterable[Tensor], replicas: Group) -> None:
    """Replace every gradient by its sum over replicas, in fp32 (fp64), a few messages for all of them; where neither
    DDP nor FSDP2 does it. None stays None where no replica has one."""
    trained = [each for each in parameters if each.requires_grad]
    if replicas.size == 1 or not trained:
        return
    for each, gradient in zip(trained, sum_over_ranks([each.grad for each in trained], trained, replicas)):
        each.grad = gradient
