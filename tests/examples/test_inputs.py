"""The models of examples/inputs.py on any number of ranks are those of one device, document by document."""

import ast
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from examples.inputs import EncoderDecoder, MaskedModel, WithImages
from seqpar import Cut, CutSequence, Packed, sequence_parallel
from seqpar.collectives.c10d import ProcessRanks
from tests.examples.test_losses import WORDS, decoder, drawn, numbers

LENGTHS, SOURCES = [7, 1, 9, 4], [3, 5, 6, 2]


def words(count, seed, rows=1):
    return torch.randint(WORDS, (rows, count), generator=torch.Generator().manual_seed(seed))


TOKENS, SOURCE = words(sum(LENGTHS), 0), words(sum(SOURCES), 1)
IMAGES, IS_IMAGE = numbers(1, sum(LENGTHS), 8, seed=3), (torch.arange(sum(LENGTHS)) % 7 < 2)[None]
TARGETS = torch.where(torch.arange(sum(LENGTHS)) % 3 == 0, TOKENS, -100)
PADDED = words(12, 4, rows=3)
MASK = torch.tensor([[0] * 5 + [1] * 7, [1] * 10 + [0] * 2, [0, 0] + [1] * 4 + [0] * 6])
ROWS = [[3, 4], [10], [1, 0, 3]]


def total(logits, wanted, shift=True):
    """Summed cross-entropy of one document, and how many targets it has."""
    logits, wanted = (logits[:, :-1], wanted[:, 1:]) if shift else (logits, wanted)
    return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"), int((wanted >= 0).sum())


def mean(parts):
    losses, counts = zip(*parts)
    return sum(losses) / sum(counts)


def documents(*tensors, lengths=LENGTHS):
    return zip(*(tensor.split(lengths, 1) for tensor in tensors))


def translated(model):
    parts = []
    for (tokens,), (source,) in zip(documents(TOKENS), documents(SOURCE, lengths=SOURCES)):
        beside = CutSequence(source, Cut.whole([source.shape[1]]))
        parts.append(total(model(tokens, Cut.whole([tokens.shape[1]]), beside), tokens))
    return mean(parts)


def filled_in(model):
    pairs = documents(TOKENS, TARGETS)
    return mean([total(model(x, Cut.whole([x.shape[1]])), wanted, shift=False) for x, wanted in pairs])


def described(model):
    return mean(
        [
            total(model(x, Cut.whole([x.shape[1]]), images=images, is_image=here), x)
            for x, images, here in documents(TOKENS, IMAGES, IS_IMAGE)
        ]
    )


def padded(model):
    rows = [row[mask.bool()][None] for row, mask in zip(PADDED, MASK)]
    return mean([total(model(row, Cut.whole([row.shape[1]])), row) for row in rows])


def padded_documents(model):
    rows = [row[mask.bool()][None].split(lengths, 1) for row, mask, lengths in zip(PADDED, MASK, ROWS)]
    return mean([total(model(x, Cut.whole([x.shape[1]])), x) for row in rows for x in row if x.shape[1]])


CASES = {
    "encoder and decoder": (
        lambda: drawn(EncoderDecoder(WORDS, 8, 2)),
        {"tokens": TOKENS, "labels": TOKENS, "lengths": LENGTHS, "source": Packed(SOURCE, SOURCES)},
        translated,
    ),
    "masked tokens": (
        lambda: drawn(MaskedModel(WORDS, 8, 2)),
        {"tokens": TOKENS, "targets": TARGETS, "lengths": LENGTHS},
        filled_in,
    ),
    "images": (
        lambda: drawn(WithImages(WORDS, 8, 2)),
        {"tokens": TOKENS, "labels": TOKENS, "lengths": LENGTHS, "images": IMAGES, "is_image": IS_IMAGE},
        described,
    ),
    "padded rows": (decoder, {"tokens": PADDED, "labels": PADDED, "attention_mask": MASK}, padded),
    "documents of padded rows": (
        decoder,
        {"tokens": PADDED, "labels": PADDED, "attention_mask": MASK, "lengths": ROWS},
        padded_documents,
    ),
}


def assert_same(name, loss, gradients):
    make, _, oracle = CASES[name]
    model = make()
    expected = oracle(model)
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-10 * abs(expected.item())
    norm = sum(p.grad.norm() ** 2 for p in model.parameters()) ** 0.5
    for key, parameter in model.named_parameters():
        assert (gradients[key] - parameter.grad).norm() <= 1e-10 * norm, key


@pytest.mark.spmd(1, 2, 4)
@pytest.mark.parametrize("name", CASES)
def test_any_ranks_give_the_numbers_of_one_device(group, name):
    make, call, _ = CASES[name]
    model = sequence_parallel(make(), group=group, layout="zigzag")
    loss = model(**call).loss
    loss.backward()
    assert_same(name, loss, {key: p.grad for key, p in model.module.named_parameters()})


@pytest.mark.spmd(4)
@pytest.mark.parametrize("around", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", CASES)
def test_under_ddp_and_fsdp2_too(group, name, around):
    if not isinstance(group, ProcessRanks) or dist.get_world_size() != group.size:
        pytest.skip("needs a world of as many processes: pytest --world processes")
    make, call, _ = CASES[name]
    inner = make()
    if around == "fsdp2":
        fully_shard(inner, mesh=init_device_mesh("cpu", (group.size,)))
    model = sequence_parallel(inner, group=group, sync_gradients=False)
    outer = DistributedDataParallel(model) if around == "ddp" else model
    loss = outer(**call).loss
    loss.backward()
    found = {key: p.grad for key, p in inner.named_parameters()}
    assert_same(name, loss, {key: getattr(g, "full_tensor", lambda g=g: g)() for key, g in found.items()})


@pytest.mark.parametrize("name", ["inputs.py", "losses.py"])
def test_every_example_is_short(name):
    file = Path(__file__).parents[2] / "examples" / name
    parts = [each for each in ast.parse(file.read_text()).body if isinstance(each, ast.ClassDef | ast.FunctionDef)]
    sizes = {each.name: each.end_lineno - each.lineno + 1 for each in parts}
    assert len(sizes) >= 4 and max(sizes.values()) <= 40, sizes
