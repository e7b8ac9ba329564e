"""Random programs of wrapping, freezing, calling, stepping: the gradients of one device, or the same refusal."""

import ast
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqpar import Cut, next_token_loss, sequence_parallel
from seqpar.collectives import alone, run_ranks
from tests.training.test_wrap import batch, tiny
from tests.worlds.anew import run_cases

LENGTHS = [5, 1, 7]
GROUPS = ("all", "halves", "alone")
PARTS = ("embed", "mixers.0", "mixers.1.project", "mixers.1.out", "head", "head.bias")

draw = st.tuples
wrappers = st.integers(0, 2)
seeds = st.integers(0, 3)
parts = st.sampled_from(PARTS)
steps = st.one_of(
    draw(st.just("wrap"), wrappers, st.sampled_from(GROUPS), st.sampled_from(("contiguous", "zigzag", "striped"))),
    draw(st.just("call"), wrappers, seeds),
    draw(st.just("call"), wrappers, seeds),
    draw(st.just("logits"), wrappers, seeds),
    draw(st.just("product"), wrappers, seeds),
    draw(st.just("penalise"), parts),
    draw(st.just("uncut"), seeds),
    draw(st.just("freeze"), parts),
    draw(st.just("unfreeze"), parts),
    draw(st.just("backward"), st.booleans()),
    draw(st.just("backward"), st.booleans()),
    draw(st.just("step")),
    draw(st.just("zero")),
    draw(st.just("hook"), parts),
    draw(st.just("checkpoint"), st.sampled_from((None, False, True))),
    draw(st.just("second order"), wrappers),
    draw(st.just("wrap a wrapper"), wrappers),
)


class Program:
    """One rank's run of a program."""

    def __init__(self, group: Any, reentrant: bool | None, tied: bool) -> None:
        self.group = group
        self.inner = tiny(reentrant=reentrant)
        del self.inner.mixers[2:]
        if tied:
            self.inner.mixers.append(self.inner.mixers[0])
            self.inner.head.weight = self.inner.embed.weight
        self.wrapped = [sequence_parallel(self.inner, group=group) for _ in range(3)]
        self.pending: list[torch.Tensor] = []
        self.refused: list[str] = []

    def run(self, program: list[tuple[Any, ...]]) -> tuple[torch.Tensor, list[str]]:
        for name, *arguments in [*program, ("backward", False)]:
            try:
                getattr(self, name.replace(" ", "_"))(*arguments)
            except ValueError as error:
                self.refused.append(f"{name}: {str(error).partition(': ')[2]}")
                self.pending.clear()
        assert all(isinstance(p, torch.nn.Parameter) for p in self.inner.parameters())
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.inner.parameters()]
        return torch.cat([x.detach().flatten() for x in (*found, *self.inner.parameters())]), self.refused

    def part(self, name):
        found = self.inner.get_submodule(name) if name != "head.bias" else self.inner.head.bias
        return [found] if isinstance(found, torch.Tensor) else list(found.parameters())

    def wrap(self, number, over, layout):
        group = {"all": self.group, "halves": self.group, "alone": alone()}[over]
        if over == "halves" and self.group.size > 1:
            ranks, half = list(range(self.group.size)), self.group.size // 2
            group = self.group.partition([ranks[:half], ranks[half:]])
        self.wrapped[number] = sequence_parallel(self.inner, group=group, layout=layout)

    def output(self, number, seed):
        tokens, labels = batch(LENGTHS, seed)
        return self.wrapped[number](tokens, labels=labels, lengths=LENGTHS)

    def call(self, number, seed):
        self.pending.append(self.output(number, seed).loss)

    def logits(self, number, seed):
        self.pending.append(0.01 * self.output(number, seed).logits.square().sum())

    def product(self, number, seed):
        self.pending.append(self.output(number, seed).loss * self.output(0, seed + 1).loss)

    def penalise(self, name):
        self.pending.append(sum(p.square().sum() for p in self.part(name)))

    def uncut(self, seed):
        tokens, labels = batch(LENGTHS, seed)
        cut = Cut.whole(LENGTHS)
        self.pending.append(next_token_loss(self.inner(tokens, cut), labels, shard=cut.shard, group=alone()))

    def before_freezing(self):
        """Between forward and backward torch itself refuses it, where layers are checkpointed without reentrance."""
        if self.inner.reentrant is False:
            self.backward(False)

    def freeze(self, name):
        self.before_freezing()
        for parameter in self.part(name):
            parameter.requires_grad_(False)

    def unfreeze(self, name):
        self.before_freezing()
        for parameter in self.part(name):
            parameter.requires_grad_(True)

    def backward(self, twice):
        total = sum((term for term in self.pending if term.requires_grad), start=torch.zeros(()))
        self.pending.clear()
        if total.requires_grad:
            for again in (True, False)[not twice :]:
                total.backward(retain_graph=again)

    def step(self):
        self.backward(False)
        with torch.no_grad():
            for parameter in self.inner.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad / (1 + parameter.grad.norm())

    def zero(self):
        self.inner.zero_grad()

    def hook(self, name):
        for parameter in self.part(name):
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: 0.5 * gradient)

    def checkpoint(self, reentrant):
        self.backward(False)
        self.inner.reentrant = reentrant

    def second_order(self, number):
        self.backward(False)
        weight = self.inner.embed.weight
        if not weight.requires_grad or self.inner.reentrant:
            return
        loss = self.output(number, 0).loss
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        (loss + gradient.square().sum()).backward()

    def wrap_a_wrapper(self, number):
        sequence_parallel(self.wrapped[number], group=self.group)


