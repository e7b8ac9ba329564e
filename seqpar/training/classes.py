"""A decorated class: still that class, whose models are cut when they are called with a batch."""

import copy
import sys
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

from torch import nn

from seqpar.sharding.cut import Cut

C = TypeVar("C", bound=type[nn.Module])
_HELD = "_sequence_parallel_of_this_model"


def cut_class(cls: C, wrap: Callable[[nn.Module], nn.Module]) -> C:
    """A subclass of ``cls`` with its name, whose models are cut.

    Law: a model is what ``cls`` makes (its attributes, methods, classmethods, ``state_dict`` without a prefix, hooks);
    only a call changes: with a cut among its arguments it is the plain model's, otherwise that of what ``wrap`` makes
    of the model, which is ``model.sequence_parallel``. A copy is cut anew, and so is what is loaded; what is stored is
    the plain model.
    """

    class Decorated(cls):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if type(self) is Decorated:
                assert self.sequence_parallel is not None

        @property
        def sequence_parallel(self) -> nn.Module:
            """What the model is called through: its group and its options."""
            if _HELD not in self.__dict__:
                self.__dict__[_HELD] = wrap(self)
            held: nn.Module = self.__dict__[_HELD]
            return held

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if any(isinstance(each, Cut) for each in (*args, *kwargs.values())):
                return super().__call__(*args, **kwargs)
            return self.sequence_parallel(*args, **kwargs)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            twin = type(self).__new__(type(self))
            memo[id(self)] = twin
            twin.__dict__ = copy.deepcopy(_plain(self), memo)
            return twin

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _new, (_by_name(type(self), cls),), _plain(self)

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(Decorated, name, getattr(cls, name))
    return Decorated  # type: ignore[return-value]


def _new(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def _plain(model: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in model.__dict__.items() if name != _HELD}


def _by_name(cls: type, plain: type) -> type:
    """``cls``, unless its name leads to the plain class: then it was not used as a decorator."""
    try:
        found = reduce(getattr, cls.__qualname__.split("."), sys.modules[cls.__module__])
    except (AttributeError, KeyError):
        return cls
    return plain if found is plain else cls


def wrapper_of(model: Any) -> Any:
    """What a model of a decorated class is called through; any other model itself."""
    return model.sequence_parallel if isinstance(getattr(type(model), "sequence_parallel", None), property) else model
