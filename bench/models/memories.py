"""Titans' closed form beside its token loop, and what a stretch keeps: ``python -m bench.models.memories``.

Ratios of one run on one thread, forward and backward, fp32; states are counted, not timed.
"""

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from seqpar import Cut
from seqpar.layers import NeuralMemory, titans


def seconds(layer: NeuralMemory, x: Tensor) -> float:
    """Of processor, for the faster of two forwards and backwards: others may use the machine."""
    found = []
    for _ in range(2):
        start = time.process_time()
        layer(x, Cut.whole([x.shape[1]])).sum().backward()
        found.append(time.process_time() - start)
    return min(found)


def kept(layer: NeuralMemory, tokens: int) -> int:
    """Bytes of states that one document's forward keeps for backward."""
    numbers = sum(each.numel() for each in layer.rule.start(tuple(layer.weights)))
    found: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        if saved.dim() == 2 and saved.shape[1] == numbers:
            found.append(saved.numel() * saved.element_size())
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        layer(torch.randn(1, tokens, layer.out.in_features), Cut.whole([tokens]))
    return sum(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("bench/results/memories.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer, x = titans(64, 1, chunk=64), torch.randn(1, 4096, 64)
    fast = seconds(layer, x)
    layer.rule = replace(layer.rule, closed=False)
    slow = seconds(layer, x)
    layer.rule = replace(layer.rule, closed=True)
    states = {tokens: kept(layer, tokens) for tokens in (1024, 4096, 16384, 65536)}
    result = {
        "command": "python -m bench.models.memories",
        "machine": f"{platform.machine()}, torch {torch.__version__}, 1 thread",
        "sizes": {"tokens": 4096, "chunk": 64, "dim": 64, "heads": 1},
        "loop_seconds": slow,
        "closed_seconds": fast,
        "loop_over_closed": slow / fast,
        "state_bytes_kept": states,
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
