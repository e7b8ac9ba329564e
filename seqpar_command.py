"""The ``seqpar`` command as it is installed: ``seqpar plan`` starts without torch, which everything else needs."""

import sys


def main() -> int:
    """Run the command with the arguments of the process; returns the exit status."""
    if sys.argv[1:2] == ["plan"]:
        from planner.cli import main as plan

        return plan(sys.argv[2:], "seqpar plan")
    from seqpar.cli import main as command

    return command()