def execute(group, program, reentrant, tied):
    return Program(group, reentrant, tied).run(program)


def reasons(refused):
    """Which steps were refused."""
    return [each.partition(":")[0] for each in refused]


def check(program, reentrant, tied, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, refused = execute(alone(), program, reentrant, tied)
        ranks = run_ranks(size, execute, program, reentrant, tied)
    first = ranks[0][1]
    for _, mine in ranks:
        assert reasons(mine) == reasons(first), "ranks were refused other things"
    if reasons(first) == reasons(refused):
        for got, _ in ranks:
            assert (got - expected).norm() <= 1e-10 * expected.norm()
    else:
        assert set(reasons(first)) - set(reasons(refused)), "one device refuses what ranks do not"


DRAWN = {
    "program": st.lists(steps, min_size=1, max_size=12),
    "reentrant": st.sampled_from((None, False, True)),
    "tied": st.booleans(),
}
RANDOM = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@given(**DRAWN)
@settings(max_examples=25, derandomize=True, **RANDOM)
def test_random_programs(size, program, reentrant, tied):
    check(program, reentrant, tied, size)


def test_a_hook_on_a_parameter_that_nothing_reaches():
    """Found by the night's programs: torch gave the hook None."""
    check([("freeze", "embed"), ("hook", "mixers.0"), ("checkpoint", True), ("call", 0, 0)], None, False, 2)


@pytest.mark.nightly
@pytest.mark.timeout(0)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@given(**DRAWN)
@settings(max_examples=500, **RANDOM)
def test_two_thousand_random_programs(size, program, reentrant, tied):
    check(program, reentrant, tied, size)


def on_a_process(group, case):
    """How far the gradients are from those of one device, and what was refused here and there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program, reentrant, tied = ast.literal_eval(case)
        expected, there = execute(alone(), program, reentrant, tied)
        got, here = execute(group, program, reentrant, tied)
    far = float((got - expected).norm() / expected.norm())
    return repr((far, reasons(here), reasons(there)))


def programs(number):
    """So many, the same in every run."""
    found = []

    @given(**DRAWN)
    @settings(max_examples=number, derandomize=True, **RANDOM)
    def collect(program, reentrant, tied):
        found.append(repr((program, reentrant, tied)))

    collect()
    return found


@pytest.mark.nightly
@pytest.mark.timeout(0)
@pytest.mark.parametrize("size", [2, 3])
def test_random_programs_on_processes(size):
    for case, outcomes, _ in run_cases(on_a_process, programs(50), size):
        found = [ast.literal_eval(each) for each in outcomes]
        (far, here, there), *_ = found
        assert all(each[1] == here for each in found), f"ranks were refused other things in {case}: {found}"
        if here == there:
            assert all(each[0] <= 1e-10 for each in found), f"{case}: {far}"
        else:
            assert set(here) - set(there), f"one device refuses what ranks do not in {case}: {found}"
