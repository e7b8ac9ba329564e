"""The kernels of the softmax block against a token-by-token oracle, on a GPU or in Triton's interpreter."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from seqpar.ops import choice, launch, softmax_block
from seqpar.ops.softmax_block import Band, Mask, attend, attend_backward, block_attention, fused, merge, selfcheck
from seqpar.ops.softmax_block.tiles import DTYPES, LARGEST_DIM, LARGEST_TILE, tiles
from tests.oracles.softmax import masked_attention, softmax_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = 0.3
NAMES = ("out", "lse", "dq", "dk", "dv")

pytestmark = pytest.mark.skipif(not choice.has_triton(), reason="needs triton")


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """q, k, v, and gradients of the output and of the log-sum-exp."""
    b, n, m, h, g, k, v = shape
    *inputs, d_lse = tensors(dtype, (b, n, h, k), (b, m, g, k), (b, m, g, v), (b, n, h, v), (b, n, h), seed=seed)
    return [*inputs, d_lse.to(torch.float64 if dtype == torch.float64 else torch.float32)]


def seen_by(mask: Mask, n: int, m: int) -> Tensor:
    """By the definition of a band."""
    if isinstance(mask, Tensor):
        return mask
    offset = torch.arange(m, device=DEVICE) - torch.arange(n, device=DEVICE)[:, None]
    low, high = -math.inf if mask.low is None else mask.low, math.inf if mask.high is None else mask.high
    return (offset >= low) & (offset <= high)


def oracle(inputs: list[Tensor], mask: Mask) -> list[Tensor]:
    """Output, log-sum-exp and gradients by autograd, through both, in fp64."""
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    out, lse = masked_attention(q, k, v, seen_by(mask, q.shape[1], k.shape[1]), SCALE)
    some = lse.isfinite()
    loss = (out * inputs[3].double()).sum() + (lse[some] * inputs[4].double()[some]).sum()
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    if bool(some.any()):
        grads = list(torch.autograd.grad(loss, (q, k, v)))
    return [out.detach(), lse.detach(), *grads]


def run(inputs: list[Tensor], mask: Mask, impl: str = "triton") -> list[Tensor]:
    q, k, v, d_out, d_lse = inputs
    out, lse = attend(q, k, v, mask, SCALE, impl=impl)
    return [out, lse, *attend_backward(d_out, q, k, v, out, lse, mask, SCALE, d_lse=d_lse, impl=impl)]


def run_split(inputs: list[Tensor], band: Band, num: int, impl: str = "triton") -> list[Tensor]:
    """As ``run``, over ``num`` blocks of keys, merged; like a ring it rounds the merged output once."""
    q, k, v, d_out, d_lse = inputs
    bounds = [len(keys) for keys in torch.arange(k.shape[1]).tensor_split(num)]
    parts = [slice(sum(bounds[:i]), sum(bounds[: i + 1])) for i in range(num)]
    rows = slice(0, q.shape[1])
    out, lse = torch.zeros(d_out.shape, device=DEVICE), torch.full(q.shape[:3], -math.inf, device=DEVICE)
    for keys in parts:
        merge(out, lse, *attend(q, k[:, keys], v[:, keys], band.within(rows, keys), SCALE, impl=impl), rows)
    out = out.to(q.dtype)
    grads = [
        attend_backward(
            d_out, q, k[:, keys], v[:, keys], out, lse, band.within(rows, keys), SCALE, d_lse=d_lse, impl=impl
        )
        for keys in parts
    ]
    dq, dk, dv = zip(*grads)
    return [out, lse, sum(dq[1:], dq[0]), torch.cat(dk, 1), torch.cat(dv, 1)]


def errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative norms, over what is finite in the oracle; what is not must be the same.

    A gradient far smaller than the others (of the weight of the only key, say) is measured against those.
    """
    found, size = [], max((float(x.norm()) for x in expected[2:]), default=0.0)
    for index, (x, y) in enumerate(zip(got, expected)):
        finite = y.isfinite()
        assert x.shape == y.shape and torch.equal(x[~finite].double(), y[~finite]), NAMES[index]
        assert bool(x.isfinite().eq(finite).all()), NAMES[index]
        norm = float(y[finite].norm())
        natural = norm if index < 2 else max(norm, 0.1 * size)
        found.append(float((x[finite] - y[finite]).norm()) / max(natural, 1e-9))
    return found


