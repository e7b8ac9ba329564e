"""The README's examples run as they stand, and its links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqpar import Cut
from seqpar.planner import Cluster, CostModel, GroupKind, costs_to_json

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
SHELL = [text for kind, text in BLOCKS if kind == "sh"]


def python(word):
    """The only Python block with this word in it."""
    (found,) = [text for text in PYTHON if word in text]
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader stands: nothing is there but what `seqpar calibrate --out costs.json` would have written."""
    kinds = (GroupKind(1, "none", 1e-6, 1e-4, 1e-3), GroupKind(2, "ring", 6e-7, 6e-5, 2e-3))
    (tmp_path / "costs.json").write_text(costs_to_json(CostModel("m", kinds, 1.0, 0.0), Cluster("c", 2, 2, 800)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_every_python_block_runs_on_its_own(number, folder):
    torch.manual_seed(0)
    exec(PYTHON[number], {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SHELL)))
def test_every_shell_block_runs(number, folder):
    """Those of `make` only name what is there: other tests, and CI, run it."""
    lines = [line for line in SHELL[number].splitlines() if not line.startswith("make ")]
    made = re.findall(r"^make ([\w-]+)", SHELL[number], re.M)
    assert all(f"\n{target}: " in (ROOT / "Makefile").read_text() for target in made)
    (folder / "seqpar").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m seqpar "$@"\n')
    (folder / "seqpar").chmod(0o755)
    told = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        ["bash", "-ec", "\n".join(lines)], cwd=folder, env={**os.environ, **told}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    for line in shown_after(SHELL[number]):
        assert line in ended.stdout, ended.stdout


def shown_after(block):
    """The lines of a block right behind this one that has no language: what the commands print, but for seconds."""
    behind = re.match(r"```\n\n```\n(.*?)```", README.split(block)[1], re.DOTALL)
    return [line.rstrip() for line in behind[1].splitlines() if "found by" not in line] if behind else []


def test_the_first_example_gives_one_number(capsys):
    torch.manual_seed(0)
    exec(python("def step(group)"), {})
    numbers = re.findall(r"\d+\.\d+", capsys.readouterr().out)
    assert len(numbers) == 5
    assert max(map(float, numbers)) - min(map(float, numbers)) < 1e-5


def test_the_examples_do_what_they_say(folder, capsys):
    names = {}
    exec(python("class LM"), names)
    assert names["LM"]()(torch.zeros(1, 9, dtype=torch.int64), Cut.whole([4, 5])).shape == (1, 9, 256)
    exec(python("# decoding"), names)
    assert names["states"].position == 5 and names["logits"].shape == (1, 256)
    exec(python('swap="auto"'), names)
    tokens = torch.ones(1, 70, dtype=torch.int64)
    assert names["model"](tokens, labels=tokens).loss.item() > 0
    exec(python("plan_ahead"), names)
    assert capsys.readouterr().out == "[3, 3]\n", "two ranks trained by plans of three documents"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        # A source distribution has collectives, planner and offload inside of seqpar only.
        assert any((place / target).exists() for place in (ROOT, ROOT / "seqpar")), target


def test_the_first_screen_has_the_two_commands():
    first_screen = "\n".join(README.splitlines()[:40])
    assert "make demo" in first_screen
    assert "make test" in first_screen
