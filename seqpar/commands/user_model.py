"""The user's own model, by the name of a module and of what builds it there."""

import importlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def user_model(target: str) -> "nn.Module":
    """What ``MODULE:FACTORY`` builds; raises ``ValueError`` with one line for what is no such thing."""
    from torch import nn

    place, _, name = target.partition(":")
    if not place or not name:
        raise ValueError(f"--model is MODULE:FACTORY, such as mymodel:build, got {target!r}")
    sys.path.append(os.getcwd())
    try:
        factory = getattr(importlib.import_module(place), name, None)
    except ImportError as error:
        raise ValueError(f"--model {target}: cannot import {place}: {error}") from error
    if not callable(factory):
        raise ValueError(f"--model {target}: module {place} has no function or class {name}")
    model = factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {target}: {name}() must return a torch module, got {type(model).__name__}")
    return model
