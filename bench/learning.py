"""What every layer of the catalog learns, cut and uncut: `python -m bench.learning --out bench/results/learning.json`.

Text: a decoder of 12 layers of a row reads bytes of Python's standard library for 200 steps, on two ranks and on one;
the last losses are compared with each other and with the entropy of single bytes. Recall: a short convolution and one
layer of a row learn to look up the values of keys that they saw (8 pairs; multi-query associative recall, Arora et al.
2023, arXiv 2312.04927), for the rows whose papers claim it.
"""

import argparse
import copy
import json
import platform
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from collectives import Group, run_ranks
from seqpar import sequence_parallel
from seqpar.layers.catalog import CATALOG, find
from seqpar.models import Decoder, DecoderConfig

LAYERS, DIM, HEADS, TOKENS, STEPS = 12, 32, 2, 256, 200
CLOSE = 1e-4  # relative; where fp32 is further off, fp64 tells rounding from a fault
PAIRS, QUERIES, KEYS, VALUES, BATCH = 8, 8, 16, 16, 64


@dataclass(frozen=True)
class Learnt:
    """``losses``: of one rank, every tenth step and the last. ``difference``: of the last losses of two ranks and one,
    relative; ``in_fp64``: the same in fp64 after a fifth of the steps, where fp32 is not close."""

    name: str
    losses: tuple[float, ...]
    difference: float
    in_fp64: float | None
    seconds: float


@dataclass(frozen=True)
class Recalled:
    """``accuracy`` on fresh sequences after ``steps`` steps, of which it needed as many as it took."""

    name: str
    accuracy: float
    steps: int
    seconds: float


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
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1)
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


def learn_text(name: str, text: Tensor, steps: int = STEPS) -> Learnt:
    """Two ranks against one."""
    began = time.perf_counter()
    torch.manual_seed(0)
    initial = Decoder(DecoderConfig(name, LAYERS, dim=DIM, heads=HEADS, mlp_ratio=2.0))
    one, two = (run_ranks(ranks, train_text, initial, text, steps, timeout_seconds=300)[0] for ranks in (1, 2))
    difference, in_fp64 = abs(two[-1] - one[-1]) / one[-1], None
    if difference > CLOSE:
        few = steps // 5
        exact = [run_ranks(ranks, train_text, initial.double(), text, few)[0][-1] for ranks in (1, 2)]
        in_fp64 = abs(exact[1] - exact[0]) / exact[0]
    return Learnt(name, (*one[:-1:10], one[-1]), difference, in_fp64, time.perf_counter() - began)


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
            accuracy = _accuracy(out.shard.gather(out.logits.detach()), labels)
            if accuracy >= 0.99:
                return accuracy, step
    return accuracy, most


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    """On sequences that no step has seen: they are drawn anew for each."""
    asked = labels[:, 1:] >= 0
    return float((logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].double().mean())


def learn_recall(name: str, most: int = 1500) -> Recalled:
    began = time.perf_counter()
    torch.manual_seed(0)
    initial = Decoder(DecoderConfig(f"short_convolution {name}", vocabulary=KEYS + VALUES, dim=64, heads=2))
    for module in initial.modules():  # small weights make the plateau before the first lookup many times as long
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    accuracy, steps = run_ranks(2, recall, initial, most, timeout_seconds=300)[0]
    return Recalled(name, accuracy, steps, time.perf_counter() - began)


def show(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "first loss", "last loss", "2 ranks - 1, relative", "in fp64", "recall", "in steps")
    recalled = {each["name"]: each for each in report["recall"]}
    for each in report["text"]:
        found = recalled.get(each["name"])
        looked_up = [f"{found['accuracy']:.3f}", f"{found['steps']}"] if found else ["", ""]
        losses = [f"{each['losses'][0]:.3f}", f"{each['losses'][-1]:.3f}"]
        exact = "" if each["in_fp64"] is None else f"{each['in_fp64']:.1e}"
        table.add_row(each["name"], *losses, f"{each['difference']:.1e}", exact, *looked_up)
    Console(width=100).print(table, f"entropy of single bytes: {report['unigram_entropy']:.3f} nats")


def write(report: dict, path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="rows of the catalog (default: all causal ones)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--part", choices=("all", "text", "recall"), default="all")
    parser.add_argument("--out", metavar="FILE", help="write JSON there")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has already")
    arguments = parser.parse_args()
    try:
        rows = [find(name) for name in arguments.layers or CATALOG]
    except ValueError as error:
        parser.exit(2, f"bench.learning: {error}\n")
    text = library_bytes()
    report: dict = {
        "command": " ".join(["python -m bench.learning", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "unigram_entropy": unigram_entropy(text),
        "text": [],
        "recall": [],
    }
    if arguments.resume and Path(arguments.out).exists():
        report = json.loads(Path(arguments.out).read_text())
    learners = [row for row in rows if row.causal and row.status == "works"]
    for row in learners if arguments.part != "recall" else ():
        if any(each["name"] == row.name for each in report["text"]):
            continue
        learnt = learn_text(row.name, text, arguments.steps)
        report["text"].append(asdict(learnt))
        print(
            f"{row.name}: loss {learnt.losses[-1]:.3f}, difference {learnt.difference:.1e}, {learnt.seconds:.0f} s",
            flush=True,
        )
        write(report, arguments.out)
    for row in learners if arguments.part != "text" else ():
        if not row.recalls or any(each["name"] == row.name for each in report["recall"]):
            continue
        recalled = learn_recall(row.name)
        report["recall"].append(asdict(recalled))
        print(
            f"{row.name}: recall {recalled.accuracy:.3f} in {recalled.steps} steps, {recalled.seconds:.0f} s",
            flush=True,
        )
        write(report, arguments.out)
    show(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
