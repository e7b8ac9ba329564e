"""What the kernels are told about decay and documents, chunk by chunk: no sum of logarithms is subtracted from one."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gates:
    """Decay of the tokens of all chunks, fp32; the channels c are none for gates that all key channels share.

    ``steps`` [b, h, n, C, c]: log_decay, None without. ``documents`` [n C]: the number of documents that started up to
    and with a token. ``into`` [b, h, n, C, c]: decay of the state that enters a chunk on its way to a token. ``out``
    (same shape): of what a token wrote on its way to the end of the chunk. ``across`` [b, h, n, c]: of the chunk.
    """

    steps: Tensor | None
    documents: Tensor
    into: Tensor
    out: Tensor
    across: Tensor


def build_gates(q: Tensor, log_decay: Tensor | None, starts: tuple[int, ...], chunk: int) -> Gates:
    """The gates of the tokens of q [b, t, h, k], in chunks."""
    b, t, h, _ = q.shape
    num_chunks = -(-t // chunk)
    documents = count_documents(starts, num_chunks * chunk).to(q.device)
    per_chunk = documents.view(num_chunks, chunk)
    before = torch.nn.functional.pad(per_chunk[:-1, -1], (1, 0))[:num_chunks]
    seen = per_chunk == before[:, None]  # no document started since the chunk did
    kept = per_chunk == per_chunk[:, -1:]  # none starts before it ends
    if log_decay is None:
        into, out = (mask.float().expand(b, h, -1, -1).contiguous() for mask in (seen, kept))
        return Gates(None, documents, into, out, into[:, :, :, -1].contiguous())
    steps = log_decay.new_zeros(b, h, num_chunks * chunk, *log_decay.shape[3:], dtype=torch.float32)
    steps[:, :, :t] = log_decay.transpose(1, 2)
    steps = steps.unflatten(2, (num_chunks, chunk))
    later = torch.zeros_like(steps)
    later[:, :, :, :-1] = steps[:, :, :, 1:].flip(3).cumsum(3).flip(3)
    if steps.dim() == 5:
        seen, kept = seen.unsqueeze(-1), kept.unsqueeze(-1)
    into, out = steps.cumsum(3).exp_().mul_(seen), later.exp_().mul_(kept)
    return Gates(steps, documents, into, out, into[:, :, :, -1].contiguous())


def count_documents(starts: tuple[int, ...], size: int) -> Tensor:
    """[size]: the number of ``starts`` up to and with each token."""
    flags = torch.zeros(size, dtype=torch.int32)
    flags[list(starts)] = 1
    return flags.cumsum(0, dtype=torch.int32)
