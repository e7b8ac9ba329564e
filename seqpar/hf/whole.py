"""A model of transformers as it is: what it is made of, and how it is called for one document alone."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def base_of(model: nn.Module) -> Any:
    """The model of transformers itself, inside of what peft puts around it."""
    inside = getattr(model, "get_base_model", None)
    return model if inside is None else inside()


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's ``forward`` has an argument of this name."""
    return name in inspect.signature(inspect.unwrap(type(base_of(model)).forward)).parameters


def plain(model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """The arguments of a call without a cache."""
    given: dict[str, Any] = {"input_ids": tokens}
    for name, value in (("use_cache", False), ("return_dict", True)):
        if takes(model, name):
            given[name] = value
    return given


def each_alone(model: nn.Module, tokens: Tensor, lengths: Sequence[int]) -> list[Any]:
    """What the model itself returns for each document of ``tokens [b, s]`` alone; those without a token are left
    out."""
    return [model(**plain(model, part)) for part in tokens.split(list(lengths), dim=1) if part.shape[1]]
