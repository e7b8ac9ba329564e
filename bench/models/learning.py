"""What every layer of the catalog learns, cut and uncut: `python -m bench.models.learning --out FILE`.

Text: a decoder of 12 layers of a row reads bytes of Python's standard library for 200 steps, on two ranks and on one;
the last losses are compared with each other and with the entropy of single bytes. Norms inside of mixers get a larger
eps (`--eps`): what they divide by is nearly zero now and then, above all at the first tokens of a document, which
magnifies rounding by orders of magnitude, on one rank as on many. Where two ranks and one still differ in fp32, so does
one rank from itself after a change of all weights by their rounding, and fp64 tells that it is nothing else.

Recall: a short convolution and one layer of a row learn to look up the values of keys that they saw (8 pairs;
multi-query associative recall, Arora et al. 2023, arXiv 2312.04927), for the rows whose papers claim it.
"""

import argparse
import copy
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.models import rows
from bench.models.learning_report import CLOSE, plot, show
from seqpar import sequence_parallel
from seqpar.collectives import Group, run_ranks
from seqpar.commands.arguments import count
from seqpar.layers.catalog import find
from seqpar.layers.entry import Sizes
from seqpar.models import Decoder, DecoderConfig

LAYERS, DIM, HEADS, TOKENS, STEPS = 12, 64, 2, 512, 200
LAST = 20  # steps whose mean loss is shown: each reads other text
EPS = 0.1
SMALL = {"beta", "decay", "dt", "router", "selection"}
PAIRS, QUERIES, KEYS, VALUES, BATCH = 8, 8, 16, 16, 64


@dataclass(frozen=True)
class Learnt:
    """``losses``: of one rank, every tenth step. ``loss``: the mean of its last 20. ``difference``: of the last losses
    of two ranks and one, relative. Where it is not close: ``in_fp64``, the same in fp64, and ``of_rounding``, that of
    one rank in fp32 and again with weights changed by up to half a unit in the last place."""

    name: str
    losses: tuple[float, ...]
    loss: float
    difference: float
    in_fp64: float | None
    of_rounding: float | None
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: loss {self.loss:.3f}, difference {self.difference:.1e}, {self.seconds:.0f} s"


@dataclass(frozen=True)
class Recalled:
    """``accuracy`` on fresh sequences after ``steps`` steps, of which it needed as many as it took."""

    name: str
    accuracy: float
    steps: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: recall {self.accuracy:.3f} in {self.steps} steps, {self.seconds:.0f} s"


def library_bytes(limit: int = 4_000_000) -> Tensor:
    """The start of the standard library's text, ``[bytes]`` int64."""
    text = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(bytearray(text[:limit]), dtype=torch.uint8).long()


def unigram_entropy(text: Tensor) -> float:
    """Of single bytes, in nats: the loss of a model that knows how often each one occurs."""
    shares = text.bincount(minlength=256).double() / text.numel()
    return float(-(shares[shares > 0] * shares[shares > 0].log()).sum())


