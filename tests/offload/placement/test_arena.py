"""The arena: planned addresses, aligned views, and nothing else is allocated."""

import pytest
import torch

from seqpar.offload.placement.arena import ALIGNMENT_BYTES, Arena, aligned
from seqpar.offload.placement.buffers import Buffer, Placement
from seqpar.offload.placement.place import place
from tests.offload.placement.placements import planted

DTYPES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.complex64]


def planned(buffers):
    buffers = aligned(buffers)
    return place(buffers, seconds=10), buffers


@pytest.fixture(scope="module")
def case():
    placement, buffers = planned(planted(2, 24, capacity=40_000))
    return placement, buffers, Arena(placement, buffers)


def test_sizes_are_rounded_up_to_the_alignment():
    sizes = [buffer.size for buffer in aligned([Buffer(str(s), s, 0, 1) for s in (0, 1, 512, 513)])]
    assert sizes == [0, 512, 512, 1024]


def test_every_view_lies_at_its_offset_and_is_aligned(case):
    placement, buffers, arena = case
    base = min(arena.bytes_of(b.id).data_ptr() - placement.offsets[b.id] for b in buffers)
    assert base % ALIGNMENT_BYTES == 0
    for buffer in buffers:
        assert arena.bytes_of(buffer.id).data_ptr() == base + placement.offsets[buffer.id]
        assert arena.bytes_of(buffer.id).numel() == buffer.size


def test_there_is_one_allocation_of_about_the_peak(case):
    placement, buffers, arena = case
    storages = {arena.bytes_of(buffer.id).untyped_storage().data_ptr() for buffer in buffers}
    assert len(storages) == 1
    assert placement.peak <= arena.nbytes <= placement.peak + ALIGNMENT_BYTES


def test_what_is_written_between_birth_and_death_is_read_back(case):
    """Plays all events: each buffer is filled at its birth with its own number, and still has it at its death."""
    _, buffers, arena = case
    events = [(b.birth, 1, i) for i, b in enumerate(buffers)] + [(b.death, 0, i) for i, b in enumerate(buffers)]
    for _, born, index in sorted(events):
        memory = arena.bytes_of(buffers[index].id)
        if born:
            memory.fill_(index)
        else:
            assert bool((memory == index).all())
            arena.poison(buffers[index].id)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_have_any_dtype(dtype):
    arena = Arena(*planned([Buffer("a", 700, 0, 2), Buffer("b", 3000, 1, 3)]))
    view = arena.view("b", (2, 3, 5), dtype)
    assert view.shape == (2, 3, 5) and view.dtype == dtype and view.is_contiguous()
    assert view.data_ptr() == arena.bytes_of("b").data_ptr()
    values = torch.arange(30).reshape(2, 3, 5).to(dtype)
    view.copy_(values)
    assert torch.equal(arena.view("b", (2, 3, 5), dtype), values)


def test_operators_write_into_views():
    arena = Arena(*planned([Buffer("x", 4096, 0, 2), Buffer("y", 4096, 0, 3)]))
    left, right = torch.randn(16, 16), torch.randn(16, 16)
    out = torch.matmul(left, right, out=arena.view("y", (16, 16), torch.float32))
    assert torch.equal(arena.view("y", (16, 16), torch.float32), left @ right)
    assert out.data_ptr() == arena.bytes_of("y").data_ptr()


def test_poison_is_nan():
    arena = Arena(*planned([Buffer("x", 4096, 0, 2)]))
    arena.poison("x")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert bool(arena.view("x", (64,), dtype).isnan().all())


def test_buffers_that_never_meet_share_bytes():
    placement, buffers = planned([Buffer("a", 512, 0, 1), Buffer("b", 512, 1, 2)])
    arena = Arena(placement, buffers)
    assert placement.peak == 512
    assert arena.bytes_of("a").data_ptr() == arena.bytes_of("b").data_ptr()


def test_a_scalar_and_an_empty_view():
    arena = Arena(*planned([Buffer("x", 512, 0, 2), Buffer("none", 0, 0, 2)]))
    assert arena.view("x", (), torch.float32).shape == ()
    assert arena.view("x", (0, 7), torch.float32).numel() == 0
    assert arena.bytes_of("none").numel() == 0


def placed(**offsets):
    return Placement(offsets, 2048, 2048, "feasible", "by hand", 0.0)


TWO = [Buffer("a", 1024, 0, 2), Buffer("b", 1024, 1, 3)]


@pytest.mark.parametrize(
    ("placement", "why"),
    [
        (placed(a=0), "no offset for buffer b"),
        (placed(a=0, b=1000), "buffer b is at 1000, no multiple of 512 bytes: plan with aligned"),
        (placed(a=0, b=1536), r"buffer b takes \[1536, 2560\), not inside the peak 2048"),
        (placed(a=-512, b=1024), "buffer a takes"),
        (placed(a=0, b=512), "buffers a and b live at once and share bytes"),
    ],
)
def test_a_placement_that_does_not_fit_its_buffers_is_refused(placement, why):
    with pytest.raises(ValueError, match=why):
        Arena(placement, TWO)


def test_a_view_stays_within_its_buffer():
    arena = Arena(placed(a=0, b=1024), TWO)
    assert arena.view("a", (256,), torch.float32).numel() == 256
    with pytest.raises(ValueError, match=r"buffer a has 1024 bytes; \(257,\) of torch.float32 needs 1028"):
        arena.view("a", (257,), torch.float32)
    with pytest.raises(ValueError, match="the arena has no buffer z; it has a, b"):
        arena.bytes_of("z")
    with pytest.raises(ValueError, match="buffer a has"):
        arena.view("a", (-1, -1), torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device():
    placement, buffers = planned(planted(2, 24, capacity=40_000))
    arena = Arena(placement, buffers, "cuda")
    assert all(arena.bytes_of(b.id).is_cuda and arena.bytes_of(b.id).data_ptr() % 512 == 0 for b in buffers)
