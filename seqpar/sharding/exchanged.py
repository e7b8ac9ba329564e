"""What crossed the cuts, kept for activation checkpointing, so that recomputing a layer sends nothing again.

``torch.utils.checkpoint`` runs a layer twice: once in forward, once inside backward. The first run keeps what its
messages brought (outputs of the ring, incoming states); the second is given it back, in the same order.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Crossed = tuple[Tensor | None, ...]


class Slot:
    """What one call of one layer got from other ranks: recorded, given back, or (by default) neither."""

    def __init__(self, record: list[Crossed] | None = None, replay: bool = False) -> None:
        self._record = record
        self._replay: Iterator[Crossed] | None = iter(record or []) if replay else None

    def keep(self, compute: Callable[[], Any]) -> Any:
        """The tensors (or None) of ``compute``, which sends messages; when recomputing, what it gave the first time."""
        if self._replay is not None:
            return next(self._replay)
        result = compute()
        if self._record is not None:
            self._record.append(tuple(None if tensor is None else tensor.detach() for tensor in result))
        return result


class Exchanged:
    """The slots of one forward pass, by layer."""

    def __init__(self) -> None:
        self._records: dict[int, list[Crossed] | None] = {}

    def slot(self, layer: torch.nn.Module) -> Slot:
        """The slot for the call of ``layer`` that begins now.

        A layer that is called twice in one forward pass gets none: which call is recomputed cannot be told, so its
        messages are sent again (by every rank alike).
        """
        key = id(layer)
        if backward_pass() is not None:
            record = self._records.get(key)
            return Slot() if record is None else Slot(record, replay=True)
        if key in self._records:
            self._records[key] = None
            return Slot()
        fresh: list[Crossed] = []
        self._records[key] = fresh
        return Slot(fresh)


def backward_pass() -> int | None:
    """The number of the backward pass that this runs inside, as recomputation does; None outside of any."""
    number: int = torch._C._current_graph_task_id()
    return None if number == -1 else number
