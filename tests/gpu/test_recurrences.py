"""Kernels of every recurrence, forward and every gradient, against the reference in fp64 on the CPU."""

from dataclasses import replace

import pytest
import torch

from seqpar.ops import problems
from seqpar.ops.decayed_linear_attention import DecayedLinearAttention
from seqpar.ops.delta_rule import DeltaRule
from seqpar.ops.diagonal_scan import DiagonalScan, SelectiveScan
from seqpar.ops.selfcheck import both, boundary, placed, relative_error, results
from tests.gpu.here import DEVICE, DTYPES, only_gpu, sized

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

FLOOR = {torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}  # about a rounding to the inputs' dtype
SLACK = 1.25  # by how much kernels may be worse than the torch reference in the same dtype
NAMES = {"decayed": ("none", "constant", "scalar", "vector"), "delta": ("none", "scalar", "vector"),
         "scans": ("diagonal", "selective")}  # fmt: skip
OPS = {"decayed": (DecayedLinearAttention,), "delta": (DeltaRule,), "scans": (DiagonalScan, SelectiveScan)}
SIZES = sized([(16, 1), (60, 63), (64, 1000), (100, 130), (128, 333), (256, 150)], [(16, 17)])
ALL = [(op, name) for op, names in NAMES.items() for name in names]
KINDS = sized(ALL, [("decayed", "scalar"), ("delta", "scalar"), ("scans", "diagonal")])
HEADS = sized([kind for kind in ALL if kind[0] != "scans"], [("decayed", "scalar")])
GATED = sized([kind for kind in HEADS if kind[1] in ("scalar", "vector")], [("decayed", "scalar")])
RESULTS = ("output", "outgoing", "outgoing gradient")


def problem(op, name, *sizes):
    return next(found for found in getattr(problems, op)(*OPS[op], *sizes) if found.name == name)


def check(found_problem, dtype):
    """Every result is as near to fp64 as the reference's in this dtype, or nearer than the floor."""
    found, expected = both(found_problem, DEVICE, dtype)
    plain, _ = both(replace(found_problem, build=lambda impl: found_problem.build("reference")), DEVICE, dtype)
    for number, (mine, theirs, exact) in enumerate(zip(found, plain, expected, strict=True)):
        is_gradient = number >= len(RESULTS)
        what = f"gradient {number - len(RESULTS)}" if is_gradient else RESULTS[number]
        floor = (2 if is_gradient else 1) * FLOOR[dtype]  # gradients of gates are differences of larger numbers
        error, allowed = relative_error(mine, exact), max(floor, SLACK * relative_error(theirs, exact))
        assert error <= allowed, f"{what}: relative error {error:.2e}, at most {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "tokens"), SIZES)
@pytest.mark.parametrize(("op", "name"), KINDS)
def test_kernels_are_as_exact_as_the_reference(op, name, dim, tokens, dtype):
    check(problem(op, name, dim, tokens), dtype)


@pytest.mark.parametrize("dims", sized([(64, 128), (128, 60)], [(16, 20)]))
@pytest.mark.parametrize(("op", "name"), HEADS)
def test_keys_and_values_of_different_dims(op, name, dims):
    key_dim, value_dim = dims
    check(problem(op, name, key_dim, sized(200, 20), value_dim), torch.float32)


@pytest.mark.parametrize("starts", [(), (0,), (1, 2, 16), sized((63, 64, 65, 128), (15, 16, 17))])
@pytest.mark.parametrize(("op", "name"), sized(ALL, [("scans", "diagonal")]))
def test_nothing_leaks_between_documents(op, name, starts):
    check(problem(op, name, sized(64, 16), sized(200, 20)).documents(starts), torch.float32)


def strong(gates):
    """Gates that forget all at once, then hardly anything."""
    gates = gates.clone()
    gates[:, ::7], gates[:, 1::7] = -20.0, -1e-4
    return gates


def closed(gates):
    """A gate that lets nothing through, amid ordinary ones."""
    gates = gates.clone()
    gates[:, gates.shape[1] // 2] = -float("inf")
    return gates


@pytest.mark.parametrize("change", [strong, closed, torch.zeros_like], ids=["strong", "closed", "open"])
@pytest.mark.parametrize(("op", "name"), GATED)
def test_extreme_gates_keep_full_precision(op, name, change):
    given = problem(op, name, sized(64, 16), sized(200, 20))
    check(replace(given, tokens=(*given.tokens[:-1], change(given.tokens[-1]))), torch.float32)


@only_gpu
@pytest.mark.parametrize(("op", "name"), KINDS)
def test_the_same_inputs_give_the_same_bits(op, name):
    given = problem(op, name, 64, 1000)
    (first, _), (second, _) = (both(given, DEVICE, torch.bfloat16) for _ in range(2))
    assert all(x is y or torch.equal(x, y) for x, y in zip(first, second))


@only_gpu
def test_more_elements_than_32_bits_count():
    """The last document of a very long run is what it is alone."""
    tokens, heads, dim, last = 600_000, 32, 128, 200
    if torch.cuda.get_device_properties(DEVICE).total_memory < 70 << 30:
        pytest.skip("needs 70 GiB of device memory")
    op = problem("decayed", "constant", 16, 8).build("triton")
    make = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, dim, device=DEVICE, dtype=torch.bfloat16, generator=make) for _ in range(3)
    )
    decay = torch.full((heads,), -0.01, device=DEVICE)
    run = op.begin((q, k, v, None), (decay,), (tokens - last,))
    long = op.finish(run, op.intra(run), None)[:, -last:].clone()
    alone = op.begin((*(x[:, -last:].contiguous() for x in (q, k, v)), None), (decay,), (0,))
    assert relative_error(long, op.finish(alone, op.intra(alone), None)) < 5e-3
    assert relative_error(run.outgoing, alone.outgoing) < 1e-4


@pytest.mark.parametrize(("op", "name"), ALL)
def test_a_wrong_kernel_would_be_seen(op, name):
    """The check that all tests here make fails where one result is off by a hundredth."""
    given = problem(op, name, 16, 37)

    def off(impl):
        reference = given.build("reference")
        return reference if impl == "reference" else Off(reference)

    with pytest.raises(AssertionError, match=r"gradient [01]"):
        check(replace(given, build=off), torch.float32)


class Off:
    """An op whose first gradient is off by a hundredth."""

    def __init__(self, op):
        self._op = op

    def __getattr__(self, name):
        return getattr(self._op, name)

    def finish_backward(self, *arguments):
        (first, second, *others), shared = self._op.finish_backward(*arguments)
        if first is None:
            second = second * 1.01
        else:
            first = first * 1.01
        return (first, second, *others), shared


def test_results_hold_all_that_stages_give():
    given = problem("decayed", "vector", 16, 20)
    tokens = placed(given.tokens, torch.device("cpu"), torch.float64)
    op = given.build("reference")
    found = results(op, tokens, (), given.starts, *boundary(op, tokens, (), given.starts, torch.float64))
    assert [tuple(x.shape) for x in found] == [
        (1, 20, 2, 16), (1, 2, 16, 16), (1, 2, 16, 16), *[(1, 20, 2, 16)] * 4
    ]  # fmt: skip
