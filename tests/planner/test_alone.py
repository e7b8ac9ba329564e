"""The planner stands alone: it starts without torch, and its checker shares nothing with what it checks."""

import subprocess
import sys

from tests.house import PACKAGES, graph, read


def test_nothing_of_the_solver_is_in_the_checker() -> None:
    sources = graph(read(*PACKAGES))
    checker = next(source for source in sources if source.path == "planner/check.py")
    assert {seen.path for seen in sources[checker]} == {"planner/plan.py", "planner/problem/problem.py"}


def test_the_planner_and_its_command_start_without_torch() -> None:
    code = "import seqpar.planner, seqpar.commands.plan, sys; print(int('torch' in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0"
