"""A model of transformers as it is: what it is made of, and how it is called for one document alone."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn


def base_of(model: nn.Module) -> Any:
    """The model of transformers itself, inside of what peft puts around it."""
    inside = getattr(model, "get_base_model", None)
    return model if inside is None else inside()


def parts_of(model: nn.Module) -> list[nn.Module]:
    """All modules, each once, without their names: several times faster than ``modules()``, and asked in every call."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        part = waiting.pop()
        if part is not None and id(part) not in found:
            found[id(part)] = part
            waiting.extend(part._modules.values())
    return list(found.values())


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's ``forward`` has an argument of this name."""
    return name in _parameters(base_of(model).__class__)


def takes_any(model: nn.Module) -> bool:
    """Whether the model hands on keywords that it does not know."""
    return any(each.kind is each.VAR_KEYWORD for each in _parameters(base_of(model).__class__).values())


@cache
def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(inspect.unwrap(getattr(kind, "forward"))).parameters  # noqa: B009


def plain(model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """The arguments of a call without a cache."""
    given: dict[str, Any] = {"input_ids": tokens}
    if takes(model, "use_cache") or (takes_any(model) and hasattr(base_of(model).config, "use_cache")):
        given["use_cache"] = False
    if takes(model, "return_dict"):
        given["return_dict"] = True
    return given


def each_alone(model: nn.Module, tokens: Tensor, lengths: Sequence[int]) -> list[Any]:
    """What the model itself returns for each document of ``tokens [b, s]`` alone; those without a token are left
    out."""
    return [model(**plain(model, part)) for part in tokens.split(list(lengths), dim=1) if part.shape[1]]


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are of transformers, and not of torch or of what was put around them."""
    for name, part in base_of(model).named_modules():
        if any(each.__module__.startswith("transformers.models.") for each in type(part).__mro__):
            yield name, part


def layer_kinds(model: nn.Module) -> set[str]:
    """The names by which configs of the model call their kinds of layers."""
    configs = {id(c): c for part in model.modules() if (c := vars(part).get("config")) is not None}
    return {kind for c in configs.values() for kind in getattr(c, "layer_types", None) or () if isinstance(kind, str)}
