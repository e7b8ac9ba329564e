"""The battery: every row of the catalog, cut in every way, against its paper's equations token by token in fp64."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again

from seqpar import Cut, Shard
from seqpar.collectives import Group, Ledger, run_ranks
from seqpar.layers.catalog import CATALOG
from seqpar.layers.entry import Sizes
from seqpar.sharding.states import States
from tests.layers.drawn import relative
from tests.layers.rows import ROWS, listed
from tests.layers.rows.rows_local import UNFINISHED

SIZES = (1, 2, 3, 5, 8)
PACKED = [5, 0, 1, 21, 12, 1]  # the fourth lies across three of five or eight ranks
NAMES = list(ROWS)


@cache
def layer_of(name: str) -> nn.Module:
    """The row's layer in fp64, its weights large enough that every part of it matters."""
    with torch.random.fork_rng():
        torch.manual_seed(sum(name.encode()))
        layer = ROWS[name].make().double()
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        return layer


@cache
def inputs_of(name: str, tokens: int) -> tuple[Tensor, Tensor]:
    """An input and an upstream gradient."""
    generator = torch.Generator().manual_seed(7 + tokens)
    shape = (2, 2, tokens, ROWS[name].dim)
    x, upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, upstream


@cache
def expected_of(name: str, lengths: tuple[int, ...], late: bool = False) -> dict[str, Tensor]:
    """What the oracle says: output, gradient of the input and of every parameter. ``late``: loss on the last token."""
    layer = copy.deepcopy(layer_of(name))
    x, upstream = inputs_of(name, sum(lengths))
    x = x.clone().requires_grad_()
    y = ROWS[name].oracle(layer, x, lengths)
    leaves = {"input": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(y, list(leaves.values()), weight_of(upstream, late), allow_unused=True)
    zeros = [torch.zeros_like(of) if grad is None else grad for of, grad in zip(leaves.values(), grads)]
    return dict(zip(["output", *leaves], [y.detach(), *zeros]))


def weight_of(upstream: Tensor, late: bool) -> Tensor:
    if not late:
        return upstream
    last = torch.zeros_like(upstream)
    last[:, -1] = upstream[:, -1]
    return last


def cut_outcome(group: Group, name: str, cut: Cut, late: bool = False, again: bool = False) -> dict[str, Tensor]:
    """The same of this rank, gathered or summed; ``again``: under activation checkpointing."""
    layer, shard = copy.deepcopy(layer_of(name)), cut.shard
    whole, upstream = inputs_of(name, shard.num_tokens)
    x = shard.take(whole).clone().requires_grad_()
    y = run_again(layer, x, cut, use_reentrant=False) if again else layer(x, cut)
    y.backward(shard.take(weight_of(upstream, late)))
    grads = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in layer.named_parameters()}
    summed = {key: group.all_reduce(grad).wait() for key, grad in grads.items()}
    d_x = torch.zeros_like(x) if x.grad is None else x.grad
    return {"output": shard.gather(y.detach()), "input": shard.gather(d_x), **summed}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    errors = {part: relative(ours[part], theirs[part], floor=1e-3) for part in theirs}
    assert errors["output"] < 1e-12, errors
    assert max(errors.values()) < 1e-10, errors


def on_ranks(size: int, name: str, lengths: list[int], layout: str, **how: bool) -> None:
    def body(group: Group) -> dict[str, Tensor]:
        cut = Cut(Shard.of(lengths, group, layout), group, scan="all_gather" if size % 2 else "ring")
        return cut_outcome(group, name, cut, **how)

    expected = expected_of(name, tuple(lengths), how.get("late", False))  # draws the layer, before there are threads
    for outcome in run_ranks(size, body):
        assert_equal(outcome, expected)


def test_every_row_is_in_the_battery_and_every_one_works() -> None:
    """Or it is listed with what is missing."""
    assert {row.entry for row in ROWS.values()} == set(CATALOG) - set(UNFINISHED)
    assert {entry.name: entry.status for entry in CATALOG.values() if entry.status != "works"} == UNFINISHED


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", listed(NAMES))
def test_equals_its_equations_on_any_ranks(name: str) -> None:
    layouts = CATALOG[ROWS[name].entry].layouts
    for size in SIZES:
        for layout in layouts if size > 1 else layouts[:1]:
            on_ranks(size, name, PACKED, layout)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", listed(NAMES))
def test_documents_that_begin_at_a_cut_and_next_to_it(name: str) -> None:
    for shift in (-1, 0, 1):  # three ranks of ten tokens
        on_ranks(3, name, [10 + shift, 10, 10 - shift], "contiguous")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", listed(NAMES))
def test_fewer_tokens_than_ranks(name: str) -> None:
    on_ranks(5, name, [2, 1], "contiguous")
    on_ranks(3, name, [1], "contiguous")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", listed(NAMES))
