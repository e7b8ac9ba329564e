"""Tensors that are made once and used by many calls: index tables, constants.

A tensor made under ``torch.inference_mode`` cannot be saved for backward, one made under a fake or functional mode is
none at all, and tables of many batches fill the memory. So what is kept is made outside of all modes, is told apart by
everything it depends on (device and dtype are arguments like others), and the oldest gives way.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from threading import Lock
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

R = TypeVar("R")
MOST_BYTES = 64 << 20


class Kept(Generic[R]):
    """A function whose results are kept: the latest ones of at most ``most_bytes`` of tensors, but one at least.

    Law: a call gives what the function gives, usable as if it had been made just now, whatever mode or thread made it.
    Under a fake tensor mode it gives fakes of it.
    """

    def __init__(self, function: Callable[..., R], most_bytes: int, most: int) -> None:
        self.__doc__, self.__name__, self.__wrapped__ = function.__doc__, function.__name__, function
        self.most_bytes, self.most = most_bytes, most
        self._found: OrderedDict[Any, tuple[R, int]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def __call__(self, *args: Any) -> R:
        if torch.compiler.is_compiling():  # a graph keeps its own constants
            return self.__wrapped__(*args)
        with self._lock:
            if args in self._found:
                self._found.move_to_end(args)
                return _here(self._found[args][0])
        # Two threads may make the same: that costs less than one that waits while the other needs it to go on.
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            made = self.__wrapped__(*args)
        self._keep(args, made)
        return _here(made)

    @property
    def bytes_(self) -> int:
        """Bytes of all tensors kept now."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._found)

    def clear(self) -> None:
        with self._lock:
            self._found.clear()
            self._bytes = 0

    def _keep(self, key: Any, made: R) -> None:
        storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors_in(made)}
        size = sum(storages.values())
        with self._lock:
            if key in self._found:
                return
            self._found[key] = (made, size)
            self._bytes += size
            while len(self._found) > 1 and (self._bytes > self.most_bytes or len(self._found) > self.most):
                _, (_, gone) = self._found.popitem(last=False)
                self._bytes -= gone


def kept(most_bytes: int = MOST_BYTES, most: int = 64) -> Callable[[Callable[..., R]], Kept[R]]:
    """A decorator: see :class:`Kept`. Arguments are given by their place, are
    hashable, and say all that the result depends on."""
    return lambda function: Kept(function, most_bytes, most)


def tensors_in(made: object) -> Iterable[Tensor]:
    """All tensors of tuples, lists and dataclasses of tensors."""
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, (tuple, list)):
        for each in made:
            yield from tensors_in(each)
    elif is_dataclass(made):
        for field in fields(made):
            yield from tensors_in(getattr(made, field.name))


def _here(made: R) -> R:
    """``made`` for the modes that are on: under a fake tensor mode, fakes."""
    modes = [mode for mode in _get_current_dispatch_mode_stack() if hasattr(mode, "from_tensor")]
    return cast(R, _mapped(made, modes[-1].from_tensor)) if modes else made


def _mapped(made: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(made, Tensor):
        return change(made)
    if isinstance(made, (tuple, list)):
        parts = [_mapped(each, change) for each in made]
        return type(made)(*parts) if hasattr(made, "_fields") else type(made)(parts)
    if is_dataclass(made) and not isinstance(made, type):
        return type(made)(*(_mapped(getattr(made, field.name), change) for field in fields(made)))
    return made
