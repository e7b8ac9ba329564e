"""The softmax kernel, forward and every gradient, against the reference in fp64 on the CPU."""

import math

import pytest
import torch

from seqpar.ops.selfcheck import random_tensors, relative_error
from seqpar.ops.softmax_block import reference
from seqpar.ops.softmax_block.bands import Band
from tests.gpu.here import DEVICE, DTYPES, sized

pytest.importorskip("triton")
kernel = pytest.importorskip("seqpar.ops.softmax_block.kernel")
kernel_backward = pytest.importorskip("seqpar.ops.softmax_block.kernel_backward")
pytestmark = pytest.mark.gpu

LIMIT = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
MASKS = {
    "all": Band(),
    "causal": Band(high=0),
    "window": Band(low=-9, high=0),
    "later keys": Band(high=-3),
    "earlier keys": Band(high=5),
    "unseen": Band(low=10_000),
}


def tensors(queries, keys, heads, groups, dim, value_dim, dtype):
    shapes = [
        (2, queries, heads, dim),
        (2, keys, groups, dim),
        (2, keys, groups, value_dim),
        (2, queries, heads, value_dim),
    ]
    return [x.to(dtype) for x in random_tensors(0, *shapes)]


def check(inputs, mask, dtype):
    q, k, v, d_out = inputs
    scale = q.shape[-1] ** -0.5
    exact = [x.double() for x in (q, k, v)]
    out, lse = reference.attend(*exact, mask, scale)
    expected = reference.attend_backward(d_out.double(), *exact, out, lse, mask, scale)
    q, k, v, d_out = (x.to(DEVICE) for x in inputs)
    mask = mask.to(DEVICE) if isinstance(mask, torch.Tensor) else mask
    found_out, found_lse = kernel.attend(q, k, v, mask, scale)
    found = kernel_backward.attend_backward(d_out, q, k, v, found_out, found_lse, mask, scale)
    assert found_out.dtype == found_lse.dtype == torch.float32
    seen = lse > -math.inf
    assert torch.equal(found_lse.cpu() > -math.inf, seen)
    pairs = [(found_out, out), (found_lse.cpu()[seen], lse[seen]), *zip(found, expected)]
    errors = [relative_error(mine, exact) if exact.norm() > 0 else float(mine.norm()) for mine, exact in pairs]
    assert max(errors) <= LIMIT[dtype], errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", sized(list(MASKS), ["causal", "unseen"]))
@pytest.mark.parametrize("dim", sized([16, 60, 64, 100, 128, 256], [16]))
def test_kernels_are_exact(mask, dim, dtype):
    check(tensors(sized(300, 17), sized(333, 19), 4, 2, dim, dim, dtype), MASKS[mask], dtype)


@pytest.mark.parametrize(("queries", "keys"), sized([(1, 1), (1, 500), (500, 1), (63, 65), (1000, 1000)], [(1, 17)]))
def test_few_and_many_tokens(queries, keys):
    check(
        tensors(queries, keys, 2, 1, sized(64, 16), sized(128, 16), torch.float32),
        Band(high=keys - queries),
        torch.float32,
    )


def test_masks_of_cells_and_rows_that_see_nothing():
    inputs = tensors(sized(100, 17), sized(90, 19), 2, 2, 16, 16, torch.float32)
    cells = random_tensors(3, (inputs[0].shape[1], inputs[1].shape[1]))[0] > 0
    cells[3] = False
    check(inputs, cells, torch.float32)


def test_a_wrong_gradient_would_be_seen(monkeypatch):
    right = kernel_backward.attend_backward

    def off(*arguments):
        dq, dk, dv = right(*arguments)
        return dq, dk * 1.01, dv

    monkeypatch.setattr(kernel_backward, "attend_backward", off)
    with pytest.raises(AssertionError):
        check(tensors(17, 17, 2, 2, 16, 16, torch.float32), Band(high=0), torch.float32)
