"""``seqpar doctor``: what this machine has, and what each missing thing would be needed for. Exit status 0."""

import argparse
import json
from dataclasses import asdict

DESCRIPTION = (
    "Show the versions, devices, backends, optional packages and memory limits that seqpar finds, and what each "
    "missing one would be needed for. Nothing that is missing is an error."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``seqpar doctor``; ``parser.set_defaults(run=run)`` is set as well."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Look and show; returns the exit status."""
    from seqpar.verification.doctor import examine, show

    items = examine()
    print(json.dumps([asdict(item) for item in items], indent=2)) if arguments.json else show(items)
    return 0
