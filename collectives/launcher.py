"""Who am I: reads what torchrun, mpirun or Slurm told this process. The only reader of ``os.environ``."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Place:
    """One process among those that were started together.

    ``address`` and ``port`` say where rank 0 listens; they are empty and 0 where the launcher did not say. ``attempt``
    counts how often torchrun has started these ranks again.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    launcher: str
    attempt: int = 0


@dataclass(frozen=True)
class _Names:
    """The variables in which one launcher tells rank, size, local rank and local size."""

    rank: str
    size: str
    local_rank: str
    local_size: str
    launcher: str


SLURM = "Slurm"
_OWN_STEPS = 2**32 - 16  # from here on steps are Slurm's own: the batch script, the shell of salloc
_LAUNCHERS = (
    _Names("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "torchrun"),
    _Names(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "mpirun (Open MPI)",
    ),
    _Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "mpirun (MPICH)"),
    _Names("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", SLURM),
)
_ALONE = Place(0, 1, 0, 1, "", 0, "none")


def read_place(environment: Mapping[str, str]) -> Place:
    """The place that ``environment`` tells, from torchrun, Open MPI, MPICH, Slurm or nothing, in that order.

    Raises ``ValueError`` naming the variable and its value where one is missing, no number, or out of range.
    """
    for names in _LAUNCHERS:
        if names.rank in environment and (names.launcher != SLURM or _is_step(environment)):
            return _read(names, environment)
        # Slurm tells the size outside of srun too, where there are no ranks: not an error.
        if names.size in environment and names.launcher != SLURM:
            raise ValueError(f"{names.size}={environment[names.size]!r} is set but {names.rank} is not: set both")
    return _ALONE


def told_place() -> Place:
    """The place of this process as far as its environment tells it; sends nothing."""
    return read_place(os.environ)


def this_place() -> Place:
    """The place of this process; where mpirun told no address, the ranks agree on one by MPI (all must call)."""
    place = told_place()
    if place.size > 1 and not place.address:
        return _agree_by_mpi(place)
    return place


def gpu_of(place: Place, num_gpus: int) -> int:
    """Which of its host's GPUs a process works on; ``ValueError`` if there is none for it."""
    if place.local_rank >= num_gpus:
        raise ValueError(
            f"rank {place.rank} of {place.size} is number {place.local_rank} on its host, which has "
            f"{num_gpus} GPUs: start fewer ranks per host, or use backend='gloo'"
        )
    return place.local_rank


def _is_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process: a batch script and the shell of salloc are told SLURM_PROCID=0 as well, and
    how many tasks there would be, but nobody has started them."""
    step = environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEPID")
    return step is not None and not (step.isdigit() and int(step) >= _OWN_STEPS)


def _read(names: _Names, environment: Mapping[str, str]) -> Place:
    if names.size not in environment:
        raise ValueError(f"{names.rank}={environment[names.rank]!r} is set but {names.size} is not: set both")
    size = _number(environment, names.size, low=1)
    rank = _number(environment, names.rank, below=size, why=f"{names.size}={size}")
    local_size = _number(environment, names.local_size, default=1, low=1)
    # An unset local rank is 0: one process per node.
    local_rank = _number(environment, names.local_rank, default=0)
    address, port = _meeting_point(names.launcher, size, environment)
    attempt = _number(environment, "TORCHELASTIC_RESTART_COUNT", default=0)
    return Place(rank, size, local_rank, max(local_size, local_rank + 1), address, port, names.launcher, attempt)


def _meeting_point(launcher: str, size: int, environment: Mapping[str, str]) -> tuple[str, int]:
    if "MASTER_ADDR" in environment:
        if "MASTER_PORT" not in environment:
            raise ValueError(f"MASTER_ADDR={environment['MASTER_ADDR']!r} is set but MASTER_PORT is not: set both")
        return environment["MASTER_ADDR"], _number(environment, "MASTER_PORT", low=1, below=65536)
    if launcher == SLURM:
        return _slurm_meeting_point(environment)
    if launcher == "torchrun" and size > 1:
        raise ValueError(f"WORLD_SIZE={size} is set but MASTER_ADDR is not: use torchrun, or set it to rank 0's host")
    return "", 0


def _slurm_meeting_point(environment: Mapping[str, str]) -> tuple[str, int]:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST")
    if not nodes:
        raise ValueError("SLURM_PROCID is set but SLURM_STEP_NODELIST and SLURM_NODELIST are not: start with srun")
    # Below 32768, where the system hands out ports of its own; steps of one job get different ports.
    step = _number(environment, "SLURM_STEP_ID" if "SLURM_STEP_ID" in environment else "SLURM_STEPID")
    job = _number(environment, "SLURM_JOB_ID", default=0)
    return first_host(nodes), 12000 + (job * 7 + step) % 20000


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list.

    >>> first_host("node[003-010,12]"), first_host("a1,b[2-3]"), first_host("rack[1-2]n[07,09]-ib")
    ('node003', 'a1', 'rack1n07-ib')
    """
    first = re.match(r"(?:[\w.-]|\[[\w,-]+\])+", nodes)
    if first is None or nodes.count("[") != nodes.count("]"):
        raise ValueError(f"a Slurm node list looks like node[003-010,12], got {nodes!r}")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def _number(
    environment: Mapping[str, str],
    name: str,
    *,
    default: int | None = None,
    low: int = 0,
    below: int | None = None,
    why: str = "",
) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d+", text):
        raise ValueError(f"{name}={text!r} is not a number")
    if int(text) < low or (below is not None and int(text) >= below):
        upper = "" if below is None else f" and below {below}"
        raise ValueError(f"{name}={text!r} must be at least {low}{upper}" + (f" ({why})" if why else ""))
    return int(text)


def _agree_by_mpi(place: Place) -> Place:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ValueError(
            f"{place.launcher} does not say where rank 0 listens: install mpi4py (pip install 'seqpar[mpi]'), "
            "or set MASTER_ADDR to rank 0's host and MASTER_PORT to a free port there"
        ) from error
    # Upper-case methods send plain bytes; the lower-case ones would pickle.
    message = bytearray(256)
    if place.rank == 0:
        told = f"{_host_address()} {_free_port()}".encode()
        message[: len(told)] = told
    MPI.COMM_WORLD.Bcast(message, root=0)
    address, port = message.rstrip(b"\0").decode().split(" ")
    return replace(place, address=address, port=int(port))


def _host_address() -> str:
    host = socket.gethostname()
    try:
        return socket.gethostbyname(host)
    except OSError:
        return host


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
