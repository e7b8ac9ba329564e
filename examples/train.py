"""Train a small language model with every sequence cut over the ranks, then check it against one rank.

    torchrun --nproc-per-node 4 examples/train.py        # or mpirun -n 4 python examples/train.py, srun, or alone

The part that matters is `train`: wrap the model, call it with the whole sequence on every rank, and train as ever.
"""

import sys
import time
from collections.abc import Callable, Sequence

import torch
from corpus import Corpus, open_corpus, read
from optimizer import ExactAdamW
from options import DTYPES, TIMEOUT, Options, Stop, parse
from planned import train_planned
from ranks import Ranks, any_stop, one_rank, split_ranks
from report import Comparison, Report, Step, describe
from torch import Tensor, nn

from seqpar import sequence_parallel
from seqpar.collectives import Group, GroupError, connect, disconnect
from seqpar.commands.written import try_to_write
from seqpar.models import build


def train(options: Options, corpus: Corpus, ranks: Ranks, report: Callable[[Step], None]) -> list[float]:
    """Train, and return the loss of every step: the same numbers however many ranks there are."""
    torch.manual_seed(options.seed)  # the same weights on every rank
    model = sequence_parallel(
        build(options.model).to(ranks.device, DTYPES[options.dtype]),
        group=ranks.sequence,
        layout=options.layout,
        transport=options.transport,
        scan=options.scan,
    )
    optimizer = ExactAdamW(model, options.learning_rate, options.warm_up)
    losses: list[float] = []
    for number in range(options.steps):
        begin, sent = time.perf_counter(), ranks.bytes_
        sequences = corpus.step(number, ranks.num_sequences)
        parts: list[Tensor] = []
        for mine in ranks.mine:
            tokens, lengths = read(sequences[mine], ranks.device)
            out = model(tokens, labels=tokens, lengths=lengths)  # every rank passes the whole sequence in
            parts.append(out.loss / ranks.num_sequences)
            parts[-1].backward()  # the gradients are those of one device
        loss = torch.stack(parts).detach().sum()
        ranks.sum_over_replicas([loss, *gradients(model)])
        optimizer.step()
        losses.append(loss.item())
        seconds, bytes_ = time.perf_counter() - begin, ranks.bytes_ - sent
        shares = [out.shard.num_of(rank) for rank in range(out.shard.size)]
        sizes = [document.size for sequence in sequences for document in sequence]
        report(Step(number + 1, losses[-1], len(sizes), sum(sizes), seconds, bytes_, shares))
    return losses


def gradients(model: nn.Module) -> list[Tensor]:
    """Those of all parameters, in order."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def compare(options: Options, corpus: Corpus, ranks: Ranks, losses: list[float], num_ranks: int) -> bool:
    """Train the same steps on this rank alone; whether the losses are the same."""
    comparison = Comparison(options, losses, num_ranks)
    train(options, corpus, one_rank(ranks), comparison.step)
    return comparison.close()


def prepare(options: Options, group: Group, device: torch.device) -> tuple[Corpus, Ranks] | Stop:
    """The text and who works on which part of it, or why there is nothing to train."""
    try:
        prepared = (
            open_corpus(options.data, options.tokens, options.seed, options.longest),
            split_ranks(options, group, device),
        )
        if options.plan_out and group.rank == 0:
            try_to_write(options.plan_out)  # after the ranks have met: only one of them stops here
        return prepared
    except ValueError as error:
        return Stop(str(error))


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0; 1 if one rank and many do not give the same losses; 2 if a flag does not fit."""
    options = parse(arguments)
    on_gpus = isinstance(options, Options) and options.device != "cpu" and torch.cuda.is_available()
    try:
        group = connect("nccl" if on_gpus else "gloo", timeout_seconds=getattr(options, "timeout", TIMEOUT))
    except (ValueError, GroupError) as error:  # the launcher's variables make no sense, or others did not come
        Stop(str(error)).print()
        return 1 if isinstance(error, GroupError) else 2
    device = torch.device("cuda" if on_gpus else "cpu")
    prepared = options if isinstance(options, Stop) else prepare(options, group, device)
    code = any_stop(prepared, group, device)
    if isinstance(options, Stop) or isinstance(prepared, Stop) or code is not None:
        disconnect()
        return code or 0
    corpus, ranks = prepared
    torch.set_num_threads(options.threads)
    report = Report(options, speaks=group.rank == 0)
    report.header(describe(options, corpus, ranks))
    try:
        if options.plan:
            losses = train_planned(options, corpus, group, device, report.curves)
        else:
            report.columns()
            losses = train(options, corpus, ranks, report.step)
    except ValueError as error:  # the same on every rank
        disconnect()
        if group.rank == 0:
            Stop(str(error)).print()
        return 2
    report.close()
    disconnect()
    if group.rank > 0 or group.size == 1 or not options.compare:
        return 0
    return 0 if compare(options, corpus, ranks, losses, group.size) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
