"""The softmax block: bands and their rectangles, both paths against a token-by-token oracle, and the split law."""

import math
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from seqpar.ops import softmax_block
from seqpar.ops.softmax_block import Band, Mask, area, attend, attend_backward, fused, merge, rectangles, reference
from tests.oracles.softmax import masked_attention, softmax_attention

SCALE = 0.3

# ---------------------------------------------------------------------------------------------------------------- bands


def _offsets(n: int, m: int) -> np.ndarray:
    return np.arange(m) - np.arange(n)[:, None]


def _seen(offsets: np.ndarray, band: Band) -> np.ndarray:
    """By the definition of a band, in numpy."""
    low = -(10**9) if band.low is None else band.low
    high = 10**9 if band.high is None else band.high
    return (offsets >= low) & (offsets <= high)


def _assert_exact_cover(offsets: np.ndarray, band: Band, tile: int) -> None:
    n, m = offsets.shape
    seen, got = _seen(offsets, band), np.zeros((n, m), dtype=int)
    pieces = rectangles(n, m, band, tile)
    for piece in pieces:
        inside = got[piece.rows, piece.keys]
        assert inside.size > 0
        if piece.mask == "causal":
            assert inside.shape[0] == inside.shape[1]
            inside += np.tri(inside.shape[0], dtype=int)
        elif piece.mask == "full":
            inside += 1
        else:
            assert inside.shape[0] <= tile
            inside += _seen(_offsets(*inside.shape), piece.mask)
    assert (got == seen).all(), (n, m, band, pieces)
    assert area(n, m, band) == seen.sum(), (n, m, band)
    if seen.size > 0 and seen.all():
        assert [piece.mask for piece in pieces] == ["full"]


def test_rectangles_cover_each_seen_pair_once_and_area_counts_them() -> None:
    bounds = [None, *range(-13, 14)]
    for n in range(13):
        for m in range(13):
            offsets = _offsets(n, m)
            for low in bounds:
                for high in bounds:
                    _assert_exact_cover(offsets, Band(low, high), tile=3)


def test_rectangles_of_larger_blocks_with_any_tile() -> None:
    random = np.random.default_rng(0)
    for _ in range(3000):
        n, m, low, tile = (int(random.integers(*ends)) for ends in ((1, 70), (1, 70), (-80, 80), (1, 20)))
        band = Band(low, None if random.random() < 0.3 else low + int(random.integers(0, 60)))
        _assert_exact_cover(_offsets(n, m), band, tile)


def test_rectangles_of_common_blocks() -> None:
    def cut(n: int, m: int, band: Band) -> list[tuple[int, int, int, int, str]]:
        return [(r.rows.start, r.rows.stop, r.keys.start, r.keys.stop, str(r.mask)) for r in rectangles(n, m, band)]

    assert cut(9, 9, Band(None, 0)) == [(0, 9, 0, 9, "causal")]
    assert cut(9, 9, Band(None, -1)) == [(1, 9, 0, 8, "causal")]
    assert cut(9, 12, Band(None, 3)) == [(0, 9, 0, 3, "full"), (0, 9, 3, 12, "causal")]
    assert cut(9, 12, Band()) == [(0, 9, 0, 12, "full")]
    assert cut(9, 9, Band(None, -9)) == []
    assert cut(9, 9, Band(0, None)) == [(0, 9, 0, 9, "Band(low=0, high=None)")]


@pytest.mark.parametrize("window", [1, 40, 64, 256, 1000, 5000])
def test_work_follows_the_area_of_the_band(window: int) -> None:
    """The pairs that the kernels visit are at most the band's area plus a tile per row."""
    band = Band(1 - window, 0)
    visited = sum((r.rows.stop - r.rows.start) * (r.keys.stop - r.keys.start) for r in rectangles(8192, 8192, band))
    seen = area(8192, 8192, band)
    head = window**2 // 2  # the causal square before the window starts to cut, whose upper half kernels skip
    assert visited - head <= seen + 8192 * 256
    masked = [r for r in rectangles(8192, 8192, band) if isinstance(r.mask, Band)]
    assert all(r.keys.stop - r.keys.start <= 2 * 256 for r in masked)


def test_a_band_says_its_mask_and_keys() -> None:
    for band in (Band(), Band(-2, 1), Band(None, -3), Band(2, None), Band(3, 1)):
        seen = _seen(_offsets(7, 9), band)
        assert np.array_equal(band.mask(7, 9).numpy(), seen)
        rows, keys = slice(2, 6), slice(3, 8)
        assert np.array_equal(band.within(rows, keys).mask(4, 5).numpy(), seen[rows, keys])
        run = band.keys_of(rows, 9)
        assert seen[rows].sum() == seen[rows, run].sum()


# ---------------------------------------------------------------------------------------------------------------- paths

