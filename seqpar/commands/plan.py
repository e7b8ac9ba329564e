"""``seqpar plan``: plan one batch of documents and show who shares what. Needs no GPU and no torch.

Exit status: 0 for a plan, 2 for input that cannot be used or planned.
"""

import argparse
import sys

from seqpar.commands.arguments import count, seconds, whole
from seqpar.planner.problem.explain import reasons
from seqpar.planner.problem.files import read_costs
from seqpar.planner.problem.lengths import read_lengths
from seqpar.planner.problem.models import gpu_names, model_names
from seqpar.planner.problem.named import named_problem
from seqpar.planner.problem.problem import Problem, problem_of
from seqpar.planner.problem.published import published_models
from seqpar.planner.show.plot import format_of, plot
from seqpar.planner.show.report import WIDTH, render
from seqpar.planner.solve import Options, plan_batch

DESCRIPTION = (
    "Decide, for one batch of documents, which ranks form a group and which documents each group takes, and say how "
    "far from optimal that is."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``seqpar plan``; ``parser.set_defaults(run=run)`` is set as well."""
    models, gpus = ", ".join((*published_models(), *model_names())), ", ".join(gpu_names())
    parser.add_argument(
        "--lengths",
        required=True,
        metavar="FILE|-",
        help="document lengths in tokens, one a line; - reads standard input",
    )
    parser.add_argument("--first", type=count, metavar="N", help="plan only the first N documents")
    parser.add_argument(
        "--pad", type=count, default=1, metavar="N", help="pad each document to a multiple of N tokens (default: 1)"
    )
    parser.add_argument(
        "--model", required=True, metavar="NAME|FILE", help=f"one of {models}; or a .json that seqpar calibrate wrote"
    )
    parser.add_argument(
        "--cluster", metavar="NAME", help=f"devices x GPU, such as 64xA100-40G (GPUs: {gpus}); a .json has its own"
    )
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
    if arguments.plot is not None:
        format_of(arguments.plot)
    problem = _problem(arguments)
    if arguments.why and _explain(problem):
        return 2
    found = plan_batch(problem, Options(seconds=arguments.seconds, seed=arguments.seed))
    if arguments.plot is not None:
        plot(found, arguments.plot)
    if arguments.json:
        print(found.to_json())
        return 0
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a pipe has no width of its own
        console = Console(width=WIDTH)
    bars = console.width >= WIDTH
    console.print(render(found, compare=arguments.compare, full=arguments.full, bars=bars))
    return 0


def _problem(arguments: argparse.Namespace) -> Problem:
    lengths = read_lengths(arguments.lengths)[: arguments.first]
    padded = tuple(-(-length // arguments.pad) * arguments.pad for length in lengths)
    if not arguments.model.endswith(".json"):
        if arguments.cluster is None:
            raise ValueError(f"--model {arguments.model} needs a --cluster, such as 64xA100-40G")
        return named_problem(padded, arguments.model, arguments.cluster)
    if arguments.cluster is not None:
        raise ValueError(f"--cluster {arguments.cluster}: {arguments.model} has its own cluster; leave it out")
    costs, cluster = read_costs(arguments.model)
    return problem_of(padded, cluster, costs)


def _explain(problem: Problem) -> bool:
    """Print why there is no plan; returns whether that is so."""
    found = reasons(problem)
    for reason in found:
        print(f"no plan: {reason}", file=sys.stderr)
    return bool(found)
