"""Pretrain a decoder on documents, every sequence cut over some ranks, the others working on other sequences.

    torchrun --nproc-per-node 4 examples/pretrain.py --data FOLDER --tokens 64K --sequence-ranks 2 --shard

The numbers are those of one process, whatever the ranks are. Documents: text, JSON lines, Parquet, Arrow, token files.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqpar import sequence_parallel
from seqpar.collectives import Group, GroupError, connect, disconnect
from seqpar.commands.arguments import Parser, count, seconds, tokens, whole
from seqpar.models import Decoder, DecoderConfig
from seqpar.training import steps as training
from seqpar.training.documents import PACKINGS, Documents, Packing, Step, open_source, open_tokenizer, read_once
from seqpar.training.extras import adamw

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}  # of the weights


@dataclass
class Run:
    """What a run consists of. Model, optimizer, schedule and documents have ``state_dict`` and ``load_state_dict``."""

    ranks: training.Ranks
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    documents: Documents
    compute: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    sharded: bool
    step: int = 0


def open_documents(options: argparse.Namespace, ranks: training.Ranks) -> tuple[Documents, Documents | None, int]:
    """To train on, to evaluate on, and how many tokens there are."""
    words = open_tokenizer(options.tokenizer)
    packing = Packing(options.tokens, options.packing, options.overlap)
    read = partial(open_source, tokenizer=words, field=options.field)
    replica, replicas = ranks.world.rank // ranks.sequence.size, ranks.replicas.size
    where = {"sequences": options.sequences, "replica": replica, "replicas": replicas}
    documents = Documents(read(options.data), packing, seed=options.seed, **where)
    held = Documents(read(options.evaluate), packing, seed=None, epochs=1, **where) if options.evaluate else None
    return documents, held, words.vocabulary


def build(options: argparse.Namespace, ranks: training.Ranks, documents: Documents, vocabulary: int) -> Run:
    """The same weights on every rank, whole or sharded over all of them."""
    torch.manual_seed(options.seed)
    device = device_of(options)
    config = DecoderConfig(options.pattern, options.repeats, vocabulary, options.dim, options.heads)
    model: Any = Decoder(config).to(device, DTYPES[options.dtype])
    in_bf16 = options.dtype == "bfloat16"
    if options.compile:
        for block in model.blocks:
            block.compile(backend=options.compile)
    if options.shard:
        shard(model, ranks.world.size, device, in_bf16)
    wrapped = sequence_parallel(
        model, group=ranks.sequence, layout=options.layout, sync_gradients=not options.shard,
        loss_tokens=options.loss_tokens,
    )  # fmt: skip
    optimizer = adamw(wrapped.parameters(), options.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = training.cosine(optimizer, options.steps, options.warm_up)
    compute = partial(torch.autocast, device.type, torch.bfloat16) if in_bf16 and not options.shard else nullcontext
    return Run(ranks, wrapped, optimizer, schedule, documents, compute, device, options.shard)


def shard(model: Any, ranks: int, device: torch.device, in_bf16: bool) -> None:
    """FSDP2 over all ranks, those of a sequence and its replicas: it sums gradients over both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks,))
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        if in_bf16
        else MixedPrecisionPolicy()
    )
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def gradients(run: Run, step: Step) -> Tensor:
    """Those of the whole step, on every rank; the loss of the step."""
    replicas = run.ranks.replicas
    targets = training.total(step.num_targets, replicas, run.device).clamp(min=1).item()
    averaged_over = replicas.size if run.sharded else 1  # FSDP2 takes a mean over replicas, not a sum
    losses = training.accumulate(run.model, step.batches, targets / averaged_over, run.compute)
    if not run.sharded:
        training.sum_over_replicas(run.model.parameters(), replicas)
    return training.total(losses, replicas, run.device) / targets


