"""The file that a planning process starts with: ``python -I -S process.py MODULE ROOT [PATH ...]``.

It is a file, run in isolation, so that Python looks into its own library first, then for this package, and only then
where the one who asks looks: a ``json.py`` or ``queue.py`` of somebody's current folder is never run.
"""

import importlib
import sys


def main() -> None:
    """Look for modules in these places, after the standard library, and run the module's ``main``."""
    module, *paths = sys.argv[1:]
    sys.path.extend(path for path in paths if path not in sys.path)
    importlib.import_module(module).main()


if __name__ == "__main__":
    main()