SHAPES = [  # b, n, m, h, g, k, v
    pytest.param((2, 21, 21, 4, 4, 16, 16), id="heads"),
    pytest.param((2, 17, 29, 4, 2, 8, 8), id="grouped"),
    pytest.param((1, 30, 13, 6, 1, 16, 16), id="one-kv-head"),
    pytest.param((1, 19, 23, 2, 2, 24, 8), id="value-dim-smaller"),
    pytest.param((1, 19, 23, 4, 2, 5, 12), id="value-dim-larger"),
    pytest.param((1, 1, 9, 2, 1, 8, 8), id="one-query"),
    pytest.param((1, 9, 1, 2, 1, 1, 1), id="one-key-dim-one"),
]
BANDS = [Band(), Band(None, 0), Band(None, -1), Band(None, 5), Band(-3, 0), Band(-6, -2), Band(2, None), Band(-4, 7)]
BANDS += [Band(None, -40), Band(3, 2), Band(-40, 40)]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v and an upstream gradient."""
    b, n, m, h, g, k, v = shape
    random = torch.Generator().manual_seed(seed)
    sizes = ((b, n, h, k), (b, m, g, k), (b, m, g, v), (b, n, h, v))
    return tuple(torch.randn(size, generator=random, dtype=torch.float64).to(dtype) for size in sizes)


def _as_tensor(mask: Mask, n: int, m: int) -> Tensor:
    return mask if isinstance(mask, Tensor) else torch.from_numpy(_seen(_offsets(n, m), mask))


def _oracle(inputs: tuple[Tensor, ...], mask: Mask) -> list[Tensor]:
    """out, lse, dq, dk, dv by autograd through the oracle."""
    q, k, v = (x.double().clone().requires_grad_() for x in inputs[:3])
    out, lse = masked_attention(q, k, v, _as_tensor(mask, q.shape[1], k.shape[1]), SCALE)
    grads = torch.autograd.grad(out, (q, k, v), inputs[3].double(), allow_unused=True, materialize_grads=True)
    return [out.detach(), lse.detach(), *grads]


def _run(path: ModuleType, inputs: tuple[Tensor, ...], mask: Mask) -> list[Tensor]:
    """out, lse, dq, dk, dv of one block by the code under test."""
    q, k, v, d_out = inputs
    out, lse = path.attend(q, k, v, mask, SCALE)
    return [out, lse, *path.attend_backward(d_out, q, k, v, out, lse, mask, SCALE)]


def _assert_close(got: list[Tensor], expected: list[Tensor], forward: float, backward: float) -> None:
    """Relative norms; a gradient that is 0 by cancellation (one key) is measured against that of the values."""
    names = ("out", "lse", "dq", "dk", "dv")
    natural = expected[4].norm()
    for name, x, y, bound in zip(names, got, expected, (forward, forward, backward, backward, backward)):
        assert x.shape == y.shape, name
        finite = y.isfinite()
        assert torch.equal(x.isfinite(), finite), name
        error, size = (x - y)[finite].norm(), y[finite].norm()
        size = size if size > 1e-9 * natural else natural
        assert error <= bound * size, f"{name}: {error / size:.2e} > {bound:.0e}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_both_paths_are_the_oracle_in_fp64(shape: tuple[int, ...], band: Band) -> None:
    inputs = _inputs(shape, torch.float64)
    expected = _oracle(inputs, band)
    for path in (reference, fused, softmax_block):
        _assert_close(_run(path, inputs, band), expected, 1e-12, 1e-10)


@pytest.mark.parametrize("dtype, forward, backward", [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 6e-3, 1.2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_stays_close_in_low_precision(
    shape: tuple[int, ...], dtype: torch.dtype, forward: float, backward: float
) -> None:
    for band in BANDS:
        inputs = _inputs(shape, dtype)
        got = _run(softmax_block, inputs, band)
        assert all(x.dtype == torch.float32 for x in got)
        _assert_close(got, _oracle(inputs, band), forward, backward)


@pytest.mark.parametrize(
    "band", [Band(-39, 0), Band(-299, 0), Band(-299, 20), Band(-330, -30), Band(-280, None)], ids=str
)
def test_windows_over_many_tiles(band: Band) -> None:
    """Large enough for several tiles along the lower edge and for causal squares beside them."""
    inputs = _inputs((1, 620, 600, 2, 1, 4, 4), torch.float64)
    assert len(rectangles(620, 600, band)) >= 5
    expected = _oracle(inputs, band)
    _assert_close(_run(fused, inputs, band), expected, 1e-12, 1e-10)
    _assert_close(_run(reference, inputs, band), expected, 1e-12, 1e-10)
    inputs = tuple(x.float() for x in inputs)
    _assert_close(_run(softmax_block, inputs, band), _oracle(inputs, band), 1e-5, 1e-5)


@pytest.mark.parametrize("scores", [1, 40, 1000])
def test_the_reference_does_not_depend_on_its_tiles(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SCORES_PER_TILE", scores)
    inputs = _inputs((2, 17, 29, 4, 2, 8, 6), torch.float64)
    for mask in (
        Band(-5, 3),
        Band(None, 2),
        Band(),
        torch.rand(17, 29, generator=torch.Generator().manual_seed(2)) < 0.3,
    ):
        _assert_close(_run(reference, inputs, mask), _oracle(inputs, mask), 1e-12, 1e-10)


def _documents(lengths: list[int]) -> Tensor:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (ids.unsqueeze(1) == ids) & Band(None, 0).mask(len(ids), len(ids))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1.2e-2)])
def test_boolean_masks(dtype: torch.dtype, bound: float) -> None:
    inputs = _inputs((2, 24, 24, 4, 2, 8, 8), dtype)
    documents = _documents([3, 1, 12, 8])
    rows_without_keys = torch.rand(24, 24, generator=torch.Generator().manual_seed(1)) < 0.4
    rows_without_keys[[0, 7, 8, 23]] = False
    for mask in (documents, documents.T, rows_without_keys, torch.zeros(24, 24, dtype=torch.bool)):
        got = _run(softmax_block, inputs, mask)
        _assert_close(got, _oracle(inputs, mask), bound, bound)
        assert torch.equal(got[1][0, :, 0] == -math.inf, ~mask.any(1))


def test_the_oracle_of_documents_agrees_with_a_boolean_mask() -> None:
    q, k, v, _ = _inputs((1, 24, 24, 4, 2, 8, 8), torch.float64)
    out, _ = attend(q, k, v, _documents([3, 1, 12, 8]), SCALE)
    expected = softmax_attention(q, k, v, [3, 1, 12, 8], scale=SCALE)
    assert (out - expected).norm() <= 1e-12 * expected.norm()
    out, _ = attend(q, k, v, Band(-4, 0), SCALE)
    expected = softmax_attention(q, k, v, window=5, scale=SCALE)
    assert (out - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, m", [(0, 5), (5, 0), (0, 0)])
def test_empty_blocks(n: int, m: int, dtype: torch.dtype) -> None:
    inputs = _inputs((1, n, m, 4, 2, 8, 6), dtype)
    for mask in (Band(None, 0), torch.ones(n, m, dtype=torch.bool)):
        got = _run(softmax_block, inputs, mask)
        assert [x.shape for x in got] == [(1, n, 4, 6), (1, n, 4), *(x.shape for x in inputs[:3])]
        assert all(bool((x == 0).all()) for i, x in enumerate(got) if i != 1)
        assert bool((got[1] == -math.inf).all())


def test_strided_inputs() -> None:
    """Views into one projection, and an upstream gradient without strides of its own, give the same numbers."""
    together = _inputs((2, 20, 1, 6, 1, 24, 1), torch.float32)[0]
    q, k, v = together[:, :, :, :8], together[:, :, 4:, 8:16], together[:, :, 4:, 16:]
    d_out = _inputs((2, 1, 1, 6, 1, 1, 1), torch.float32, seed=1)[0].expand(2, 20, 6, 8)
    heads_last = tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v, d_out))
    for inputs in ((q, k, v, d_out), heads_last):
        for band in (Band(-7, 0), Band(None, 0)):
            _assert_close(_run(softmax_block, inputs, band), _oracle(inputs, band), 1e-5, 1e-5)


# ---------------------------------------------------------------------------------------------------------------- split


def _run_split(inputs: tuple[Tensor, ...], band: Band, cuts: list[int], order: list[int]) -> list[Tensor]:
    """out, lse, dq, dk, dv of a block whose keys are cut at ``cuts`` and whose parts are merged in ``order``."""
    q, k, v, d_out = inputs
    runs = [slice(a, z) for a, z in pairwise(cuts)]
    parts = [(runs[i], band.within(slice(0, q.shape[1]), runs[i])) for i in order]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(d_out.shape, dtype=dtype)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype)
    for keys, part in parts:
        merge(out, lse, *attend(q, k[:, keys], v[:, keys], part, SCALE), slice(0, q.shape[1]))
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype) for x in (q, k, v))
    for keys, part in parts:
        grads = attend_backward(d_out, q, k[:, keys], v[:, keys], out, lse, part, SCALE)
        dq += grads[0]
        dk[:, keys] += grads[1]
        dv[:, keys] += grads[2]
    return [out, lse, dq, dk, dv]


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize(
    "dtype, forward, backward",
    [(torch.float64, 1e-12, 1e-10), (torch.float32, 1e-5, 1e-5), (torch.bfloat16, 6e-3, 1.2e-2)],
)
def test_split_law(band: Band, dtype: torch.dtype, forward: float, backward: float) -> None:
    """Blocks merged by their log-sum-exp are the whole; their gradients, given the whole's, add up."""
    inputs = _inputs((2, 23, 31, 4, 2, 8, 6), dtype)
    expected = _oracle(inputs, band)
    _assert_close(_run_split(inputs, band, [0, 12, 31], [0, 1]), expected, forward, backward)
    _assert_close(_run_split(inputs, band, [0, 3, 3, 11, 30, 31], [3, 1, 4, 0, 2]), expected, forward, backward)


