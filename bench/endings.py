"""`python -m bench.endings --runs 100`: do short runs with a backward pass end with exit code 0?

Each run imports everything, trains one step cut over two ranks and ends as a script ends, in three worlds: ranks that
are threads, processes, and started by torchrun. Exit status 1 if any run ended otherwise.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

STEP = """
import torch
from seqpar.collectives import connect, disconnect, run_ranks
from seqpar import sequence_parallel
from seqpar.models import DecoderConfig, build
torch.set_num_threads(1)
torch.manual_seed(0)
weights = build(DecoderConfig("gla softmax", dim=16, heads=2)).state_dict()
def step(group):
    model = build(DecoderConfig("gla softmax", dim=16, heads=2))
    model.load_state_dict(weights)
    tokens = torch.arange(24)[None]
    sequence_parallel(model, group=group)(tokens, labels=tokens, lengths=[10, 14]).loss.backward()
"""
BODIES = {
    "threads": STEP + "run_ranks(2, step)\n",
    "processes": STEP + "group = connect('gloo')\nstep(group)\ndisconnect()\n",
    "torchrun": STEP + "group = connect('gloo')\nstep(group)\ndisconnect()\n",
}


@dataclass(frozen=True)
class Endings:
    """How the runs of one world ended: how many by each exit code."""

    world: str
    codes: Counter[int]

    @property
    def runs(self) -> int:
        return self.codes.total()

    @property
    def good(self) -> int:
        return self.codes[0]

    @property
    def others(self) -> str:
        return ", ".join(f"{count} x {name(code)}" for code, count in sorted(self.codes.items()) if code)


def name(code: int) -> str:
    """An exit code as people say it.

    >>> name(3), name(-6)
    ('3', 'SIGABRT')
    """
    return signal.Signals(-code).name if code < 0 else str(code)


def run_once(world: str, body: str) -> int:
    """The exit code of one run; the first that is not 0 where it has two processes."""
    if world == "torchrun":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
        return _first_failure(
            [
                subprocess.Popen(
                    [*launcher, sys.executable, "-c", body], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            ]
        )
    if world == "threads":
        return _first_failure(
            [subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
        )
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    places = [os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return _first_failure(
        [
            subprocess.Popen(
                [sys.executable, "-c", body], env=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            for place in places
        ]
    )


def _first_failure(processes: Sequence["subprocess.Popen[bytes]"]) -> int:
    codes = [process.wait() for process in processes]
    return next((code for code in codes if code), 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(world: str, runs: int, at_once: int) -> Endings:
    """Run so many, ``at_once`` at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        return Endings(world, Counter(pool.map(lambda _: run_once(world, BODIES[world]), range(runs))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run all worlds and print how their runs ended."""
    parser = argparse.ArgumentParser(prog="python -m bench.endings", description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="runs of each world (100)")
    parser.add_argument("--at-once", type=int, default=2, help="runs at the same time (2)")
    parser.add_argument("--worlds", default=",".join(BODIES), help="which worlds, with commas between (all)")
    arguments = parser.parse_args(argv)
    worlds = arguments.worlds.split(",")
    if arguments.runs < 1 or arguments.at_once < 1:
        return _refuse("--runs and --at-once must be at least 1")
    if unknown := [world for world in worlds if world not in BODIES]:
        return _refuse(f"--worlds {unknown[0]!r} is none of {', '.join(BODIES)}")
    found = [measure(world, arguments.runs, arguments.at_once) for world in worlds]
    table = Table("world", "runs", "exit code 0", "others")
    for each in found:
        table.add_row(each.world, str(each.runs), str(each.good), each.others or "-")
    Console().print(table)
    return 0 if all(each.good == each.runs for each in found) else 1


def _refuse(why: str) -> int:
    print(f"bench.endings: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