def assert_close(got: list[Tensor], expected: list[Tensor], bound: float) -> None:
    found = errors(got, expected)
    assert max(found) <= bound, dict(zip(NAMES, found))


# ------------------------------------------------------------------------------------------------------ oracle, forward
# Every comparison is of forward and backward together: output, log-sum-exp, dq, dk, dv.

BANDS = [
    Band(),
    Band(None, 0),
    Band(None, -7),
    Band(None, 20),
    Band(-15, 0),
    Band(-40, -20),
    Band(3, None),
    Band(-9, 33),
]
SIZES = [(1, 1), (1, 100), (15, 17), (16, 16), (17, 63), (63, 16), (100, 100), (100, 15), (63, 1), (16, 15)]


@pytest.mark.parametrize("index", range(len(SIZES)), ids=lambda i: "x".join(map(str, SIZES[i])))
def test_any_number_of_queries_and_keys_under_any_band(index: int) -> None:
    n, m = SIZES[index]
    inputs = problem((1, n, m, 1, 1, 16, 16))
    for band in BANDS[index % 3 :: 3]:
        assert_close(run(inputs, band), oracle(inputs, band), 2e-6)


@pytest.mark.parametrize(
    "h, g, k, v", [(2, 2, 60, 60), (1, 1, 100, 100), (6, 2, 24, 8), (2, 1, 5, 33), (1, 1, 256, 16), (1, 1, 1, 1)]
)
def test_any_head_dims_and_groups_of_queries(h: int, g: int, k: int, v: int) -> None:
    inputs = problem((1, 35, 37, h, g, k, v))
    inputs[0] *= k**-0.5  # scores of the size that a model has
    assert_close(run(inputs, Band(-30, 3)), oracle(inputs, Band(-30, 3)), 2e-6)


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2e-3), (torch.bfloat16, 2e-4)])
def test_sixteen_bits_give_fp32_parts(dtype: torch.dtype, bound: float) -> None:
    """Nothing is rounded to 16 bits on the way out; fp16 is wider in the weights, but has no small numbers."""
    inputs = problem((1, 33, 50, 4, 2, 16, 16), dtype)
    got = run(inputs, Band(-20, 10))
    assert all(x.dtype == torch.float32 for x in got)
    assert_close(got, oracle(inputs, Band(-20, 10)), bound)


def test_rows_that_see_nothing_are_zero_and_have_no_gradient() -> None:
    inputs = problem((1, 70, 40, 2, 1, 16, 16))
    inputs[4][:, 45:] = math.nan  # whatever is said of the log-sum-exp of nothing
    for band, empty in (
        (Band(5, None), slice(35, 70)),
        (Band(None, -50), slice(0, 50)),
        (Band(100, None), slice(0, 70)),
    ):
        out, lse, dq, dk, dv = run([*inputs[:4], inputs[4].nan_to_num()], band)
        assert not out[:, empty].any() and not dq[:, empty].any()
        assert bool((lse[:, empty] == -math.inf).all())
        assert all(bool(x.isfinite().all()) for x in (dq, dk, dv))
    got = run(inputs, Band(5, None))
    assert_close(got, oracle([*inputs[:4], inputs[4].nan_to_num()], Band(5, None)), 2e-6)


def documents(lengths: list[int]) -> Tensor:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(DEVICE)
    return (ids[:, None] == ids) & seen_by(Band(None, 0), len(ids), len(ids))


def test_boolean_masks() -> None:
    inputs = problem((1, 37, 37, 2, 1, 16, 8))
    scattered = (torch.rand(37, 37, generator=torch.Generator().manual_seed(1)) < 0.3).to(DEVICE)
    scattered[[0, 17, 36]] = False
    for mask in (documents([3, 1, 20, 13]), documents([3, 1, 20, 13]).T, scattered, torch.zeros_like(scattered)):
        assert_close(run(inputs, mask), oracle(inputs, mask), 2e-6)


