"""Calls out of transformers' code: what is passed along in them, and what of it matters."""

import inspect
from collections.abc import Callable
from typing import Any

# Said in every call, and without meaning for what mixes tokens: positions are in the queries already, documents in
# the cut, and nothing of these is returned.
_SAID = (
    "seqpar_cut", "position_ids", "position_embeddings", "cache_position", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "layer_idx", "training",
)  # fmt: skip


def called(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as transformers calls it: arguments that it does not have must be without meaning, or not set."""
    takes = inspect.signature(function).parameters

    def call(*args: Any, **kwargs: Any) -> Any:
        matters = [name for name, each in kwargs.items() if name not in takes and name not in _SAID and _is_set(each)]
        if matters:
            who = type(getattr(args[0], "layer", args[0])).__name__
            raise ValueError(f"{who} asks for {matters[0]} ({function.__name__}), which is not known when it is cut")
        return function(*args, **{name: each for name, each in kwargs.items() if name in takes})

    return call


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, int) and value == 0)