def test_a_loss_on_the_last_token_reaches_the_first_rank(name: str) -> None:
    on_ranks(3, name, [30], "contiguous", late=True)
    if ROWS[name].remembers:
        d_input = expected_of(name, (30,), late=True)["input"]
        assert d_input[:, :10].norm() > 1e-3 * d_input.norm()  # or nothing would be tested


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", listed(NAMES))
def test_checkpointing_changes_nothing_and_sends_nothing_again(name: str) -> None:
    def body(group: Group) -> tuple[dict[str, Tensor], list[int]]:
        sent = []
        for again in (False, True):
            ledger = Ledger(group)
            outcome = cut_outcome(ledger, name, Cut(Shard.of(PACKED, ledger), ledger), again=again)
            sent.append(ledger.bytes_)
        return outcome, sent

    expected = expected_of(name, tuple(PACKED))
    for outcome, sent in run_ranks(3, body):
        assert_equal(outcome, expected)
        assert sent[0] == sent[1]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", listed(n for n in NAMES if CATALOG[ROWS[n].entry].causal))
def test_chunks_continue_where_the_last_one_ended(name: str) -> None:
    """States out and in, with their gradients: two calls equal one, the document cut over ranks in both (but softmax
    attention keeps states on one rank only)."""
    chunks = [9, 8]
    sizes = (1,) if CATALOG[ROWS[name].entry].transports else (1, 3)
    expected = expected_of(name, (sum(chunks),))
    for size in sizes:
        for outcome in run_ranks(size, in_chunks, name, chunks):
            assert_equal(outcome, expected)


def in_chunks(group: Group, name: str, chunks: list[int]) -> dict[str, Tensor]:
    layer, states = copy.deepcopy(layer_of(name)), States()
    whole, upstream = inputs_of(name, sum(chunks))
    inputs, outputs, ends = [], [], []
    for x, d_y in zip(whole.split(chunks, 1), upstream.split(chunks, 1)):
        shard = Shard.of([x.shape[1]], group)
        mine = shard.take(x).clone().requires_grad_()
        y = layer(mine, Cut(shard, group, states=states))
        states = states.next(x.shape[1])
        inputs.append((shard, mine))
        outputs.append(shard.gather(y.detach()))
        ends.append((y, shard.take(d_y)))
    torch.autograd.backward([y for y, _ in ends], [d_y for _, d_y in ends])
    grads = {key: group.all_reduce(zero_for(p)).wait() for key, p in layer.named_parameters()}
    d_input = torch.cat([shard.gather(zero_for(mine)) for shard, mine in inputs], 1)
    return {"output": torch.cat(outputs, 1), "input": d_input, **grads}


def zero_for(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


@pytest.mark.parametrize("name", listed(n for n in NAMES if CATALOG[ROWS[n].entry].causal))
def test_step_by_step_equals_the_parallel_form(name: str) -> None:
    layer, states, outputs = layer_of(name), States(), []
    x, _ = inputs_of(name, 17)
    with torch.no_grad():
        for token in x.split(1, 1):
            outputs.append(layer(token, Cut.whole([1], states)))
            states = states.next(1)
    assert relative(torch.cat(outputs, 1), expected_of(name, (17,))["output"]) < 1e-12


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", listed(NAMES))
def test_bfloat16_is_no_worse_when_cut(name: str) -> None:
    lengths = [40, 150, 2]
    exact = expected_bf16(name, lengths)

    def body(group: Group) -> dict[str, Tensor]:
        layer = copy.deepcopy(layer_of(name)).bfloat16()
        shard = Shard.of(lengths, group)
        whole, upstream = (x.bfloat16() for x in inputs_of(name, sum(lengths)))
        x = shard.take(whole).clone().requires_grad_()
        y = layer(x, Cut(shard, group))
        y.backward(shard.take(upstream))
        return {"output": shard.gather(y.detach()), "input": shard.gather(zero_for(x))}

    one, many = run_ranks(1, body)[0], run_ranks(8, body)[0]
    for part in ("output", "input"):
        errors = [typical_error(outcome[part].double(), exact[part]) for outcome in (one, many)]
        assert errors[1] <= 1.1 * errors[0], (part, errors)


def typical_error(ours: Tensor, theirs: Tensor) -> float:
    """The geometric mean of the tokens' relative errors: a norm of all would be that of the one or two tokens whose
    gradient is huge, those with a tiny output before a norm, and differ by half from one input to the next."""
    errors = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-3)
    return errors.clamp(min=1e-9).log().mean().exp().item()


def expected_bf16(name: str, lengths: list[int]) -> dict[str, Tensor]:
    """Of the weights and inputs as bfloat16 has them, in fp64."""
    layer = copy.deepcopy(layer_of(name)).bfloat16().double()
    x, upstream = (x.bfloat16().double() for x in inputs_of(name, sum(lengths)))
    x = x.requires_grad_()
    y = layer(x, Cut.whole(lengths))
    y.backward(upstream)
    assert x.grad is not None
    return {"output": y.detach(), "input": x.grad}


@pytest.mark.parametrize("name", sorted(set(CATALOG) - set(UNFINISHED)))
def test_bytes_per_cut_are_those_of_the_catalog(name: str) -> None:
    entry, sizes, tokens = CATALOG[name], Sizes(dim=32, heads=4, layer=1, layers=4), 24

    def body(group: Group) -> int:
        torch.manual_seed(0)
        layer, ledger = entry.make(sizes), Ledger(group)
        shard = Shard.of([2 * tokens], ledger)
        with torch.no_grad():
            layer(torch.randn(1, shard.num_local, sizes.dim), Cut(shard, ledger, scan="ring"))
        return ledger.bytes_

    assert sum(run_ranks(2, body)) == entry.bytes_per_cut(sizes, tokens)
