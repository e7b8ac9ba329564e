"""seqpar.verification.verify: it passes what is right, and it names what is wrong."""

import io
import threading
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from seqpar import sequence_parallel
from seqpar.collectives import alone, run_ranks
from seqpar.collectives.scan import ALGORITHMS
from seqpar.crossing.attention import TRANSPORTS
from seqpar.models import HybridConfig, HybridLM
from seqpar.offload import Fractions
from seqpar.sharding.shard import LAYOUTS
from seqpar.verification.comparison import _halves
from seqpar.verification.report import overview
from seqpar.verification.verify import Batch, Report, verify
from tests.verification.broken_models import (
    LENGTHS,
    SIZE,
    Casts,
    DoublesGradientsOnTheLastRank,
    KeepsItsOwnLoss,
    OnlyFloat32,
    ScalesLoss,
    ShiftsAfterCutting,
    SumsNoGradients,
    Tiny,
    batch,
    wrapped_by,
)


def failing(report):
    return {row.name for row in report.failed if not row.name.startswith("gradient of ")}


def row(report, name):
    return next(row for row in report.rows if row.name == name)


@pytest.mark.spmd(1, 2, 3, 4)
def test_a_correct_model_is_equal_and_the_report_is_the_same_on_every_rank(group):
    report = verify(Tiny(), batch(), group)
    report.require()
    assert report.ok and report.precision == "float64" and report.ranks == group.size
    assert max(row.value for row in report.rows) < 1e-13
    named = {row.name for row in report.rows if row.name.startswith("gradient of ")}
    assert named == {f"gradient of {name}" for name, _ in Tiny().named_parameters()}
    text = torch.tensor(list(repr(report).encode()))
    assert all(torch.equal(other, text) for other in group.all_gather(text).wait())


