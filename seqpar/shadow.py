"""Refuses a user's own ``planner``, ``offload`` or ``collectives`` that hides the package beside seqpar."""

import importlib.util
import os
import sys

NEIGHBOURS = ("collectives", "offload", "planner")


def refuse_shadows(seqpar_file: str) -> None:
    """Raise ``ImportError``, naming both files, unless the packages beside seqpar are those that Python finds.

    ``seqpar_file`` is the ``__init__.py`` of seqpar. Nothing is imported.
    """
    home = os.path.dirname(os.path.dirname(os.path.abspath(seqpar_file)))
    for name in NEIGHBOURS:
        found, ours = _found(name), os.path.join(home, name, "__init__.py")
        if found == ours or (found is not None and os.path.realpath(found) == os.path.realpath(ours)):
            continue
        if found is None:
            raise ImportError(f"seqpar needs its package {name!r}, which should be {ours}: install seqpar again")
        raise ImportError(
            f"seqpar needs its own package {name!r}, but Python finds another of that name first.\n"
            f"  theirs: {found}\n  ours:   {ours}\n"
            f"Rename theirs, or let {home} come before {_root(found)} in sys.path."
        )


def _found(name: str) -> str | None:
    """The file that ``import name`` would give, or has given."""
    module = sys.modules.get(name)
    if module is not None:
        spec = getattr(module, "__spec__", None)
        file = getattr(module, "__file__", None)
        return os.path.abspath(file) if file else _place(spec) or f"module {name!r}, made without a file"
    if name in sys.modules:
        return None
    return _place(importlib.util.find_spec(name))


def _place(spec: object) -> str | None:
    origin = getattr(spec, "origin", None)
    if origin is not None:
        return os.path.abspath(origin)
    # A folder without __init__.py.
    return next((os.path.abspath(folder) for folder in getattr(spec, "submodule_search_locations", None) or ()), None)


def _root(found: str) -> str:
    """The entry of ``sys.path`` that leads to ``found``."""
    folder = os.path.dirname(found)
    return os.path.dirname(folder) if os.path.basename(found) == "__init__.py" else folder
