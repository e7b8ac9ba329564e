"""Autocast stays outside: what is computed in fp32 on purpose is not to be turned into 16 bits on the way."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def no_autocast(*found: object) -> AbstractContextManager[object]:
    """A context without autocast on the device of the first tensor in ``found``; of no effect if there is none."""
    for x in found:
        if isinstance(x, Tensor):
            return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def exactly(function: Callable[P, R]) -> Callable[P, R]:
    """The function, computed in the dtypes of what it is given whatever the caller's autocast says."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with no_autocast(*args):
            return function(*args, **kwargs)

    return run
