"""The README's examples run as they stand, and its links lead somewhere."""

import re
from pathlib import Path

import torch

from seqpar import Cut

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_examples_run(capsys):
    torch.manual_seed(0)
    first, second = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(first, {})
    numbers = re.findall(r"\d+\.\d+", capsys.readouterr().out)
    assert len(numbers) == 5
    assert max(map(float, numbers)) - min(map(float, numbers)) < 1e-5
    names = {}
    exec(second, names)
    assert names["LM"]()(torch.zeros(1, 9, dtype=torch.int64), Cut.whole([4, 5])).shape == (1, 9, 256)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists() or (ROOT / "collectives" / target).exists(), target


def test_the_first_screen_has_the_two_commands():
    first_screen = "\n".join(README.splitlines()[:40])
    assert "make demo" in first_screen
    assert "make test" in first_screen
