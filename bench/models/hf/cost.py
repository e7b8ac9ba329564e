"""What being cut costs on one rank: ``python -m bench.models.hf.cost [--out FILE]``.

A Llama runs as it is and wrapped, turn by turn, on one core: ratios of processor seconds of turns next to each other,
and of these the median. ``forward``: with the loss, as in training; ``step``: with backward. ``checks``: milliseconds
that the decorator's checks take in a step of many documents, the model's own checks included.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from seqpar import sequence_parallel
from seqpar.collectives import alone
from seqpar.hf.fitted import Fitted
from seqpar.training.wrap import Options

AIM_RATIO, AIM_MILLISECONDS = 1.05, 1.0


def seconds_of(run: Callable[[], Any]) -> float:
    """Processor seconds."""
    began = time.process_time()
    run()
    return time.process_time() - began


def ratio(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> float:
    """How much longer ``other`` takes; who begins takes turns."""
    found = []
    for turn in range(rounds):
        first, second = (seconds_of(each) for each in ((one, other) if turn % 2 else (other, one)))
        found.append(second / first if turn % 2 else first / second)
    return statistics.median(found)


def measure(tokens: int, dim: int, layers: int, rounds: int) -> dict[str, float]:
    """Ratios for one document of so many tokens."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=dim,
            intermediate_size=dim * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=dim // 32,
            num_key_value_heads=dim // 64,
            vocab_size=1024,
        )
    ).train()
    wrapped = sequence_parallel(copy.deepcopy(model))
    batch = torch.randint(1024, (1, tokens))

    def bare_loss() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def cut_loss() -> torch.Tensor:
        loss = wrapped(batch, labels=batch).loss
        assert loss is not None
        return loss

    error = abs(bare_loss().item() / cut_loss().item() - 1)  # and all is warm
    assert error < 1e-5
    return {
        "forward": ratio(bare_loss, cut_loss, rounds),
        "step": ratio(lambda: bare_loss().backward(), lambda: cut_loss().backward(), rounds),
        "checks_milliseconds": checks(wrapped, rounds),
    }


def checks(wrapped: Any, rounds: int, documents: int = 1000) -> float:
    """Milliseconds of what looks at a batch of many documents before the model runs."""
    lengths = [16] * documents
    tokens = torch.randint(1024, (1, sum(lengths)))
    cut = Options().cut(lengths, alone())
    fitted = wrapped.module
    assert isinstance(fitted, Fitted)

    def look() -> None:
        wrapped.check(tokens, tokens, lengths)
        fitted.check(cut)

    look()
    return 1e3 * statistics.median(seconds_of(look) for _ in range(rounds))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.models.hf.cost", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {name: getattr(options, name) for name in ("tokens", "dim", "layers", "rounds")}
    aims = {"aim_forward": AIM_RATIO, "aim_checks_milliseconds": AIM_MILLISECONDS}
    found = {**sizes, **measure(**sizes), **aims}
    print(json.dumps(found, indent=1))
    if options.out:
        head = {"command": "python -m bench.models.hf.cost", "transformers": transformers.__version__}
        options.out.write_text(json.dumps({**head, "torch": torch.__version__, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