def test_merge_of_some_rows_leaves_the_others() -> None:
    q, k, v, _ = _inputs((1, 10, 12, 2, 1, 8, 8), torch.float64)
    out, lse = attend(q, k[:, :5], v[:, :5], Band(), SCALE)
    before = out.clone(), lse.clone()
    merge(out, lse, *attend(q[:, 4:7], k[:, 5:], v[:, 5:], Band(), SCALE), slice(4, 7))
    whole = attend(q, k, v, Band(), SCALE)
    for x, old, new in zip((out, lse), before, whole):
        assert torch.equal(x[:, :4], old[:, :4]) and torch.equal(x[:, 7:], old[:, 7:])
        assert (x[:, 4:7] - new[:, 4:7]).norm() <= 1e-13 * new.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_is_stable(dtype: torch.dtype) -> None:
    """Nothing on either side, or scores far apart: no NaN, and the larger one wins; true NaN is not hidden."""
    nothing = -math.inf
    lse = torch.tensor([nothing, nothing, 2.0, 1000.0, -1000.0, math.nan], dtype=dtype).view(1, 6, 1)
    block_lse = torch.tensor([nothing, 3.0, nothing, -1000.0, 1000.0, 0.0], dtype=dtype).view(1, 6, 1)
    out = torch.tensor([0.0, 0.0, 5.0, 5.0, 5.0, 5.0], dtype=dtype).view(1, 6, 1, 1)
    block_out = torch.tensor([0.0, 7.0, 0.0, 7.0, 7.0, 7.0], dtype=dtype).view(1, 6, 1, 1)
    merge(out, lse, block_out, block_lse, slice(0, 6))
    assert out.flatten()[:5].tolist() == [0, 7, 5, 5, 7]
    assert lse.flatten()[:5].tolist() == [nothing, 3, 2, 1000, 1000]
    assert bool(out[0, 5].isnan().all()) and bool(lse[0, 5].isnan().all())


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": (1, 5, 3, 8)}, "multiple"),
        ({"q": (5, 4, 8)}, "batch, tokens, heads, dim"),
        ({"k": (1, 6, 2, 4)}, "share batch and dim"),
        ({"v": (1, 7, 2, 8)}, "share batch and dim"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"q": (1, 5, 4, 8), "k": (1, 6, 2, 8), "v": (1, 6, 2, 8)} | change
    with pytest.raises(ValueError, match=message):
        attend(torch.zeros(shapes["q"]), torch.zeros(shapes["k"]), torch.zeros(shapes["v"]), Band(), SCALE)


