"""Models of transformers in fp64: their code asks for fp32 in many places, and is given fp64."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_LOW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class Exact(TorchFunctionMode):
    """Within, every request for fp32, fp16 or bf16 is answered with fp64.

    For comparisons: a model that was made ``double()`` then computes in fp64 throughout, and what is left of a
    difference is no rounding. ``weights``: those that are not fp64 are widened where they are used, so that a model
    of any dtype runs in fp64 without a copy of it.
    """

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = MappingProxyType({}) if kwargs is None else kwargs
        if func in _CASTS:
            return args[0].double()
        if func is torch.full and "dtype" not in kwargs and isinstance(args[-1], float):
            kwargs = {**kwargs, "dtype": torch.float64}
        wide = self._wide if self.weights and not _writes(func) else _asked
        return func(*(wide(each) for each in args), **{name: wide(each) for name, each in kwargs.items()})

    def _wide(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in _LOW:
            return torch.Tensor.to(value, torch.float64)
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(self._wide(each) for each in value)
        return _asked(value)


def active() -> Exact | None:
    """The mode that is on, to be entered again by what runs again inside backward: torch does not carry it there."""
    stack = _get_current_function_mode_stack()
    return next((mode for mode in reversed(stack) if isinstance(mode, Exact)), None)


def _asked(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOW else value


def _writes(func: Any) -> bool:
    """Whether a function changes the tensor that it is called on, or only says something about it."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.startswith("__")) or name in ("__setitem__", "__get__", "__set__")
