"""verify names the first module whose output differs."""

import json
from dataclasses import replace
from math import inf

import pytest
import torch
from torch import nn

from seqpar.collectives import alone, run_ranks
from seqpar.commands.main import main
from seqpar.sharding.shard import LAYOUTS
from seqpar.verification.report import FirstModule, Modules, overview
from seqpar.verification.verify import verify
from tests.verification.broken_models import DIM, SIZE, ScalesLoss, Tiny, batch, wrapped_by


class Stack(nn.Module):
    """Tiny with a part of one's own, ``twice``, that is called two times, and a last one that gives a tuple."""

    def __init__(self, wrong_call=0):
        super().__init__()
        self.tiny, self.twice, self.last = Tiny(), Scaled(wrong_call), Pair()
        self.double()

    def forward(self, tokens, cut):
        x = self.tiny(tokens, cut)
        return self.last(self.twice(self.twice(x, 1, cut), 2, cut))[0]


class Scaled(nn.Module):
    """Wrong in call ``wrong_call``, and only on the last rank: its first token counts twice."""

    def __init__(self, wrong_call):
        super().__init__()
        self.wrong_call = wrong_call

    def forward(self, x, call, cut):
        if call != self.wrong_call or cut.group.rank < cut.group.size - 1 or cut.group.size == 1:
            return 1.5 * x
        return 1.5 * torch.cat([2 * x[:, :1], x[:, 1:]], 1)


class Pair(nn.Module):
    def forward(self, x):
        x.mul_(2)  # in place: must not be blamed on who made it
        return x, x.sum()


@pytest.mark.spmd(2, 4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_absolute_positions_from_arange_are_named(group, layout):
    """The rows are in the order of parameters, and the culprit is nowhere near the first of them."""
    report = verify(Tiny("local positions"), batch(), group, layout=layout)
    first = report.modules.first
    assert (first.name, first.kind, first.input_differs, first.after) == ("places", "Embedding", True, "embedding")
    assert "first module that differs: places (Embedding)" in report.where
    text = torch.tensor(list(repr(report.modules).encode()))
    assert all(torch.equal(other, text) for other in group.all_gather(text).wait())


@pytest.mark.spmd(4)
def test_what_is_no_module_is_between_two(group):
    """Attention that ignores the cut is a function here: mix is called on another one, head on what follows both."""
    first = verify(Tiny("ignores the cut"), batch(), group).modules.first
    assert (first.name, first.input_differs, first.after) == ("head", True, "mix")


@pytest.mark.spmd(3)
@pytest.mark.parametrize("call", [1, 2])
def test_a_fault_of_one_rank_in_one_call_is_found(group, call):
    found = verify(Stack(call), batch(), group).modules
    assert (found.first.name, found.first.input_differs) == ("twice", False)
    assert found.first.after == ("tiny" if call == 1 else "twice")
    assert verify(Stack(), batch(), group).modules is None, "nothing is looked for where all is well"


@pytest.mark.spmd(2)
def test_where_forward_is_right_no_module_is_blamed(group):
    for model in (Tiny("multiplies gradients"), wrapped_by(ScalesLoss, group)):
        report = verify(model, batch(), group)
        assert not report.ok and report.modules.first is None
        assert report.modules.num_compared == 6  # embedding, places, qkv, mix, head, and the model itself
        assert "no module differs in a forward pass, of 6 compared" in report.where


def test_what_holds_no_tokens_is_skipped():
    class Selects(Tiny):
        """A part that sees some of the tokens only, as experts do, and another number of them on every rank."""

        def __init__(self):
            super().__init__()
            self.expert = nn.Linear(DIM, DIM).double().requires_grad_(False)
            nn.init.ones_(self.expert.weight)
            nn.init.zeros_(self.expert.bias)

        def forward(self, tokens, cut):
            self.expert(self.embedding(tokens)[tokens > 5])
            return self.head(self.embedding(tokens) + self.places(torch.arange(cut.shard.num_local)))

    found = run_ranks(3, lambda group: verify(Selects(), batch(), group))[0].modules
    assert found.first.name == "places"
    # The embedding twice, places, head and the model.
    assert found.num_compared == 5


class Uneven(Tiny):
    """Calls its embedding a few times before it begins, on every rank, or only where the sequence is cut."""

    def __init__(self, before, only_cut):
        super().__init__("local positions")
        self.before, self.only_cut = before, only_cut

    def forward(self, tokens, cut):
        for _ in range(self.before if cut.group.size > 1 or not self.only_cut else 0):
            self.embedding(tokens)
        return super().forward(tokens, cut)


def test_calls_that_have_no_partner_name_nobody():
    def verified(group, only_cut):
        return verify(Uneven(group.rank, only_cut), batch(), group)

    for only_cut, name in ((True, "places"), (False, None)):
        reports = run_ranks(2, verified, only_cut)
        assert not reports[0].ok and reports[0].modules == reports[1].modules
        first = reports[0].modules.first
        assert first == name or first.name == name
    assert reports[0].where == "" and "First module" not in str(reports[0])


def test_the_table_the_overview_require_and_json_name_it(tmp_path, monkeypatch, capsys):
    report = run_ranks(2, lambda group: verify(Tiny("local positions"), batch(), group))[0]
    assert "First module that differs: places (Embedding), by" in str(report)
    assert report.as_json()["modules"]["first"]["name"] == "places"
    with pytest.raises(ValueError, match=r"first module that differs: places \(Embedding\).*differs already\)$"):
        report.require()
    assert any("first module: places" in cell for cell in overview([report]).renderables[0].columns[-1].cells)

    (tmp_path / "absolute.py").write_text(
        "from tests.verification.broken_models import Tiny\n\ndef build():\n    return Tiny('local positions')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["verify", "--model", "absolute:build", "--ranks", "2", "--tokens", str(SIZE), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["modules"]["first"]["name"] == "places"


def test_a_difference_without_bound_is_json():
    report = replace(verify(Tiny(), batch(), alone()), modules=Modules(1, FirstModule("a", "Linear", inf, False, "")))
    assert report.as_json()["modules"]["first"]["value"] == "inf"
    assert "Infinity" not in json.dumps(report.as_json())