def train_text(group: Group, initial: Decoder, text: Tensor, steps: int) -> list[float]:
    """The loss of every step, the same on every rank."""
    plain = copy.deepcopy(initial)
    model = sequence_parallel(plain, group=group)
    optimizer = torch.optim.AdamW(plain.parameters(), 4e-4, betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    places = torch.randint(text.numel() - TOKENS, (steps,), generator=torch.Generator().manual_seed(1)).tolist()
    losses = []
    for place in places:
        tokens = text[place : place + TOKENS][None]
        loss = model(tokens, labels=tokens, lengths=[TOKENS - 100, 100]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        losses.append(loss.item())
    return losses


def decoder(name: str, eps: float) -> Decoder:
    """Twelve layers of a row, with ``eps`` in the norms inside of its mixers."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(name, LAYERS, dim=DIM, heads=HEADS, mlp_ratio=2.0))
    for block in model.blocks:
        for module in block.mixer.modules():
            if hasattr(module, "eps"):
                module.eps = eps
    return model


def rounded(initial: Decoder) -> Decoder:
    """Each weight times 1 plus or minus up to half a unit in its last place."""
    model, generator = copy.deepcopy(initial), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + torch.finfo(weight.dtype).eps * (torch.rand(weight.shape, generator=generator) - 0.5))
    return model


def learn_text(name: str, text: Tensor, steps: int, eps: float) -> Learnt:
    """Two ranks against one."""

    def losses(ranks: int, model: Decoder) -> list[float]:
        return run_ranks(ranks, train_text, model, text, steps, timeout_seconds=300)[0]

    def apart(ours: list[float], theirs: list[float]) -> float:
        return abs(ours[-1] - theirs[-1]) / theirs[-1]

    began, initial = time.perf_counter(), decoder(name, eps)
    one = losses(1, initial)
    difference, in_fp64, of_rounding = apart(losses(2, initial), one), None, None
    if difference > CLOSE:
        of_rounding = apart(losses(1, rounded(initial)), one)
        initial.double()
        in_fp64 = apart(losses(2, initial), losses(1, initial))
    mean = sum(one[-LAST:]) / len(one[-LAST:])
    return Learnt(name, tuple(one[::10]), mean, difference, in_fp64, of_rounding, time.perf_counter() - began)


def pairs_and_queries(generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """Sequences ``k1 v1 ... k8 v8 q1 a1 ...``, and labels at the answers: ``[batch, tokens]`` each."""
    order = torch.rand(batch, KEYS, generator=generator).argsort(1)
    keys, values = order[:, :PAIRS], KEYS + torch.randint(VALUES, (batch, PAIRS), generator=generator)
    asked = torch.rand(batch, PAIRS, generator=generator).argsort(1)[:, :QUERIES]
    pairs = torch.stack([keys, values], -1).flatten(1)
    answers = torch.stack([keys.gather(1, asked), values.gather(1, asked)], -1).flatten(1)
    labels = torch.cat([torch.full_like(pairs, -100), answers], 1)
    labels[:, 2 * PAIRS :: 2] = -100
    return torch.cat([pairs, answers], 1), labels


def recall(group: Group, initial: Decoder, most: int) -> tuple[float, int]:
    """Accuracy at the end, and how many steps it took; sequences are packed documents."""
    plain = copy.deepcopy(initial)
    model = sequence_parallel(plain, group=group)
    optimizer = torch.optim.AdamW(plain.parameters(), 3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    generator, length, accuracy = torch.Generator().manual_seed(2), 2 * (PAIRS + QUERIES), 0.0
    for step in range(1, most + 1):
        tokens, labels = (x.reshape(1, -1) for x in pairs_and_queries(generator, BATCH))
        out = model(tokens, labels=labels, lengths=[length] * BATCH)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % 25 == 0:
            accuracy = accuracy_of(out.shard.gather(out.logits.detach()), labels)
            if accuracy >= 0.99:
                return accuracy, step
    return accuracy, most


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """On sequences that no step has seen: they are drawn anew for each."""
    asked = labels[:, 1:] >= 0
    return float((logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].double().mean())


def reader(name: str) -> Decoder:
    """A short convolution and a layer of a row. One that sees all of a prefix has the pairs in it, and no answer."""
    causal = find(name).causal
    pattern = f"short_convolution {name if causal else 'short_convolution'}"
    model = Decoder(DecoderConfig(pattern, vocabulary=KEYS + VALUES, dim=64, heads=2))
    if not causal:
        mixer = find(name).make(Sizes(64, 2, 1, 2))
        mixer.prefix = 2 * PAIRS
        model.blocks[1].mixer = mixer
    return model


def loud(model: Decoder) -> None:
    """Embeddings of 1 and matrices that keep that size: with small ones the plateau before the first lookup is many
    times as long. What sets steps, decays and routes stays as small as it was."""
    nn.init.normal_(model.embedding.weight)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not SMALL & set(name.split(".")):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


def learn_recall(name: str, most: int = 3000) -> Recalled:
    began = time.perf_counter()
    torch.manual_seed(0)
    initial = reader(name)
    loud(initial)
    accuracy, steps = run_ranks(2, recall, initial, most, timeout_seconds=300)[0]
    return Recalled(name, accuracy, steps, time.perf_counter() - began)


def arguments_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("--steps", type=count, default=STEPS)
    parser.add_argument("--eps", type=float, default=EPS, help="of norms inside of mixers, for text (default: 0.1)")
    parser.add_argument("--part", choices=("all", "text", "recall"), default="all")
    return parser.parse_args()


def main() -> int:
    parser = rows.parser_of("bench.models.learning", __doc__)
    arguments = arguments_of(parser)
    learners = rows.rows_of(parser, arguments)
    text = library_bytes()
    new = {"unigram_entropy": unigram_entropy(text), "text": [], "recall": []}
    report = rows.report_of("bench.models.learning", arguments, new)
    jobs: list[tuple[str, Callable[[], Learnt | Recalled], str]] = []
    if arguments.part != "recall":
        texts = [row.name for row in learners if row.causal]
        jobs += [("text", partial(learn_text, name, text, arguments.steps, arguments.eps), name) for name in texts]
    if arguments.part != "text":
        jobs += [("recall", partial(learn_recall, r.name), r.name) for r in learners if r.recalls]
    for part, learn, name in jobs:
        if any(each["name"] == name for each in report[part]):
            continue
        learnt = learn()
        report[part].append(asdict(learnt))
        print(learnt, flush=True)
        rows.write(report, arguments.out)
    show(report)
    if arguments.plot and report["text"]:
        plot(report, arguments.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
