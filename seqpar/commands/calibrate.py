"""``seqpar calibrate``: time a few training steps on the machine at hand, and write what the planner needs to know.

Without a launcher the ranks are threads of this process; under torchrun, mpirun or srun they are its processes.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from seqpar.commands.arguments import count, counts, gib
from seqpar.commands.ranks import join, num_threads
from seqpar.commands.user_model import user_model
from seqpar.commands.written import try_to_write, write

if TYPE_CHECKING:
    from torch import nn

    from seqpar.collectives import Group
    from seqpar.estimates.calibrate import Calibration

DESCRIPTION = (
    "Time forward and backward of a model for every degree of sequence parallelism that this machine's ranks can form, "
    "and fit the cost model that `seqpar plan --model FILE.json` plans with; the error of the fit is shown. Without a "
    "launcher the ranks are threads of this process; under torchrun, mpirun or srun they are its processes."
)
_TOKENS = (256, 512, 1024, 2048)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``seqpar calibrate``; ``parser.set_defaults(run=run)`` is set as well."""
    model = "your own model: FACTORY() returns a module with forward(tokens, cut), or one that is wrapped"
    parser.add_argument("--model", metavar="MODULE:FACTORY", help=f"{model} (default: a small bundled one)")
    parser.add_argument(
        "--ranks", type=count, metavar="N", help="how many ranks (default: 4 threads, or all processes)"
    )
    default = ",".join(map(str, _TOKENS))
    tokens = f"tokens of a step; each is timed as one document and as several packed ones (default: {default})"
    parser.add_argument("--tokens", type=counts, default=_TOKENS, metavar="N,N,...", help=tokens)
    parser.add_argument(
        "--repeats", type=count, default=3, metavar="N", help="steps a sample is the median of (default: 3)"
    )
    memory = "memory of one device to plan with (default: nine tenths of a GPU's, or of a rank's share of the host's)"
    parser.add_argument("--memory", type=gib, metavar="GIB", help=memory)
    node = "ranks of a host: groups stay on it, or take whole hosts (default: all on one)"
    parser.add_argument("--per-node", type=count, metavar="N", help=node)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--out", metavar="FILE", help="write the cost model as JSON to this file (.json)")
    parser.add_argument("--json", action="store_true", help="print the cost model as JSON instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Calibrate and show; returns the exit status. Raises ``ValueError`` with one line for what cannot be used."""
    import torch

    from seqpar.collectives import disconnect

    torch.manual_seed(0)
    if arguments.out is not None:
        try_to_write(arguments.out)
    model = _model(arguments.model).to(arguments.device)
    group = join(arguments)
    try:
        found = _calibration(arguments, model, group)
    finally:
        disconnect()
    if group.rank == 0:
        _show(found, arguments)
    return 0


def _calibration(arguments: argparse.Namespace, model: "nn.Module", group: "Group") -> "Calibration":
    from seqpar.collectives import run_ranks
    from seqpar.estimates.calibrate import calibrate

    memory_bytes = None if arguments.memory is None else int(arguments.memory * 2**30)

    def on_rank(ranks: "Group") -> "Calibration":
        return calibrate(
            model,
            ranks,
            lengths=arguments.tokens,
            repeats=arguments.repeats,
            memory_bytes=memory_bytes,
            devices_per_node=arguments.per_node,
            progress=progress if ranks.rank == 0 else None,
        )

    with _progress(quiet=group.rank > 0) as progress:
        if group.size > 1:
            return on_rank(group)
        with _threads_share_the_cores(num_ranks := num_threads(arguments)):
            return run_ranks(num_ranks, on_rank)[0]


@contextmanager
def _threads_share_the_cores(num_ranks: int) -> Iterator[None]:
    """As many cores for each rank as there are, instead of all for each."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that goes away, if someone is looking."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("timing", total=None)

        def step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield step


def _model(target: str | None) -> "nn.Module":
    from seqpar.models import HybridConfig, HybridLM

    if target is not None:
        return user_model(target)
    return HybridLM(HybridConfig(vocabulary=256, dim=64, layers=4, heads=4, kv_heads=2, softmax_every=2))


def _show(found: "Calibration", arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from seqpar.commands.calibrate_report import report

    if arguments.out is not None:
        write(arguments.out, found.to_json())
    if arguments.json:
        print(found.to_json(), end="")
        return
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(report(found))
    if arguments.out is not None:
        print(f"written to {arguments.out}")
