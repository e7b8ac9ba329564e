"""Tiers give back the bytes they got or raise; they take room exactly, give it back, and use it again."""

import errno
import gc
import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.offload.runtime.file_tier import PAGE, FileTier
from seqpar.offload.runtime.host_memory import Slab
from seqpar.offload.runtime.streams import InPlace, StreamLane, ThreadLane, lanes_for
from seqpar.offload.runtime.tiers import HostTier, Region, Space
from tests.offload.runtime.models import SWAP, Stack, data, same, step, swapping


def some_bytes(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Calls:
    """The system calls of a file, some of which go wrong."""

    def __init__(self, **wrong):
        self._wrong = wrong

    def __getattr__(self, name):
        return self._wrong.get(name) or getattr(os, name)


@pytest.fixture(params=["host", "host of a plan", "file", "file of a plan"])
def tier(request, tmp_path):
    made = {
        "host": lambda: HostTier(),
        "host of a plan": lambda: HostTier(1 << 20),
        "file": lambda: FileTier(tmp_path, checksum=True),
        "file of a plan": lambda: FileTier(tmp_path, 1 << 20),
    }[request.param]()
    yield made
    made.close()


# --- what was written comes back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1000, 3), (3, 64, 5), (2, 1, 4097)])
def test_bytes_come_back(tier, shape):
    stored = []
    for seed in range(5):
        rows = some_bytes(shape[0], shape[1] + 7, shape[2], seed=seed)[:, : shape[1]]
        region = tier.reserve(rows.numel())
        tier.write(region, rows)
        stored.append((region, rows))
    for region, rows in reversed(stored):
        target = torch.zeros(shape[0], shape[1] + 3, shape[2], dtype=torch.uint8)
        tier.read(region, target[:, 3:])
        assert torch.equal(target[:, 3:], rows)
        assert not target[:, :3].any(), "bytes beside the target stay"
        tier.release(region)
    assert tier.used == 0


def test_room_is_used_again(tier):
    sizes = [5000, 70, 12345]
    for _ in range(3):
        regions = [tier.reserve(size) for size in sizes]
        for region in regions:
            tier.release(region)
    size = tier.size
    regions = [tier.reserve(size) for size in sizes]
    assert tier.size == size
    assert tier.used >= sum(sizes)
    del regions


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 10)), min_size=1, max_size=40), st.sampled_from([1, 64]))
def test_ranges_never_overlap_and_free_neighbours_join(requests, alignment):
    space, taken = Space(0, alignment), []
    for bytes_, released in requests:
        offset = space.take(bytes_)
        if offset is None:
            space.grow(space.missing(bytes_))
            offset = space.take(bytes_)
        assert offset is not None and offset % alignment == 0
        taken.append((offset, bytes_))
        ends = sorted((start, start + size) for start, size in taken)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
        assert ends[-1][1] <= space.size
        for _ in range(min(released, len(taken) - 1)):
            space.give(*taken.pop(0))
    for offset, bytes_ in taken:
        space.give(offset, bytes_)
    assert space.used == 0
    assert space.take(space.size) == 0, "all free ranges became one"


# --- host ------------------------------------------------------------------------------------------------------------


def test_the_host_pool_has_exactly_the_size_of_what_it_holds():
    tier = HostTier()
    tier.reserve(5 * 64 * 1000)  # PyTorch's pinned allocator would take 524,288
    assert tier.size == 320_000
    assert HostTier(320_001).size == 320_001


def test_a_planned_host_pool_is_not_exceeded():
    tier = HostTier(1000)
    tier.reserve(900)
    with pytest.raises(MemoryError, match=r"the host tier is full: 200 bytes asked for, 1000 planned in all"):
        tier.reserve(200)


def test_a_closed_host_pool_says_so():
    tier = HostTier()
    region = tier.reserve(10)
    tier.close()
    tier.release(region)
    with pytest.raises(ValueError, match="the host tier is closed"):
        tier.reserve(10)


class Cudart:
    """Registers and unregisters host memory, or fails."""

    def __init__(self, code=0):
        self.code, self.calls = code, []

    def cudaHostRegister(self, address, bytes_, flags):  # noqa: N802
        self.calls.append(("register", address, bytes_, flags))
        return self.code

    def cudaHostUnregister(self, address):  # noqa: N802
        self.calls.append(("unregister", address))
        return 0


def test_pinned_memory_is_registered_once_and_unregistered_once():
    for close in (True, False):
        cudart = Cudart()
        slab = Slab(12345, pinned=True, cudart=cudart)
        address = slab.data.data_ptr()
        assert cudart.calls == [("register", address, 12345, 0)]
        if close:
            slab.close()
            slab.close()
        del slab
        gc.collect()
        assert cudart.calls[1:] == [("unregister", address)]


def test_memory_that_cannot_be_registered_is_refused():
    with pytest.raises(MemoryError, match="cudaHostRegister of 4096 bytes failed with CUDA error 2"):
        Slab(4096, pinned=True, cudart=Cudart(2))
    with pytest.raises(MemoryError, match="the host does not have them"):
        Slab(1 << 60, pinned=False)


# --- file ------------------------------------------------------------------------------------------------------------


def test_the_file_is_gone_with_the_tier(tmp_path):
    tier = FileTier(tmp_path, 1 << 20)
    assert tier.size == 1 << 20
    tier.close()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(ValueError, match=r"needs a folder that exists, got '.*nowhere'"):
        FileTier(tmp_path / "nowhere")


