"""A group whose messages pass through host memory."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.group import Later, Pending


class ThroughHost:
    """A group whose messages pass through host memory, since gloo takes no messages from a GPU."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size

    def exchange(
        self, send: Tensor | None, to: int | None, receive: Tensor | None, source: int | None
    ) -> Pending[Tensor | None]:
        arriving = self._group.exchange(_host(send), to, _host(receive), source)
        return _back(arriving, receive)

    def all_gather(self, tensor: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> Pending[list[Tensor]]:
        return _back(self._group.all_gather(_host(tensor), shapes), tensor)

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Pending[list[Tensor]]:
        return _back(self._group.all_to_all([_host(x) for x in sends], [_host(x) for x in receives]), receives[0])

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Pending[Tensor]:
        return _back(self._group.reduce_scatter([_host(x) for x in parts]), parts[0])

    def all_reduce(self, tensor: Tensor) -> Pending[Tensor]:
        return _back(self._group.all_reduce(_host(tensor)), tensor)

    def subgroup(self, ranks: Sequence[int]) -> Group:
        return ThroughHost(self._group.subgroup(ranks))

    def partition(self, groups: Sequence[Sequence[int]]) -> Group:
        return ThroughHost(self._group.partition(groups))

    def close(self) -> None:
        self._group.close()


def _host(x: Any) -> Any:
    return None if x is None else x.detach().cpu()


def _back(arriving: Pending[Any], like: Tensor | None) -> Pending[Any]:
    def to_device(x: Any) -> Any:
        if isinstance(x, list):
            return [to_device(part) for part in x]
        return x if x is None or like is None else x.to(like.device)

    finish: Callable[[], Any] = lambda: to_device(arriving.wait())  # noqa: E731
    return Later(finish)