@pytest.mark.sampled(2)
@pytest.mark.spmd(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_way_of_cutting_is_equal(group, layout, transport):
    for scan in ALGORITHMS:
        report = verify(Tiny(), batch(), group, layout=layout, transport=transport, scan=scan)
        assert report.ok, str(report)
        assert (report.layout, report.transport, report.scan) == (layout, transport, scan)


@pytest.mark.spmd(2, 4)
@pytest.mark.parametrize("lengths", [(1,), (2,), (SIZE,), (3, 0, 0), (1, 1, 1), (0, 7)])
def test_any_documents(group, lengths):
    report = verify(Tiny(), batch(lengths), group)
    assert report.ok, str(report)


@pytest.mark.spmd(4)
@pytest.mark.parametrize(
    ("broken", "names"),
    [
        ("ignores the cut", {"loss", "logits", "size of the gradient"}),
        ("local positions", {"loss", "logits", "documents anywhere", "size of the gradient"}),
        ("global positions", {"documents anywhere"}),
        ("ignores documents", {"documents apart", "documents anywhere"}),
        ("multiplies gradients", {"size of the gradient"}),
        (
            "shifts within its shard",
            {"loss", "logits", "documents apart", "documents anywhere", "size of the gradient"},
        ),
    ],
)
def test_a_broken_model_fails_in_the_rows_that_say_why(group, broken, names):
    report = verify(Tiny(broken), batch(), group)
    assert not report.ok
    assert failing(report) == names, str(report)


@pytest.mark.spmd(2, 4)
def test_a_scaled_loss_is_named_with_its_factor(group):
    report = verify(wrapped_by(ScalesLoss, group), batch(), group)
    assert failing(report) == {"loss", "size of the gradient"}
    assert row(report, "loss").value == pytest.approx(group.size - 1)
    assert row(report, "size of the gradient").value == pytest.approx(group.size - 1)
    assert f"{group.size} times" in row(report, "loss").detail


@pytest.mark.spmd(4)
def test_labels_shifted_after_cutting_are_counted_one_by_one(group):
    data = batch()
    report = verify(wrapped_by(ShiftsAfterCutting, group), data, group)
    assert "targets" in failing(report) and "logits" not in failing(report)
    # The first token of each rank but the first, where it continues a document and has a label.
    firsts = [SIZE * rank // 4 for rank in range(1, 4)]
    starts = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
    lost = sum(int((data.labels[:, first] != -100).sum()) for first in firsts if first not in starts)
    assert lost and row(report, "targets").value == lost


@pytest.mark.spmd(2, 4)
def test_gradients_that_are_not_summed_are_named(group):
    report = verify(wrapped_by(SumsNoGradients, group), batch(), group)
    assert failing(report) == {"gradients on every rank", "size of the gradient"}
    assert row(report, "gradients on every rank").value == group.size - 1
    with pytest.raises(ValueError, match=r"gradients on every rank.*rank 1 has other numbers"):
        report.require()


@pytest.mark.spmd(4)
def test_one_bit_between_the_losses_of_two_ranks_is_seen(group):
    report = verify(wrapped_by(KeepsItsOwnLoss, group), batch(), group)
    assert failing(report) == {"loss on every rank"}


@pytest.mark.spmd(3)
def test_what_is_wrong_on_one_rank_only_is_in_the_report_of_all(group):
    report = verify(wrapped_by(DoublesGradientsOnTheLastRank, group), batch(), group)
    assert row(report, "gradient of mix.weight").value == pytest.approx(1)
    assert {each.name for each in report.failed} == {
        "gradient of mix.weight", "gradients on every rank", "size of the gradient"
    }  # fmt: skip
    assert "rank 2 has other numbers" in row(report, "gradients on every rank").detail


@pytest.mark.spmd(2)
def test_a_wrapped_model_brings_its_group_and_options(group):
    model = sequence_parallel(Tiny(), group=group, layout="zigzag", transport="all_gather", scan="ring")
    report = verify(model, batch())
    assert report.ok and report.ranks == 2
    assert (report.layout, report.transport, report.scan) == ("zigzag", "all_gather", "ring")
    assert verify(model, batch(), layout="striped").layout == "striped"
    assert model.group is group and model.options.layout == "zigzag"
    unsynced = sequence_parallel(Tiny(), group=group, sync_gradients=False)
    assert verify(unsynced, batch()).ok


@pytest.mark.spmd(2)
def test_a_model_that_swaps_and_never_holds_all_logits_is_verified(group):
    module = HybridLM(HybridConfig(vocabulary=64, dim=16, layers=2, heads=2, softmax_every=2))
    with torch.no_grad():
        for parameter in module.parameters():  # the same on every rank
            parameter.copy_(torch.linspace(-0.3, 0.4, parameter.numel()).sin().view_as(parameter))
    wrapped = sequence_parallel(module, group=group, loss_tokens=3, swap=Fractions(0.5, 0.5, 0.0))
    assert verify(wrapped, batch()).ok
    assert wrapped.options.loss_tokens == 3


def test_the_model_and_the_random_state_stay_as_they_are():
    model = Tiny()
    model.eval()
    model.mix.train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.places.weight.requires_grad_(False)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    before = torch.get_rng_state()

    assert all(report.ok for report in run_ranks(3, lambda group: verify(model, batch(), group)))

    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    others = [parameter for parameter in model.parameters() if parameter is not model.head.weight]
    assert all(parameter.grad is None and not parameter._backward_hooks for parameter in others)


def test_frozen_parameters_are_not_compared():
    model = Tiny()
    model.places.weight.requires_grad_(False)
    report = verify(model, batch(), alone())
    assert report.ok and not any("places" in row.name for row in report.rows)


def test_a_model_that_draws_random_numbers_leaves_the_random_state():
    class Draws(Tiny):
        def forward(self, tokens, cut):
            torch.rand(3)
            return super().forward(tokens, cut)

    model, before = Draws(), torch.get_rng_state()
    verify(model, batch(), alone())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.spmd(2)
def test_the_tolerance_is_that_of_the_lowest_precision(group):
    for model in (Casts(), OnlyFloat32()):
        report = verify(model, batch(), group)
        assert report.ok and report.precision == "float32", str(report)
        assert row(report, "logits").tolerance == 1e-4
    assert row(verify(Tiny(dtype=torch.float32), batch(), group), "logits").tolerance == 1e-9
    strict = verify(OnlyFloat32(), batch(), group, tolerance=1e-12)
    assert not strict.ok and row(strict, "logits").tolerance == 1e-12


def test_a_loss_that_is_no_number_is_never_equal():
    model = Tiny()
    model.head.bias.data[0] = torch.nan
    report = verify(model, batch(), alone())
    assert not report.ok and row(report, "loss").value == float("inf")
    assert report.as_json()["rows"][0]["value"] == "inf"


@pytest.mark.parametrize("make", [lambda: nn.Dropout(0.1), lambda: nn.MultiheadAttention(4, 1, dropout=0.1)])
def test_active_dropout_is_refused(make):
    model = Tiny()
    model.drop = make()
    with pytest.raises(ValueError, match=r"drop .*set its p to 0, or call model.eval"):
        verify(model, batch(), alone())
    model.eval()
    assert verify(model, batch(), alone()).ok


def test_a_batch_may_be_a_mapping_or_any_object():
    data = batch()
    assert verify(Tiny(), {"tokens": data.tokens, "labels": data.labels, "lengths": list(LENGTHS)}, alone()).ok
    one_document = verify(Tiny(), SimpleNamespace(tokens=data.tokens, labels=data.labels), alone())
    assert one_document.ok and one_document.num_documents == 1


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"tokens": torch.zeros(1, 4).long()}, "this dict has no labels"),
        (Batch(torch.arange(4), torch.arange(4), (4,)), r"tokens must be \[batch, tokens\]"),
        (Batch(torch.arange(4)[None], torch.arange(3)[None], (4,)), r"labels must be \[1, 4\]"),
        (Batch(torch.arange(4)[None], torch.arange(4)[None], (1, 2)), "sum to 4 tokens"),
        (Batch(torch.ones(1, 4).long(), torch.ones(1, 4).long(), (2, 2)), "all tokens are 1"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(data, why):
    with pytest.raises(ValueError, match=why):
        verify(Tiny(), data, alone())


def test_models_that_cannot_be_compared_are_refused():
    frozen, sharded, locked = Tiny().requires_grad_(False), Tiny(), Tiny()
    sharded.head.weight.device_mesh = "a mesh"
    locked.lock = threading.Lock()
    for model, why in ((frozen, "no parameter"), (sharded, "before DDP or FSDP"), (locked, "deepcopy")):
        with pytest.raises(ValueError, match=why):
            verify(model, batch(), alone())
    with pytest.raises(ValueError, match="layout must be one of"):
        verify(Tiny(), batch(), alone(), layout="diagonal")


@pytest.mark.spmd(3)
def test_ranks_with_other_batches_or_weights_are_refused_on_every_rank(group):
    with pytest.raises(ValueError, match="tokens must be the same on every rank"):
        verify(Tiny(), batch(seed=group.rank), group)
    data = batch()
    with pytest.raises(ValueError, match="labels must be the same on every rank"):
        verify(Tiny(), Batch(data.tokens, data.labels[:, group.rank :], LENGTHS), group)
    model = Tiny()
    model.mix.bias.data[0] += group.rank == 1
    with pytest.raises(ValueError, match="weights must be the same on every rank"):
        verify(model, batch(), group)


@pytest.mark.parametrize("count", range(1, 18))
def test_every_pair_of_documents_is_tested_both_ways(count):
    pairs = {(i, j) for changed in _halves(count) for i in changed for j in set(range(count)) - changed}
    assert pairs == {(i, j) for i in range(count) for j in range(count) if i != j}


def test_the_table_names_what_differs():
    good: Report = verify(Tiny(), batch(), alone())
    text = str(good)
    assert "Equal" in text and "documents apart" in text and "DIFFERS" not in text
    bad = run_ranks(2, lambda group: verify(Tiny("multiplies gradients"), batch(), group))[0]
    text = str(bad)
    assert "Not equal" in text and "times its size" in text
    assert all(name in text for name in ("embedding.weight", "places.weight", "qkv.bias", "mix.weight"))


def test_require_names_the_worst_rows_and_counts_the_rest():
    assert verify(Tiny(), batch(), alone()).require() is None
    bad = run_ranks(4, lambda group: verify(Tiny("ignores the cut"), batch(), group))[0]
    with pytest.raises(
        ValueError, match=r"4 ranks, contiguous layout.*logits: .*allowed 1e-09.*; and \d+ more \(first"
    ):
        bad.require()


def test_the_first_wrong_token_is_found():
    report = run_ranks(3, lambda group: verify(Tiny("ignores the cut"), batch(), group))[0]
    # Rank 1 holds tokens 10 to 19 of 31: the first is token 5 of document 2, which begins at 5.
    assert row(report, "logits").detail == "first at position 5 of document 2, on rank 1"


def test_it_works_where_gradients_are_off():
    with torch.no_grad():
        assert verify(Tiny(), batch(), alone()).ok
        assert not torch.is_grad_enabled()


def test_an_error_of_the_model_itself_is_raised():
    class Fails(Tiny):
        def forward(self, tokens, cut):
            raise RuntimeError("the model's own error")

    with pytest.raises(RuntimeError, match="the model's own error"):
        verify(Fails(), batch(), alone())


def test_an_overview_has_a_row_for_each_report():
    good = verify(Tiny(), batch(), alone(), layout="zigzag")
    bad = run_ranks(2, lambda group: verify(Tiny("multiplies gradients"), batch(), group))[0]
    page = io.StringIO()
    Console(file=page, width=120).print(overview([good, bad]))
    assert "zigzag" in page.getvalue() and "size of the gradient" in page.getvalue()
    assert "1 of 2 ways of cutting differ" in page.getvalue()
