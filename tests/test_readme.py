"""The README's examples run as they stand, and its links lead somewhere."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from seqpar import Cut, sequence_parallel
from seqpar.collectives import alone, run_ranks
from seqpar.models import HybridConfig, HybridLM
from seqpar.planner import Cluster, CostModel, GroupKind, costs_to_json

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_examples_run(capsys):
    torch.manual_seed(0)
    first, _, _, second, decoding = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(first, {})
    numbers = re.findall(r"\d+\.\d+", capsys.readouterr().out)
    assert len(numbers) == 5
    assert max(map(float, numbers)) - min(map(float, numbers)) < 1e-5
    names = {}
    exec(second, names)
    assert names["LM"]()(torch.zeros(1, 9, dtype=torch.int64), Cut.whole([4, 5])).shape == (1, 9, 256)
    exec(decoding, names)
    assert names["states"].position == 5 and names["logits"].shape == (1, 256)


def test_training_by_plans_runs(tmp_path, monkeypatch):
    """The example, with names for what it takes as given: two batches on two ranks."""
    _, example, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    kinds = (GroupKind(1, "none", 1e-6, 1e-4, 1e-3), GroupKind(2, "ring", 6e-7, 6e-5, 2e-3))
    costs = costs_to_json(CostModel("m", kinds, 1.0, 0.0), Cluster("c", 2, 2, 40))
    monkeypatch.chdir(tmp_path)
    Path("costs.json").write_text(costs)

    model = HybridLM(HybridConfig(dim=16, layers=2, heads=2))

    def body(group):
        batches = [Batch(torch.ones(1, sum(n), dtype=torch.int64), list(n)) for n in ((50, 9, 3), (7, 20))]
        steps = []
        optimizer = SimpleNamespace(step=lambda: steps.append(1), zero_grad=lambda: None)
        names = {"HybridLM": copy.deepcopy, "config": model, "group": group, "batches": batches, "optimizer": optimizer}
        exec(example, names)
        return len(steps)

    assert run_ranks(2, body) == [2, 2]


def test_swapping_is_one_argument():
    _, _, example, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {"sequence_parallel": sequence_parallel, "HybridLM": copy.deepcopy, "group": alone()}
    names["config"] = HybridLM(HybridConfig(dim=16, layers=2, heads=2))
    exec(example, names)
    tokens = torch.ones(1, 70, dtype=torch.int64)
    assert names["model"](tokens, labels=tokens).loss.item() > 0


@dataclass
class Batch:
    tokens: torch.Tensor
    lengths: list

    @property
    def labels(self):
        return self.tokens


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists() or (ROOT / "collectives" / target).exists(), target


def test_the_first_screen_has_the_two_commands():
    first_screen = "\n".join(README.splitlines()[:40])
    assert "make demo" in first_screen
    assert "make test" in first_screen
