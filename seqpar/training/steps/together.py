"""What one rank alone finds out - a file that is not there, a text that is none - all ranks say."""

from collections.abc import Callable
from typing import TypeVar

import torch

from seqpar.collectives import Group

T = TypeVar("T")


def together(group: Group, run: Callable[[], T], device: torch.device | str = "cpu") -> T:
    """What ``run()`` returns; if it raises ``ValueError`` on any rank, every rank raises that of the first such rank.

    ``run`` sends no messages, or none that another rank waits for where it raises. One message of one number, where
    all is well. ``device``: of messages, for NCCL the GPU.
    """
    result: list[T] = []
    said = b""
    try:
        result.append(run())
    except ValueError as error:
        said = (str(error) or type(error).__name__).encode(errors="replace")
    sizes = torch.cat(group.all_gather(torch.tensor([len(said)], device=device)).wait()).tolist()
    if not any(sizes):
        return result[0]
    mine = torch.tensor(list(said), dtype=torch.uint8, device=device)
    texts = group.all_gather(mine, [[size] for size in sizes]).wait()
    raise ValueError(next(bytes(text.tolist()).decode() for text in texts if text.numel()))
