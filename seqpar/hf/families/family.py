"""What an adapter is: which of a family's calls mix tokens, and what takes their places."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Function = Callable[..., Any]
_NONE: Mapping[str, Function] = MappingProxyType({})


@dataclass(frozen=True)
class Family:
    """One family of modules that mix tokens.

    ``functions``: of the module's file, by name, that its methods call; in their places stand functions of the same
    arguments after a first, the :class:`seqpar.crossing.here.Here` of the call. ``methods``: whole methods, by
    ``"Class.method"``; in their places stand functions of ``(here, module, ...)``.
    """

    functions: Mapping[str, Function] = field(default_factory=lambda: _NONE)
    methods: Mapping[str, Function] = field(default_factory=lambda: _NONE)
