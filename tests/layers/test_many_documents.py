"""Many documents cost what one of as many tokens costs, in every linear layer: counted work, never seconds."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.models.documents import QUADRATIC, drawn, unit_of
from seqpar import Cut, Shard
from seqpar.collectives import alone
from seqpar.layers.catalog import CATALOG
from seqpar.layers.entry import Sizes

TOKENS = 1600
NAMES = [name for name, entry in CATALOG.items() if entry.status == "works" and name not in QUADRATIC]
SEGMENTS = ("rmt", "hmt")  # every document has memory tokens of its own, however short it is
WINDOWS = ("liger",)  # softmax attention goes from document to document
STEPPING = ("slstm", "slstm_bidirectional", "leaky", "memora", "atlas", "atlas_plus")  # every step is work of Python's


class Work(TorchDispatchMode):
    """``calls`` of torch, and the ``bytes_`` that they wrote: results that are views are neither."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes_ = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls += 1
            self.bytes_ += sum(x.numel() * x.element_size() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


def work_of(name: str, lengths: Sequence[int]) -> Work:
    """Of a forward and a backward, when these documents are known."""
    torch.manual_seed(0)
    layer = CATALOG[name].make(Sizes(16, 2, 1, 4))
    shard, work = Shard.of(lengths, alone()), Work()
    x = torch.randn(1, shard.num_tokens, 16, requires_grad=True)
    layer(x, Cut(shard, shard.group)).sum().backward()
    with work:
        layer(x, Cut(shard, shard.group)).sum().backward()
    return work


def listed(names: Iterable[str]) -> list[Any]:
    """Those of which every token is much work of Python's are nightly."""
    slow = ("slstm_bidirectional", "memora", "atlas", "atlas_plus")
    return [pytest.param(name, marks=pytest.mark.nightly) if name in slow else name for name in names]


def tokens_of(name: str) -> int:
    return TOKENS // 8 if name in STEPPING else TOKENS


def lengths_of(name: str, tokens: int, documents: int) -> list[int]:
    return drawn(tokens, documents, unit_of(name), torch.Generator().manual_seed(documents))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", listed(name for name in NAMES if name not in WINDOWS))
def test_calls_do_not_grow_with_documents(name: str) -> None:
    tokens = tokens_of(name)
    few, many = (work_of(name, lengths_of(name, tokens, tokens // each)) for each in (32, 4))
    assert many.calls <= 1.2 * few.calls, (few.calls, many.calls)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", listed(name for name in NAMES if name not in SEGMENTS))
def test_documents_write_about_what_one_writes(name: str) -> None:
    """All of them tiny, and half of the tokens in a long one."""
    tokens = tokens_of(name)
    one, middle = work_of(name, [tokens]), tokens // 16
    tiny = lengths_of(name, tokens // 2, tokens // 8)
    for lengths in (lengths_of(name, tokens, tokens // 4), [*tiny[:middle], tokens // 2, *tiny[middle:]]):
        work = work_of(name, lengths)
        assert work.bytes_ <= 2 * one.bytes_, (one.bytes_, work.bytes_)