def full(fd, offset, bytes_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_an_error_in_forward_and_nothing_leaks(tmp_path):
    model = Stack()
    expected = step(model)
    swap = swapping(model, tier=FileTier(tmp_path, calls=Calls(posix_fallocate=full)))
    with pytest.raises(OSError, match=r"cannot grow from 0 by \d+ bytes: No space left on device; free some room") as e:
        step(model, swap)
    assert e.value.errno == errno.ENOSPC
    assert swap.machinery.tier.used == 0
    assert same(step(model), expected), "no hook is left behind"


def test_a_real_full_disk_is_an_error():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    tier = FileTier(
        "/tmp", calls=Calls(pwrite=lambda fd, row, at: os.pwrite(os.open("/dev/full", os.O_WRONLY), row, at))
    )
    region = tier.reserve(10)
    with pytest.raises(OSError, match="No space left on device"):
        tier.write(region, some_bytes(1, 10))


def test_calls_that_do_less_than_asked_are_continued(tmp_path):
    calls = Calls(
        pwrite=lambda fd, row, at: os.pwrite(fd, row[:7], at),
        preadv=lambda fd, rows, at: os.preadv(fd, [rows[0][:5]], at),
    )
    tier = FileTier(tmp_path, checksum=True, calls=calls)
    rows, target = some_bytes(3, 50), torch.zeros(3, 50, dtype=torch.uint8)
    region = tier.reserve(150)
    tier.write(region, rows)
    tier.read(region, target)
    assert torch.equal(target, rows)


WRONG = {
    "a write that fails": ({"pwrite": lambda fd, row, at: full(0, 0, 0)}, "No space left"),
    "a write that does nothing": ({"pwrite": lambda fd, row, at: 0}, "wrote 0 of .* bytes at offset"),
    "a read that fails": ({"preadv": lambda fd, rows, at: full(0, 0, 0)}, "No space left"),
    "a read that ends": ({"preadv": lambda fd, rows, at: 0}, "read 0 of .* bytes at offset"),
    "other bytes": ({"preadv": lambda fd, rows, at: len(rows[0])}, "gave back other bytes than it got"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("threads", [True, False])
def test_a_copy_that_fails_never_gives_wrong_data(tmp_path, wrong, threads):
    calls, words = WRONG[wrong]
    model = Stack()
    expected = step(model)
    tier = FileTier(tmp_path, checksum=True, calls=Calls(**calls))
    swap = swapping(model, tier=tier, **({"lanes": None} if threads else {}))
    with pytest.raises(OSError, match=words):
        step(model, swap)
    tier._calls = os
    gc.collect()
    assert same(step(model, swap), expected), "the next step is right"


def test_pages_are_dropped(tmp_path):
    dropped = []
    calls = Calls(posix_fadvise=lambda fd, offset, bytes_, advice: dropped.append((offset, bytes_, advice)))
    tier = FileTier(tmp_path, calls=calls)
    first, second = tier.reserve(PAGE), tier.reserve(3 * PAGE)
    tier.write(first, some_bytes(1, PAGE))
    tier.write(second, some_bytes(1, 3 * PAGE))
    assert dropped.count((first.offset, PAGE, os.POSIX_FADV_DONTNEED)) == 2
    tier.read(second, some_bytes(1, 3 * PAGE))
    assert dropped[-1] == (second.offset, 3 * PAGE, os.POSIX_FADV_DONTNEED)


def test_the_file_tier_takes_memory_of_the_cpu_only(tmp_path):
    tier = FileTier(tmp_path)
    with pytest.raises(ValueError, match="holds tensors of the CPU, got one on meta"):
        tier.write(Region(0, 4), torch.empty(4, dtype=torch.uint8, device="meta"))


# --- lanes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", [InPlace, lambda: ThreadLane("test")])
def test_a_lane_keeps_the_order_and_hands_errors_to_who_waits(lane):
    lane, seen = lane(), []
    first = lane.submit(lambda: seen.append(1), [])
    second = lane.submit(lambda: seen.append(2), [], [first], lambda: seen.append(3))
    second.wait()
    lane.settle()
    assert seen == [1, 2, 3]

    def fail():
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        lane.submit(fail, []).wait()
    lane.settle()
    lane.close()


def test_what_waits_for_a_failed_copy_fails_too():
    leaving, returning = lanes_for(torch.device("cpu"))

    def fail():
        raise ArithmeticError

    done = returning.submit(lambda: pytest.fail("it must not run"), [], [leaving.submit(fail, [])])
    with pytest.raises(ArithmeticError):
        done.wait()
    for lane in (leaving, returning):
        lane.close()


def test_a_stream_lets_tensors_go_when_their_event_has_happened():
    class Event(SimpleNamespace):
        def query(self):
            return self.happened

    class Stream:
        def record_event(self):
            events.append(Event(happened=False))
            return events[-1]

        def wait_event(self, event): ...

        def synchronize(self): ...

        def __enter__(self): ...

        def __exit__(self, *error): ...

    events, home = [], Stream()
    lane = StreamLane(SimpleNamespace(Stream=Stream, current_stream=lambda: home, stream=lambda stream: stream))
    finished = []
    lane.submit(lambda: None, [torch.ones(1)], finished=lambda: finished.append(1))
    assert finished == []
    events[1].happened = True
    lane.submit(lambda: None, [torch.ones(1)], finished=lambda: finished.append(2))
    assert finished == [1]
    lane.close()
    assert finished == [1, 2]


def test_close_ends_the_threads(tmp_path):
    import threading

    before = threading.active_count()
    model = Stack()
    swap = swapping(model, SWAP, tier=FileTier(tmp_path), lanes=None)
    step(model, swap)
    assert threading.active_count() > before
    swap.close()
    assert threading.active_count() == before
    with pytest.raises((ValueError, RuntimeError)), swap:
        model(data()[0])
