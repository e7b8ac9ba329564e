"""The ranks that a command works on: processes that a launcher started, or threads of this one."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seqpar.collectives import Group

_THREADS = 4
_MOST_THREADS = 256


def join(arguments: argparse.Namespace) -> "Group":
    """The group of the processes that were started together; of one where ``--ranks`` are threads of this process.

    Raises ``ValueError`` before anything is sent for ``--ranks`` that are neither.
    """
    from seqpar.collectives import alone, connect
    from seqpar.collectives.launcher import SLURM, told_place

    place, wanted = told_place(), arguments.ranks
    if place.size > 1 and wanted not in (None, place.size):
        # In a shell of Slurm the other ranks may never come: there --ranks says that threads are wanted.
        if place.launcher != SLURM or place.rank > 0:
            raise ValueError(f"--ranks {wanted}, but {place.size} processes were started: leave --ranks out")
        return alone()
    if place.size == 1:
        num_threads(arguments)
    return connect("nccl" if arguments.device == "cuda" else "gloo")


def num_threads(arguments: argparse.Namespace) -> int:
    """How many ranks there are where they are threads; ``ValueError`` for more than one process should have."""
    wanted = _THREADS if arguments.ranks is None else int(arguments.ranks)
    if wanted > _MOST_THREADS:
        raise ValueError(
            f"--ranks {wanted} would be as many threads of this process, and it takes {_MOST_THREADS} at most: "
            "start them as processes, with torchrun, mpirun or srun"
        )
    return wanted
