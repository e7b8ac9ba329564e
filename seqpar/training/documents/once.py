"""Read by one rank, handed on to those that share its sequences: files are opened and texts tokenized once for all."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.training.documents.packing import Piece, Place
from seqpar.training.documents.stream import Batch, Documents, Step, batch_from

_STEP, _END, _ERROR = range(3)


def read_once(documents: Documents, group: Group, device: torch.device | str = "cpu") -> Generator[Step]:
    """The steps of ``documents``, on every rank of ``group``, of which rank 0 alone reads.

    Law: what iterating over ``documents`` gives on each rank, and the same states. All ranks iterate alike, over
    documents that were made with the same arguments. Three messages for a step, each down a tree: sizes, pieces, and
    tokens in 4 bytes each. ``device``: where messages are, and the tokens of ranks that got them: for NCCL the GPU.
    What rank 0 raises as ``ValueError`` is raised on every rank.
    """
    if group.size == 1:
        yield from documents
        return
    with closing(iter(documents)) as steps:
        while True:
            step = _following(steps, group, device) if group.rank == 0 else _received(group, device)
            if step is None:
                return
            if group.rank:
                documents.load_state_dict(documents.state_after(step))
            yield step


def _following(steps: Iterator[Step], group: Group, device: torch.device | str) -> Step | None:
    try:
        step = next(steps, None)
    except ValueError as error:
        text = list(str(error).encode())
        _passed_on(torch.tensor([_ERROR, len(text), 0], device=device), group)
        _passed_on(torch.tensor(text, dtype=torch.int64, device=device), group)
        raise
    if step is None:
        _passed_on(torch.tensor([_END, 0, 0], device=device), group)
        return None
    words = _described(step)
    tokens = torch.cat([batch.tokens[0] for batch in step.batches]).to(device, torch.int32)
    for message in (torch.tensor([_STEP, len(words), len(tokens)], device=device), torch.tensor(words, device=device)):
        _passed_on(message, group)
    _passed_on(tokens, group)
    return step


def _received(group: Group, device: torch.device | str) -> Step | None:
    kind, num_words, num_tokens = _passed_on(torch.empty(3, dtype=torch.int64, device=device), group).tolist()
    if kind == _END:
        return None
    words = _passed_on(torch.empty(num_words, dtype=torch.int64, device=device), group).tolist()
    if kind == _ERROR:
        raise ValueError(bytes(words).decode())
    tokens = _passed_on(torch.empty(num_tokens, dtype=torch.int32, device=device), group)
    return _read_back(words, tokens.long())


def _described(step: Step) -> list[int]:
    """The place after it, and the pieces of its batches, in numbers."""
    words = [step.place.epoch, step.place.position, step.place.taken]
    for batch in step.batches:
        words.append(len(batch.pieces))
        for piece in batch.pieces:
            words += [piece.document, piece.start, piece.stop, piece.context]
    return words


def _read_back(words: Sequence[int], tokens: Tensor) -> Step:
    batches: list[Batch] = []
    at = 3
    while at < len(words):
        end = at + 1 + 4 * words[at]
        pieces = [Piece(*words[first : first + 4]) for first in range(at + 1, end, 4)]
        size = sum(piece.size for piece in pieces)
        batches.append(batch_from(tokens[:size], pieces))
        tokens, at = tokens[size:], end
    return Step(tuple(batches), Place(*words[:3]))


def _passed_on(message: Tensor, group: Group) -> Tensor:
    """Rank 0's message, on every rank: each gets it once, and hands it on to at most ``log2`` of the ranks."""
    if not message.numel():
        return message
    reach = 1 << (group.size - 1).bit_length()
    while reach > 1:
        whole, reach = reach, reach // 2
        if group.rank % whole == 0 and group.rank + reach < group.size:
            group.exchange(message, group.rank + reach, None, None).wait()
        elif group.rank % whole == reach:
            group.exchange(None, None, message, group.rank - reach).wait()
    return message
