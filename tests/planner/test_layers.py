"""The planner stands alone: it imports no torch and no other room of the house, and its files form no circle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import planner

FILES = sorted(Path(planner.__file__).parent.glob("*.py"))


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return names


def test_files_form_no_circle() -> None:
    arrows = {
        path.stem: {name.split(".")[1] for name in imported(path) if name.startswith("planner.")} for path in FILES
    }
    order = list(graphlib.TopologicalSorter(arrows).static_order())
    assert order.index("problem") < order.index("solve") < order.index("cli")


def test_nothing_of_the_solver_is_in_the_checker() -> None:
    path = next(path for path in FILES if path.stem == "check")
    assert {name for name in imported(path) if name.startswith("planner")} == {"planner.plan", "planner.problem"}


def test_the_planner_needs_no_torch_and_no_other_room() -> None:
    rooms = {"torch", "seqpar", "collectives", "offload", "pickle", "yaml"}
    for path in FILES:
        assert not {name.split(".")[0] for name in imported(path)} & rooms
    code = "import planner, planner.cli, sys; print(int('torch' in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=FILES[0].parents[1]
    )
    assert run.stdout.strip() == "0"
