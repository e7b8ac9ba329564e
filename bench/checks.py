"""What it costs that ranks notice when they differ: `python -m bench.checks --out bench/results/checks.json`.

Two processes on this machine, one thread each, over Gloo. `messages`: an `all_reduce` whose messages say what they are,
beside the one of `torch.distributed`, which compares nothing; rounds take turns, and of each the least counts. `steps`:
a training step on many documents, the call that compares everything ranks have (`check`: tokens, labels, lengths,
options, modes, weights), and what functions compare inside the step (`agree`, with their messages), as shares of it,
in processor seconds of the rank's thread: waiting for a rank that comes later is no cost of comparing. Least of all
rounds but the first, in which all weights are compared and all functions come to a place for the first time.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from seqpar import sequence_parallel
from seqpar.collectives import Group, connect, disconnect
from seqpar.commands.arguments import Parser, count
from seqpar.models import DecoderConfig, build

SIZE = 2
SPREAD = 4  # rounds of messages for one of steps
NUMBERS = (2, 1_000, 100_000)
DOCUMENTS = (1_000, 10_000)


def seconds_of(run: Callable[[], Any], times: int) -> float:
    """Seconds of one of so many runs in a row."""
    began = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - began) / times


def sums(group: Group, rounds: int) -> list[dict[str, float]]:
    """Seconds of sums, checked and not; every round has all of them, since a machine is busy for a while, then not."""
    found = {numbers: {"numbers": numbers, "seconds": math.inf, "unchecked": math.inf} for numbers in NUMBERS}
    for numbers in NUMBERS * rounds:
        x, least = torch.ones(numbers), found[numbers]

        def checked(x: torch.Tensor = x) -> None:
            group.all_reduce(x).wait()

        def unchecked(x: torch.Tensor = x) -> None:
            dist.all_reduce(x.clone(), async_op=True).wait()

        least["seconds"] = min(least["seconds"], seconds_of(checked, 30))
        least["unchecked"] = min(least["unchecked"], seconds_of(unchecked, 30))
    return [{**each, "ratio": each["seconds"] / each["unchecked"]} for each in found.values()]


class Stopwatch:
    """Adds up the processor seconds of a method of ``owner`` from now on."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds, self._run = 0.0, getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *arguments: Any) -> Any:
        began = time.thread_time()
        try:
            return self._run(*arguments)
        finally:
            self.seconds += time.thread_time() - began


def steps(group: Group, tokens: int, documents: int, rounds: int) -> dict[str, float]:
    """Processor seconds of a step and of what is compared in it."""
    torch.manual_seed(0)
    config = DecoderConfig("gla softmax", dim=128, heads=4)
    model = sequence_parallel(build(config), group=group)
    batch = torch.randint(0, config.vocabulary, (1, tokens))
    lengths = [tokens // documents] * (documents - 1)
    lengths.append(tokens - sum(lengths))
    checks, agree = [Stopwatch(model, name) for name in ("_agree", "_check_batch")], Stopwatch(group, "agree")
    table = []
    for _ in range(rounds + 1):
        for each in (*checks, agree):
            each.seconds = 0.0
        began = time.thread_time()
        model(batch, labels=batch, lengths=lengths).loss.backward()
        table.append((time.thread_time() - began, sum(each.seconds for each in checks), agree.seconds))
    whole, checking, agreeing = (min(column) for column in zip(*table[1:]))
    if not (checking and agreeing):
        raise RuntimeError("nothing was compared in these steps: what is measured has another name now")
    share = (checking + agreeing) / whole
    times = {"step": whole, "check": checking, "agree": agreeing}
    return {"documents": documents, "tokens": tokens, **times, "share": share}


def live(rank: int, port: int, tokens: int, rounds: int, pipe: Any) -> None:
    """One rank."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(SIZE), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    group = connect("gloo")
    found = {"messages": sums(group, SPREAD * rounds), "steps": [steps(group, tokens, n, rounds) for n in DOCUMENTS]}
    disconnect()
    pipe.send(found)


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    """What rank 0 measures."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context, ranks = multiprocessing.get_context("spawn"), []
    for rank in range(SIZE):
        here, there = context.Pipe()
        process = context.Process(target=live, args=(rank, port, tokens, rounds, there), daemon=True)
        process.start()
        there.close()
        ranks.append((process, here))
    found: dict[str, Any] = next(pipe.recv() for _, pipe in ranks)
    for process, _ in ranks:
        process.join()
    return found


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="python -m bench.checks", description=__doc__)
    made.add_argument("--tokens", type=count, default=16384, help="tokens of a step (16384)")
    made.add_argument("--rounds", type=count, default=5, help="steps, and a quarter of the rounds of messages (5)")
    made.add_argument("--out", type=Path, help="write the results to this JSON file")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parser().parse_args(argv)
    found = measure(arguments.tokens, arguments.rounds)
    for each in found["messages"]:
        print("all_reduce of {numbers}: {seconds:.6f} s, unchecked {unchecked:.6f} s, ratio {ratio:.2f}".format(**each))
    for each in found["steps"]:
        print(
            "{documents} documents, {tokens} tokens: step {step:.3f} s, check {check:.6f} s, agree {agree:.6f} s, "
            "{share:.2%} of the step".format(**each)
        )
    if arguments.out:
        machine = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
        arguments.out.write_text(json.dumps({**machine, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
