"""The planning process: a cost model on the first line of standard input, then a question a line, an answer a line.

It ends with its input, so it does not outlive the process that asks.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence

from seqpar.planner.plan import Plan, from_json
from seqpar.planner.problem.files import costs_from_json
from seqpar.planner.problem.problem import problem_of
from seqpar.planner.solve import Options, plan_batch

_NICE = 5  # training goes first where both want one core


def question(number: int, lengths: Sequence[int], options: Options) -> str:
    """One line that asks for the plan of a batch."""
    asked = {"number": number, "lengths": list(lengths), "seconds": options.seconds, "seed": options.seed}
    return json.dumps({**asked, "exact": options.exact})


def refusal(reason: str) -> str:
    """What is said instead of a plan."""
    return json.dumps({"refused": reason})


def planned(text: str) -> Plan:
    """The plan that was said; raises ``ValueError`` with the reason for a :func:`refusal`."""
    if text.startswith('{"refused"'):
        raise ValueError(json.loads(text)["refused"])
    return from_json(text)


def answers(lines: Iterable[str]) -> Iterator[str]:
    """To each question its number and the plan; the first line is the cost model and the cluster."""
    questions = iter(lines)
    costs, cluster = costs_from_json(next(questions))
    for line in questions:
        asked = json.loads(line)
        options = Options(asked["seconds"], asked["seed"], asked["exact"])
        try:
            said = plan_batch(problem_of(asked["lengths"], cluster, costs), options).to_json()
        except ValueError as error:
            said = refusal(str(error))
        yield f"{asked['number']} {said}"


def main() -> None:
    """Answer until there are no more questions."""
    os.nice(_NICE)
    for answer in answers(sys.stdin):
        print(answer, flush=True)
