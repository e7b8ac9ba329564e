"""Is a compiled model slower than an eager one? `python -m bench.models.compiled [--out FILE]`.

One training step of a decoder, wrapped over one rank, as it is and with the model inside compiled (`wrapped.compile()`,
inductor), turn by turn on one core, documents of other lengths in every step: the median of ratios of wall seconds of
steps next to each other. Compiling itself is left out; how often anything was compiled again after that is counted.
"""

import argparse
import copy
import random
import statistics
import sys
import time
from typing import Any

import torch

from bench.models import rows
from seqpar import sequence_parallel
from seqpar.collectives import alone
from seqpar.commands.arguments import count
from seqpar.models import Decoder, DecoderConfig

AIM = 1.0
MIXERS = ("softmax", "linear_attention", "gla", "gated_deltanet", "mamba2")


def seconds_of(model: Any, seed: int, tokens: int) -> float:
    """Of a step of a few documents."""
    rng = random.Random(seed)
    edges = sorted(rng.sample(range(1, tokens), 3))
    lengths = [stop - start for start, stop in zip([0, *edges], [*edges, tokens])]
    batch = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(seed))
    began = time.perf_counter()
    model(batch, labels=batch, lengths=lengths).loss.backward()
    model.zero_grad()
    return time.perf_counter() - began


def measure(mixer: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    torch.compiler.reset()
    plain = sequence_parallel(Decoder(DecoderConfig(mixer, 2, dim=arguments.dim, heads=4)), group=alone())
    compiled = copy.deepcopy(plain)
    compiled.compile()
    for seed in range(3):  # once for these tokens, once for any number of them
        seconds_of(compiled, seed, arguments.tokens + seed)
        seconds_of(plain, seed, arguments.tokens + seed)
    graphs, found = counters["stats"]["unique_graphs"], []
    for turn in range(arguments.rounds):
        pair = [seconds_of(each, turn + 9, arguments.tokens) for each in ((plain, compiled)[:: 1 - 2 * (turn % 2)])]
        found.append(pair[turn % 2 == 0] / pair[turn % 2])
    again = counters["stats"]["unique_graphs"] - graphs
    return {"mixer": mixer, "ratio": round(statistics.median(found), 3), "compiled_again": again}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.models.compiled", description=(__doc__ or "").split("\n")[0])
    for name, value in (("--tokens", 2048), ("--dim", 256), ("--rounds", 9)):
        parser.add_argument(name, type=count, default=value)
    parser.add_argument("--out", type=rows.file, metavar="FILE", help="write JSON there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for mixer in MIXERS:
        found.append(measure(mixer, arguments))
        print(found[-1], flush=True)
    report = {
        "command": " ".join(["python -m bench.models.compiled", *sys.argv[1:]]),
        "machine": f"torch {torch.__version__}, one thread",
        "aim": AIM,
        "sizes": {"tokens": arguments.tokens, "dim": arguments.dim, "layers": 2, "rounds": arguments.rounds},
        "rows": found,
    }
    rows.write(report, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
