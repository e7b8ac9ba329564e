"""What stands in a model's places while it runs cut, and only then.

A model of transformers is not changed. For the time of a call its attention is looked up by our name, the functions by
which its recurrent modules mix tokens are ours in these modules (nowhere else: a method is called with the names of its
file, but for these), and what checkpoints layers lets them run again under the same cut. After the call everything is
as it was, so the same model generates, saves and loads as ever.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from seqpar.crossing.here import Here
from seqpar.hf.attend import KEYWORD, NAME, REGISTRY
from seqpar.hf.calls import called
from seqpar.hf.exact import active
from seqpar.hf.families.known import FUNCTIONS, METHODS
from seqpar.hf.whole import parts_of
from seqpar.sharding.cut import Cut
from seqpar.sharding.exchanged import backward_pass

_CHECKPOINT, _ATTENTION = "_gradient_checkpointing_func", "_attn_implementation_internal"
_NOTHING = object()
_Change = tuple[dict[str, Any], str, Any]


@contextmanager
def cutting(parts: Sequence[nn.Module], cut: Cut) -> Iterator[None]:
    """Within, these modules, all of a model's, stand where ``cut`` says."""
    before: list[_Change] = []
    try:
        for part in parts:
            for held, name, value in _changes(part, cut):
                before.append((held, name, held.get(name, _NOTHING)))
                held[name] = value
        yield
    finally:
        for held, name, value in reversed(before):
            if value is _NOTHING:
                held.pop(name, None)
            else:
                held[name] = value


def _changes(part: nn.Module, cut: Cut) -> Iterator[_Change]:
    own = part.__dict__
    config = own.get("config")
    if config is not None and _ATTENTION in vars(config):
        yield vars(config), _ATTENTION, NAME
    if _CHECKPOINT in own:
        yield own, _CHECKPOINT, partial(_checkpointed, own[_CHECKPOINT], part, cut)
    kind: Any = type(part)
    asks, uses = _kind(kind)
    if asks:
        yield own, KEYWORD, cut  # for models that do not hand keywords on to their layers
    if uses:
        yield from _methods(part, cut, uses)


def _checkpointed(checkpoint: Callable[..., Any], part: nn.Module, cut: Cut, layer: Any, *inputs: Any) -> Any:
    """``checkpoint(layer, *inputs)``, such that what runs again inside backward stands where it stood."""
    of, mode = getattr(layer, "__self__", part), active()

    def run(*again: Any) -> Any:
        if backward_pass() is None:
            return layer(*again)
        with cutting(parts_of(of), cut), mode or nullcontext():
            return layer(*again)

    return checkpoint(run, *inputs)


# Methods with other names to look up.


class _Call:
    """One module under one cut; where its present call stands."""

    def __init__(self, part: nn.Module, cut: Cut) -> None:
        self.part, self.cut = part, cut
        self.here: Here | None = None

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function(here, ...)`` for the present call, as transformers calls it."""
        call = called(function)

        def at(*args: Any, **kwargs: Any) -> Any:
            return call(self.here, *args, **kwargs)

        return at

    def opened(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``forward``, at the start of which the call begins."""
        self.here = Here.of(self.cut, self.part)
        return forward(*args, **kwargs)


@cache
def _kind(kind: type) -> tuple[bool, Mapping[str, tuple[FunctionType, frozenset[str] | None]]]:
    """Whether it asks for attention, and which of its methods mix tokens."""
    return _asks(kind), _uses(kind)


def _asks(kind: type) -> bool:
    """Whether a class looks attention up in transformers' registry."""
    methods = (inspect.unwrap(each) for owner in kind.__mro__ for each in vars(owner).values() if callable(each))
    return any(isinstance(each, FunctionType) and REGISTRY in each.__code__.co_names for each in methods)


def _uses(kind: type) -> Mapping[str, tuple[FunctionType, frozenset[str] | None]]:
    """Which methods of a class mix tokens: what they are, and by which functions (None: they do themselves)."""
    found: dict[str, tuple[FunctionType, frozenset[str] | None]] = {}
    for owner in reversed(kind.__mro__):
        if owner.__module__.startswith("torch."):
            continue
        for name, method in vars(owner).items():
            inner = inspect.unwrap(method) if callable(method) else None
            found.pop(name, None)
            if not isinstance(inner, FunctionType):
                continue
            if f"{owner.__name__}.{name}" in METHODS:
                found[name] = inner, None
            elif names := _names(inner.__code__) & FUNCTIONS.keys() & inner.__globals__.keys():
                found[name] = inner, frozenset(names)
    return found


def _names(code: CodeType) -> set[str]:
    inside = (each for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*(_names(each) for each in inside))


def _methods(
    part: nn.Module, cut: Cut, uses: Mapping[str, tuple[FunctionType, frozenset[str] | None]]
) -> Iterator[_Change]:
    call = _Call(part, cut)
    ours = {name: call.bound(FUNCTIONS[name]) for _, names in uses.values() for name in names or ()}
    methods = {name: MethodType(_method(call, name, *use, ours), part) for name, use in uses.items()}
    forward = methods.pop("forward", None) or part.forward
    yield part.__dict__, "forward", partial(call.opened, forward)
    yield from ((part.__dict__, name, method) for name, method in methods.items())


def _method(
    call: _Call, name: str, method: FunctionType, names: frozenset[str] | None, ours: Mapping[str, Any]
) -> Callable[..., Any]:
    """The same code, which finds ours under the names of what mixes tokens; or what takes its place."""
    if names is None:
        owner = next(each for each in type(call.part).__mro__ if f"{each.__name__}.{name}" in METHODS)
        return call.bound(METHODS[f"{owner.__name__}.{name}"])
    found = {**method.__globals__, **{each: ours[each] for each in names}}
    again = FunctionType(method.__code__, found, method.__name__, method.__defaults__, method.__closure__)
    again.__kwdefaults__ = method.__kwdefaults__
    return again