@pytest.mark.parametrize("window", [None, 9])
def test_documents_are_bands_of_their_own(window: int | None) -> None:
    """The blocks of packed documents, put together, are attention within each of them."""
    lengths = [3, 1, 30, 17]
    q, k, v, d_out, _ = problem((1, 51, 51, 2, 1, 16, 16))
    wanted = [x.double().requires_grad_() for x in (q, k, v)]
    expected = softmax_attention(*wanted, lengths, window=window, scale=SCALE)
    right = [expected.detach(), *torch.autograd.grad(expected, wanted, d_out.double())]
    found, first = [], 0
    for length in lengths:
        mine = slice(first, first + length)
        band = Band(None if window is None else 1 - window, 0)
        rows = [x[:, mine] for x in (q, k, v)]
        out, lse = attend(*rows, band, SCALE, impl="triton")
        found.append([out, *attend_backward(d_out[:, mine], *rows, out, lse, band, SCALE, impl="triton")])
        first += length
    for x, y in zip((torch.cat(parts, 1) for parts in zip(*found)), right):
        assert (x - y).norm() <= 2e-6 * y.norm()


def test_scores_far_apart_neither_overflow_nor_lose_what_counts() -> None:
    inputs = problem((1, 40, 50, 1, 1, 16, 16))
    for size in (1e2, -1e4):
        large = [inputs[0] * size, *inputs[1:]]
        assert_close(run(large, Band(None, 10))[:2], oracle(large, Band(None, 10))[:2], 1e-4)
        assert all(bool(x.isfinite().all()) for x in run(large, Band(None, 10))[2:])


def test_tiles_that_nobody_sees_are_not_read() -> None:
    """What no query of a tile sees may be anything, and so may the queries that see no key of a tile."""
    band, late = Band(None, 0), LARGEST_TILE
    inputs = problem((1, late + 64, late + 64, 1, 1, 16, 16))
    clean = run(inputs, band)
    future = [x.clone() for x in inputs]
    future[1][:, late:] = future[2][:, late:] = math.nan
    out, lse = attend(*future[:3], band, SCALE, impl="triton")
    assert torch.equal(out[:, :late], clean[0][:, :late]) and torch.equal(lse[:, :late], clean[1][:, :late])
    past = [x.clone() for x in inputs]
    past[0][:, :late] = past[3][:, :late] = math.nan
    grads = attend_backward(past[3], *past[:3], *clean[:2], band, SCALE, d_lse=inputs[4], impl="triton")
    for x, y in zip(grads, clean[2:]):
        assert torch.equal(x[:, late:], y[:, late:])


def test_strided_inputs_and_the_same_bits_twice() -> None:
    together = tensors(torch.float32, (1, 40, 6, 48))[0]
    q, k, v = together[..., :16], together[:, :, 4:, 16:32], together[:, :, 4:, 32:]
    d_out, d_lse = tensors(torch.float32, (1, 1, 6, 16), (1, 6, 40), seed=1)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    dims_first = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    for views in ((q, k, v), heads_first, dims_first):
        inputs = [*views, d_out.expand(1, 40, 6, 16), d_lse.transpose(1, 2)]
        got = run(inputs, Band(-7, 0))
        assert_close(got, oracle(inputs, Band(-7, 0)), 2e-6)
    assert all(torch.equal(x, y) for x, y in zip(got, run(inputs, Band(-7, 0))))


