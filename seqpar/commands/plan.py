"""``seqpar plan``: plan one batch of documents and show who shares what. Needs no GPU and no torch.

Exit status: 0 for a plan, 2 for input that cannot be used or planned.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from seqpar.commands.arguments import count, seconds, whole
from seqpar.commands.choices import DECODERS, GPUS, MEASURED, PASSING_ON
from seqpar.commands.written import try_to_write, write

if TYPE_CHECKING:
    from seqpar.planner import Plan, Problem

DESCRIPTION = (
    "Decide, for one batch of documents, which ranks form a group and which documents each group takes, and say how "
    "far from optimal that is."
)
_CLUSTERS = (
    "devices x GPU, such as 64xH100-80G, in nodes of 8; or nodes x devices x GPU, such as 3x4xH100; @200Gbit at the "
    "end says what a device sends to other nodes. A model file has its own cluster. Built in, GB/s in a node and "
    "Gbit/s between nodes: " + ", ".join(f"{name} {node} and {network}" for name, (node, network) in GPUS.items())
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``seqpar plan``; ``parser.set_defaults(run=run)`` is set as well."""
    models = ", ".join((*DECODERS, *PASSING_ON)) + f"; as measured on A100-40G: {', '.join(MEASURED)}"
    parser.add_argument(
        "--lengths",
        required=True,
        metavar="FILE|-",
        help="document lengths in tokens, such as 65536, 64K or 1M, one a line or with commas between; - reads "
        "standard input",
    )
    parser.add_argument("--first", type=count, metavar="N", help="plan only the first N documents")
    parser.add_argument(
        "--pad", type=count, default=1, metavar="N", help="pad each document to a multiple of N tokens (default: 1)"
    )
    parser.add_argument(
        "--model", required=True, metavar="NAME|FILE", help=f"one of {models}; or a .json that seqpar calibrate wrote"
    )
    parser.add_argument("--cluster", metavar="NAME", help=_CLUSTERS)
    parser.add_argument(
        "--seconds", type=seconds, default=1.0, metavar="S", help="work, as seconds of a free core (default: 1)"
    )
    parser.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="seed of the random part of the search (default: 0)"
    )
    shown = parser.add_argument_group("what to show")
    shown.add_argument("--compare", action="store_true", help="also every plan with one degree for all")
    shown.add_argument("--full", action="store_true", help="a row for every group, also where many are alike")
    shown.add_argument("--json", action="store_true", help="print the plan as JSON instead of a table")
    shown.add_argument("--plot", metavar="FILE", help="draw the timeline of ranks into a .svg or .png")
    shown.add_argument(
        "--why", action="store_true", help="where there is no plan, a line for each document that does not fit"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plan and show; returns the exit status. Raises ``ValueError`` with one line for input that cannot be used."""
    from seqpar.planner.problem.explain import InfeasibleError, reasons
    from seqpar.planner.show.plot import format_of, picture
    from seqpar.planner.solve import Options, plan_batch

    if arguments.plot is not None:
        format_of(arguments.plot)
        try_to_write(arguments.plot)
    problem = _problem(arguments)
    if found := reasons(problem):
        enough = _enough(arguments, problem)
        if not arguments.why:
            raise ValueError(f"{InfeasibleError(found)}{enough and f'; {enough}'}")
        for reason in filter(None, (*found, enough)):
            print(f"no plan: {reason}", file=sys.stderr)
        return 2
    planned = plan_batch(problem, Options(seconds=arguments.seconds, seed=arguments.seed))
    if arguments.plot is not None:
        write(arguments.plot, picture(planned, format_of(arguments.plot)))
    if arguments.json:
        print(planned.to_json())
    else:
        _show(planned, arguments)
    return 0


def _show(planned: "Plan", arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from seqpar.planner.show.report import WIDTH, render

    console = Console()
    if not console.is_terminal:  # a pipe has no width of its own
        console = Console(width=WIDTH)
    bars = console.width >= WIDTH
    console.print(render(planned, compare=arguments.compare, full=arguments.full, bars=bars))


def _problem(arguments: argparse.Namespace) -> "Problem":
    from seqpar.planner.problem.files import read_costs
    from seqpar.planner.problem.lengths import read_lengths
    from seqpar.planner.problem.named import named_problem
    from seqpar.planner.problem.problem import problem_of

    lengths = read_lengths(arguments.lengths)[: arguments.first]
    padded = tuple(-(-length // arguments.pad) * arguments.pad for length in lengths)
    if not arguments.model.endswith(".json"):
        if arguments.cluster is None:
            raise ValueError(f"--model {arguments.model} needs a --cluster, such as 64xH100-80G")
        return named_problem(padded, arguments.model, arguments.cluster)
    if arguments.cluster is not None:
        raise ValueError(f"--cluster {arguments.cluster}: {arguments.model} has its own cluster; leave it out")
    costs, cluster = read_costs(arguments.model)
    return problem_of(padded, cluster, costs)


def _enough(arguments: argparse.Namespace, problem: "Problem") -> str:
    """What would be enough for these documents; nothing for a cost model that was measured on its own cluster."""
    from seqpar.planner.problem.named import smallest_cluster

    if arguments.cluster is None:
        return ""
    found = smallest_cluster(problem.lengths, arguments.model, arguments.cluster)
    return "no number of these devices is enough" if found is None else f"the smallest that holds all is {found}"