def train_step(run: Run, step: Step, options: argparse.Namespace) -> training.Progress:
    """One step of the optimizer; or none, if its loss or gradient is not finite and such steps are to be skipped."""
    begin, sent, rate, note = time.perf_counter(), run.ranks.world.bytes_, run.schedule.get_last_lr()[0], ""
    loss = gradients(run, step)
    norm = training.clip_gradients(run.model.parameters(), options.clip)
    if loss.isfinite() and norm.isfinite():  # both are sums over all ranks, so all see the same
        run.optimizer.step()
    else:
        found = training.first_nonfinite(run.model, lambda: gradients(run, step), run.ranks.world)
        note = f"loss {loss.item()}, norm {norm.item()}: {found}"
        if options.nonfinite == "stop":
            raise training.NonFinite(f"step {run.step + 1}: {note}")
    run.optimizer.zero_grad()
    run.schedule.step()
    run.step += 1
    read = int(training.total(step.num_tokens, run.ranks.replicas, run.device).item())
    weights = sum(each.numel() for name, each in run.model.named_parameters() if "embedding" not in name)
    return training.Progress(
        run.step, loss.item(), norm.item(), rate, read, -(-step.num_tokens // run.ranks.sequence.size),
        time.perf_counter() - begin, run.ranks.world.bytes_ - sent, training.memory_bytes(run.device),
        6.0 * weights * read, options.peak * 1e12 * run.ranks.world.size, note and f"skipped: {note}",
    )  # fmt: skip


def train(run: Run, held: Documents | None, options: argparse.Namespace, log: training.Log | None) -> None:
    """All steps; rank 0 tells of them."""
    world = run.ranks.world
    with closing(read_once(run.documents, run.ranks.sequence, run.device)) as documents:
        while run.step < options.steps:
            done = train_step(run, training.together(world, lambda: next(documents), run.device), options)
            row, line = done.row(), done.line()
            if held is not None and (run.step % options.evaluate_every == 0 or run.step == options.steps):
                loss, targets = training.evaluate(run.model, held, run.ranks.replicas, compute=run.compute)
                row, line = {**row, "held_out_loss": loss, "held_out_targets": targets}, f"{line}  held out {loss:.4f}"
            if world.rank == 0:
                print(line, flush=True)
            training.together(world, partial(log.write, row) if log else lambda: None, run.device)


def device_of(options: argparse.Namespace) -> torch.device:
    return torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("pretrain.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="PATH", help="files or folders: see open_source")
    add("--evaluate", nargs="+", default=[], metavar="PATH", help="held-out ones")
    add("--evaluate-every", type=count, default=100, metavar="STEPS")
    add("--field", default="text", help="of JSON lines and tables")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json (default: bytes)")
    add("--tokens", type=tokens, default=4096, help="of a sequence, at most")
    add("--packing", choices=PACKINGS, default="cut", help="of documents that do not fit")
    add("--overlap", type=whole, default=0, help="of windows, in tokens")
    add("--sequences", type=count, default=4, help="of a step, over all replicas")
    add("--sequence-ranks", type=whole, default=0, metavar="N", help="that share a sequence (0: all)")
    add("--shard", action="store_true", help="weights, gradients and optimizer over all ranks (FSDP2)")
    add("--layout", choices=("contiguous", "zigzag", "striped"), default="zigzag")
    add("--pattern", default="gla gla gla softmax", help="layers: see seqpar layers")
    for name, value in (("--repeats", 1), ("--dim", 128), ("--heads", 4), ("--steps", 100)):
        add(name, type=count, default=value)
    for name in ("--warm-up", "--seed", "--loss-tokens"):
        add(name, type=whole, default=0)
    for name, rate in (("--rate", 1e-3), ("--clip", 1.0), ("--peak", 0.0)):
        add(name, type=float, default=rate, help="TFLOP/s of a device, for MFU" if name == "--peak" else None)
    add("--dtype", choices=DTYPES, default="float32", help="bfloat16: computed in, with weights in float32")
    add("--device", choices=("auto", "cpu"), default="auto")
    add("--compile", metavar="BACKEND", help="compile blocks: inductor, aot_eager or eager")
    add("--nonfinite", choices=("stop", "skip"), default="stop", help="what to do at a loss or gradient that is none")
    add("--log-file", metavar="FILE", help="JSON lines")
    add("--timeout", type=seconds, default=600.0, metavar="S", help="that a rank waits for the others")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0; 1 if another rank fails or numbers are not finite; 2 for what cannot be trained on."""
    options, code = parse(arguments), 0
    try:
        device = device_of(options)
        world: Group = connect("nccl" if device.type == "cuda" else "gloo", timeout_seconds=options.timeout)
        ranks = training.split_ranks(world, options.sequence_ranks)
        documents, held, vocabulary = training.together(world, lambda: open_documents(options, ranks), device)
        writes = options.log_file and world.rank == 0
        log = training.together(world, lambda: training.Log(options.log_file) if writes else None, device)
        train(build(options, ranks, documents, vocabulary), held, options, log)
    except (ValueError, ArithmeticError, GroupError) as error:
        print(f"pretrain.py: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, ValueError) else 1
    disconnect()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
