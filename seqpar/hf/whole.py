"""A model of transformers as it is: what it is made of, and how it is called for one document alone."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def base_of(model: nn.Module) -> Any:
    """The model of transformers itself, inside of what peft puts around it."""
    inside = getattr(model, "get_base_model", None)
    return model if inside is None else inside()


def plain(model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """The arguments of a call without a cache; positions count from 0, where the model takes any."""
    takes = inspect.signature(inspect.unwrap(type(base_of(model)).forward)).parameters
    given: dict[str, Any] = {"input_ids": tokens}
    if "position_ids" in takes:
        given["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device)[None].expand(tokens.shape[0], -1)
    for name, value in (("use_cache", False), ("return_dict", True)):
        if name in takes:
            given[name] = value
    return given


def each_alone(model: nn.Module, tokens: Tensor, lengths: Sequence[int]) -> list[Any]:
    """What the model itself returns for each document of ``tokens [b, s]`` alone; those without a token are left
    out."""
    return [model(**plain(model, part)) for part in tokens.split(list(lengths), dim=1) if part.shape[1]]
