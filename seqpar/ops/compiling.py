"""What ``torch.compile`` leaves as it is: code that plans with integers and sends messages.

``torch.compiler.disable`` does the same, but imports the compiler, which takes as long as all of torch, for everyone.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def compiling() -> bool:
    """Whether the compiler was ever asked for in this process."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None or not hasattr(dynamo, "disable"):
        return False
    _skip(dynamo)
    return True


def apart(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which a compiled caller calls as it is: one graph break, and nothing of it is traced.

    Law: it returns what it returns without the compiler.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not compiling():
            return function(*args, **kwargs)
        plain: Callable[P, R] = _plain(function)
        return plain(*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    run._torchdynamo_disable_msg = f"{function.__name__} crosses the cuts"  # type: ignore[attr-defined]
    return run


@functools.lru_cache(maxsize=1)
def _skip(dynamo: Any) -> None:
    """The frame of ``run``, the same code for all functions, is not compiled either when it is called as it is."""
    dynamo.eval_frame.skip_code(getattr(apart(_skip), "__code__"))  # noqa: B009


@functools.lru_cache(maxsize=256)
def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    dynamo: Any = sys.modules["torch._dynamo"]
    found: Callable[..., Any] = dynamo.disable(function)
    return found