# ---------------------------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize("band", [Band(), Band(None, 4), Band(-30, -2)], ids=str)
def test_merged_blocks_are_the_whole(band: Band) -> None:
    inputs = problem((1, 33, 60, 2, 1, 16, 8))
    assert_close(run_split(inputs, band, 5), oracle(inputs, band), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_is_that_of_one_rounding_whatever_the_number_of_blocks(dtype: torch.dtype) -> None:
    """In 16 bits: at most 1.1 times the error of the reference, whose parts are exact."""
    inputs = problem((2, 48, 128, 1, 1, 16, 16), dtype)
    band = Band(None, 100)
    expected = oracle(inputs, band)

    def final(num: int, impl: str) -> list[float]:
        out, lse, *grads = run_split(inputs, band, num, impl)
        return errors([out, lse, *(grad.to(dtype) for grad in grads)], expected)

    own = final(1, "reference")
    for num in (1, 4):
        found = final(num, "triton")
        assert all(x <= 1.1 * y + 1e-6 for x, y in zip(found, own)), (num, dict(zip(NAMES, zip(found, own))))


# -------------------------------------------------------------------------------------- gradient of the log-sum-exp


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_every_path_takes_the_gradient_of_the_log_sum_exp(impl: str, dtype: torch.dtype, bound: float) -> None:
    inputs = problem((2, 37, 41, 4, 2, 12, 16), dtype)
    inputs[4] *= 30  # enough to matter, and to show if 16 bits of it were lost
    scattered = (torch.rand(37, 41, generator=torch.Generator().manual_seed(1)) < 0.3).to(DEVICE)
    scattered[[0, 17, 36]] = False
    for mask in (Band(), Band(None, 3), Band(-6, 0), Band(None, -20), scattered):
        assert_close(run(inputs, mask, impl), oracle(inputs, mask), bound)


def test_fused_kernels_take_the_gradient_of_the_log_sum_exp_themselves() -> None:
    """To the bits that fp32 has, though the kernel is handed bf16."""
    q, _, v, d_out, d_lse = problem((1, 24, 24, 2, 1, 16, 16), torch.bfloat16)
    assert fused.folds(q, v) and not fused.folds(q.half(), v.half())
    d_lse *= 1000
    _, folded, columns = fused._fold(d_out, v, d_out, d_lse)
    assert not folded[..., 16:].any()
    assert (columns[..., 16:].double().sum(-1) + d_lse.double()).norm() <= 1e-7 * d_lse.norm()


@pytest.mark.parametrize("impl", ["reference", "auto", "triton"])
def test_blocks_weighed_by_their_log_sum_exp_in_plain_torch(impl: str) -> None:
    """Two blocks and a sink: autograd through their merge gives the gradients of the whole."""
    inputs = problem((1, 20, 40, 2, 1, 16, 16))
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    exact = [x.double().requires_grad_() for x in inputs[:3]]
    sinks = [torch.full((2,), 0.7, device=DEVICE, dtype=x.dtype, requires_grad=True) for x in (inputs[0], exact[0])]

    def blocks(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        parts = [
            block_attention(q, k[:, run], v[:, run], Band(), SCALE, impl=impl) for run in (slice(25), slice(25, 40))
        ]
        outs, sums = zip(*parts)
        weights = torch.stack([*sums, sink.expand_as(sums[0])]).softmax(0)
        return weights[0, ..., None] * outs[0] + weights[1, ..., None] * outs[1]

    def whole(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        out, lse = masked_attention(q, k, v, seen_by(Band(), 20, 40), SCALE)
        return out * (lse - sink).sigmoid()[..., None]

    got, expected = blocks(*leaves, sinks[0]), whole(*exact, sinks[1])
    assert (got - expected).norm() <= 2e-6 * expected.norm()
    grads = torch.autograd.grad(got, [*leaves, sinks[0]], inputs[3])
    right = torch.autograd.grad(expected, [*exact, sinks[1]], inputs[3].double())
    for x, y in zip(grads, right):
        assert x.dtype == torch.float32
        assert (x - y).norm() <= 5e-6 * y.norm()


def test_block_attention_of_one_result_only() -> None:
    """Either result may go unused, and half precision gets half precision gradients."""
    inputs = problem((1, 20, 20, 2, 1, 16, 16), torch.bfloat16)
    for index, upstream in ((0, inputs[3].float()), (1, inputs[4])):
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        exact = [x.double().requires_grad_() for x in inputs[:3]]
        result = block_attention(*leaves, Band(None, 0), SCALE, impl="triton")[index]
        expected = masked_attention(*exact, seen_by(Band(None, 0), 20, 20), SCALE)[index]
        grads = torch.autograd.grad(result, leaves, upstream)
        right = torch.autograd.grad(expected, exact, upstream.double(), allow_unused=True, materialize_grads=True)
        for x, y in zip(grads, right):
            assert x.dtype == torch.bfloat16
            assert (x - y).norm() <= 4e-3 * y.norm()


# --------------------------------------------------------------------------------------------------------------- choice


def test_what_the_kernels_cannot_do_is_refused() -> None:
    for inputs, said in (
        (problem((1, 4, 4, 1, 1, 16, 16), torch.float64), "float64"),
        (problem((1, 4, 4, 1, 1, 16, LARGEST_DIM + 1)), "dims up to 256"),
    ):
        with pytest.raises(ValueError, match=said):
            run(inputs, Band(), "triton")
        assert_close(run(inputs, Band(), "auto"), oracle(inputs, Band()), 2e-6)
    with pytest.raises(ValueError, match="impl must be one of auto, reference, triton"):
        run(inputs, Band(), "fused")
    q, k, v, d_out, d_lse = problem((1, 4, 4, 1, 1, 16, 16))
    out, lse = attend(q, k, v, Band(), SCALE)
    with pytest.raises(ValueError, match=r"d_lse must be \[1, 4, 1\]"):
        attend_backward(d_out, q, k, v, out, lse, Band(), SCALE, d_lse=d_lse[0])


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreted", lambda kernel: False)
    with pytest.raises(ValueError, match="Triton kernels need a CUDA device or Triton's interpreter"):
        run([x.cpu() for x in problem((1, 4, 4, 1, 1, 16, 16))], Band(), "triton")


@pytest.mark.parametrize(
    "mask, whole, dtype, d_lse, path",
    [
        (Band(None, 0), True, torch.bfloat16, False, "fused"),
        (Band(), True, torch.float16, False, "fused"),
        (Band(), True, torch.float16, True, "triton"),
        (Band(None, 0), False, torch.bfloat16, False, "triton"),
        (Band(None, 4), True, torch.bfloat16, False, "triton"),
        (Band(-5, 0), True, torch.bfloat16, False, "triton"),
        (Band(None, 0), True, torch.float32, False, "triton"),
        (Band(None, 0), True, torch.float64, False, "reference"),
    ],
)
def test_on_cuda_fused_kernels_serve_a_whole_softmax_in_one_call(
    mask: Band, whole: bool, dtype: torch.dtype, d_lse: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(launch, "architecture", lambda x: "sm_80")
    with FakeTensorMode():
        q = torch.empty(1, 9, 2, 16, dtype=dtype, device="cuda")
        assert softmax_block._path(q, q, q, mask, "auto", whole, d_lse) == path
        monkeypatch.setattr(choice, "use_kernel", lambda impl, x, check: False)  # no Triton, or one in doubt
        without = "reference" if path == "reference" or dtype == torch.float32 or d_lse else "fused"
        assert softmax_block._path(q, q, q, mask, "auto", whole, d_lse) == without


def test_every_architecture_has_tiles_for_every_dim() -> None:
    for architecture in ("cpu", "sm_80", "sm_90", "gfx942", "sm_121"):
        for dtype in DTYPES:
            for dim in range(1, LARGEST_DIM + 1):
                for tile in tiles(architecture, dtype.itemsize, dim):
                    for tokens in (tile.own, tile.visited):
                        assert tokens & (tokens - 1) == 0 and 16 <= tokens <= LARGEST_TILE


def test_the_self_check_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from seqpar.ops.softmax_block import kernel

    monkeypatch.setattr(selfcheck, "BANDS", (Band(-20, 5),))
    monkeypatch.setattr(selfcheck, "DIMS", (16,))
    monkeypatch.setattr(selfcheck, "TOKENS", 40)
    assert selfcheck.check(DEVICE, torch.float32) <= 2e-6
    right = kernel.attend
    for factor in (1.02, math.nan):
        monkeypatch.setattr(kernel, "attend", lambda *args, factor=factor: (right(*args)[0] * factor, right(*args)[1]))
        assert not selfcheck.check(DEVICE, torch.float32) <= 1e-2
