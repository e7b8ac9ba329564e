"""The ring: blocks go from rank to rank, the next one already travelling while the caller works on this one.

Hop ``h`` brings rank ``r`` the block of rank ``r - h``. A block carries only the rows that some rank further on still
needs; rows nobody needs any more stay behind, and a block without rows is no message. Gradients follow one hop behind
their block and go home, straight, from the last rank that needed the rows (Ring Self-Attention, arXiv 2105.13120, with
the online form of arXiv 2310.01889). Backward sends each row as often as forward, and its gradient as often again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from seqpar.collectives.agreed import agree
from seqpar.collectives.group import Group, Later, Pending
from seqpar.collectives.rows import Ranges, add_rows, count, pick


@dataclass(frozen=True)
class Hop:
    """One rank's part in one hop.

    ``rows``: how many rows of the block of rank ``source`` reach me; ``onward``: which of those I pass on; ``ending``:
    which end here, so that their gradients go home from me; ``returning``: which rows of my own block have their
    gradients come home in this hop, from ``rank + hop``.
    """

    source: int
    rows: int
    onward: Ranges
    ending: Ranges
    returning: Ranges


def ring(block: Tensor, group: Group, hops: Sequence[Hop]) -> Iterator[Tensor]:
    """Yield, hop by hop, the rows that reached me (the first is my own block), while the next ones travel.

    ``block``: ``[batch, tokens, ...]``. Law: the yielded rows are bit for bit those of their owner.
    """
    agree(group, "ring", (block.dtype, (*block.shape[:1], *block.shape[2:])))
    to, source = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    held = block
    for index, hop in enumerate(hops):
        following = hops[index + 1].rows if index + 1 < len(hops) else 0
        arriving = _pass_on(held, hop.onward, to, following, source, group)
        yield held
        received = arriving.wait()
        held = block.new_empty((block.shape[0], 0, *block.shape[2:])) if received is None else received


def _pass_on(
    held: Tensor, leaving: Ranges, to: int, arriving_rows: int, source: int, group: Group
) -> Pending[Tensor | None]:
    """Send some rows, receive some; either may be none, and then there is no message."""
    if not leaving and not arriving_rows:
        return Later(lambda: None)
    receive = held.new_empty((held.shape[0], arriving_rows, *held.shape[2:])) if arriving_rows else None
    return group.exchange(
        pick(held, leaving).contiguous() if leaving else None,
        to if leaving else None,
        receive,
        source if arriving_rows else None,
    )


def ring_gradients(block: Tensor, group: Group, hops: Sequence[Hop], visit: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The gradient of my block, summed over all ranks that it visits.

    ``visit(hop, rows)`` returns what my tokens add to the gradient of the rows that reached me, in the dtype in which
    gradients are summed (fp32 or fp64).
    """
    rank, size = group.rank, group.size
    home: Tensor | None = None
    following: Pending[Tensor | None] = Later(lambda: None)
    returning: list[tuple[Ranges, Pending[Tensor | None]]] = []
    for index, held in enumerate(ring(block, group, hops)):
        hop, gradient = hops[index], visit(index, held)
        received = following.wait()
        if received is not None:
            gradient += received
        if index == 0:
            home = gradient  # my own tokens' part stays at home
            continue
        next_rows = hops[index + 1].rows if index + 1 < len(hops) else 0
        following = _pass_on(gradient, hop.onward, (rank + 1) % size, next_rows, (rank - 1) % size, group)
        coming = count(hop.returning)
        arriving = _pass_on(gradient, hop.ending, hop.source, coming, (rank + index) % size, group)
        returning.append((hop.returning, arriving))
    assert home is not None
    for ranges, arriving in returning:
        rows = arriving.wait()
        if rows is not None:
            add_rows(home, ranges, rows)
    return home