def test_dtypes_masks_and_results_that_do_not_fit_are_refused() -> None:
    q, k, v, d_out = _inputs((1, 5, 6, 4, 2, 8, 8), torch.float32)
    with pytest.raises(ValueError, match="share dtype"):
        attend(q, k.double(), v, Band(), SCALE)
    for mask in (torch.ones(5, 6), torch.ones(6, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"boolean \[5, 6\]"):
            attend(q, k, v, mask, SCALE)
    out, lse = attend(q, k, v, Band(), SCALE)
    with pytest.raises(ValueError, match="lse"):
        attend_backward(d_out, q, k, v, out, lse.transpose(1, 2), Band(), SCALE)


# ----------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.parametrize("seen", ["full", "causal"])
def test_the_cuda_calls_fit_the_operators(seen: str) -> None:
    """On the meta device, which checks arguments and shapes without a GPU."""
    q, k, v, d_out = (torch.empty(2, heads, 9, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2, 4))
    out, lse = fused.cuda_forward(q, k, v, seen, SCALE)
    assert out.shape == q.shape and lse.shape == (2, 4, 9)
    grads = fused.cuda_backward(d_out, q, k, v, out, lse, seen, SCALE)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, forward, backward", [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 6e-3, 1.2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda(shape: tuple[int, ...], dtype: torch.dtype, forward: float, backward: float) -> None:
    for band in BANDS:
        inputs = _inputs(shape, dtype)
        got = [x.cpu() for x in _run(softmax_block, tuple(x.cuda() for x in inputs), band)]
        _assert_close(got, _oracle(inputs, band), forward, backward)
