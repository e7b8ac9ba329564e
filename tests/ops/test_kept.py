"""What is kept is bounded in bytes, and usable whatever mode or thread made it."""

from threading import Thread

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from seqpar import Cut, Shard
from seqpar.collectives import alone
from seqpar.crossing.document_sum import document_index
from seqpar.layers.catalog import CATALOG
from seqpar.layers.entry import Sizes
from seqpar.ops.kept import kept
from seqpar.ops.linear_system.pieces import pieces_of

CPU = torch.device("cpu")


def step(name: str, lengths: list[int], *, training: bool) -> None:
    torch.manual_seed(0)
    layer = CATALOG[name].make(Sizes(16, 2, 1, 4))
    shard = Shard.of(lengths, alone())
    y = layer(torch.randn(1, sum(lengths), 16, requires_grad=training), Cut(shard, alone()))
    if training:
        y.sum().backward()


@pytest.mark.parametrize("name", ["retention", "transnormer", "lmu", "s4", "s4d", "lightnet_bidirectional", "mamba2"])
def test_layers_train_after_inference_on_the_same_shapes(name: str) -> None:
    lengths = [7, 1, 95 + sum(name.encode()) % 50]  # which no other test has made tables of
    with torch.inference_mode():
        step(name, lengths, training=False)
    step(name, lengths, training=True)


@pytest.mark.parametrize(
    "make", [lambda: pieces_of(97, (3,), CPU).rows, lambda: document_index(Cut.whole([5, 92]).shard, CPU)]
)
def test_what_a_fake_mode_made_is_real_outside_and_fake_inside(make) -> None:
    with FakeTensorMode():
        inside = make()
    outside = make()
    assert isinstance(inside, FakeTensor) and not isinstance(outside, FakeTensor)
    assert inside.shape == outside.shape and len(outside.tolist()) >= 97
    with FakeTensorMode():
        assert isinstance(make(), FakeTensor)


def test_the_oldest_gives_way_when_bytes_are_too_many() -> None:
    made = []

    @kept(most_bytes=8 * 100, most=5)
    def numbers(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(count)
        whole = torch.arange(count)
        return whole, whole[1:]  # one storage: counted once

    for count in (40, 50, 40, 60, 40):  # 50 is the oldest when 60 comes
        assert len(numbers(count)[0]) == count
        assert numbers.bytes_ <= 800
    assert made == [40, 50, 60] and numbers.bytes_ == 800
    numbers(50)
    assert made == [40, 50, 60, 50] and numbers.bytes_ == 8 * 90
    numbers(1000)  # larger than all that may be kept: used by the layers of one step, so it stays till the next
    numbers(1000)
    assert made[4:] == [1000] and len(numbers) == 1
    for count in range(10):
        numbers(count)
    assert len(numbers) == 5


def test_tables_of_batches_that_never_come_again_do_not_fill_the_memory() -> None:
    pieces_of.clear()
    for first in range(1, 100):
        pieces_of(1 << 17, (0, first), CPU)
    assert 0 < pieces_of.bytes_ <= pieces_of.most_bytes


def test_dtypes_and_devices_are_told_apart() -> None:
    @kept()
    def ones(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.ones(2, dtype=dtype, device=device)

    assert ones(torch.float32, CPU).dtype == torch.float32
    assert ones(torch.float64, CPU).dtype == torch.float64
    assert ones(torch.float64, torch.device("meta")).is_meta and not ones(torch.float64, CPU).is_meta


def test_many_threads_get_the_same_and_the_count_of_bytes_stays_right() -> None:
    @kept(most_bytes=8 * 1000)
    def numbers(count: int) -> torch.Tensor:
        return torch.arange(count)

    wrong = []

    def work(seed: int) -> None:
        for i in range(300):
            count = (seed * 7 + i * 13) % 200
            if len(numbers(count)) != count:
                wrong.append(count)

    threads = [Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and numbers.bytes_ == sum(size for _, size in numbers._found.values()) <= 8000
