"""One model of transformers, converted to our layers, cut over 1 to 4 ranks, against itself on each document alone.

``python -m bench.models.hf.converted`` measures every family that has rules, and writes what ``seqpar models`` says.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from bench.models.hf.measure import EXACT, LENGTHS, WORLDS, Measured, Numbers, _short, alone
from bench.models.hf.shrink import built, shrunk
from seqpar.collectives import Group, run_ranks
from seqpar.hf import Exact
from seqpar.hf.converting.convert import load
from seqpar.hf.converting.table import FAMILIES
from seqpar.training.wrap import Options, SequenceParallel

RECORD = Path(__file__).parents[3] / "seqpar" / "hf" / "converted.json"


def main() -> None:
    """Measure, print a line for each, and write."""
    torch.set_num_threads(1)
    found = {}
    for model_type in sorted(FAMILIES):
        row = measure_converted(model_type)
        print(f"{model_type:28} {row.outcome:8} {row.error} {row.why}", flush=True)
        found[model_type] = {"converted": row.outcome, "error": row.error, "why": row.why}
    RECORD.write_text(json.dumps(found, indent=1) + "\n")


def measure_converted(model_type: str, worlds: Sequence[tuple[int, str]] = WORLDS) -> Measured:
    """Loss, logits and every gradient, pulled back to the weights of transformers."""
    try:
        model = built(shrunk(model_type))
        decoder = load(model)
    except ValueError as error:
        return Measured(model_type, "refused", None, _short(error))
    tokens = torch.randint(3, model.config.vocab_size, (2, sum(LENGTHS)))
    with Exact():
        whole = alone(model, tokens)
    numbers = [run_ranks(size, _rank, decoder, tokens, layout)[-1] for size, layout in worlds]
    error, name = max(whole.error(each) for each in numbers)
    return Measured(model_type, "exact" if error <= EXACT else "wrong", error, "" if error <= EXACT else name)


def _rank(group: Group, decoder: nn.Module, tokens: torch.Tensor, layout: str) -> Numbers:
    twin = copy.deepcopy(decoder)
    wrapped = SequenceParallel(twin, group, Options(layout))
    output = wrapped(tokens, labels=tokens, lengths=LENGTHS)
    output.loss.backward()
    logits = output.shard.gather(output.logits.detach())
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in twin.named_parameters()}
    return Numbers(output.loss.detach(), logits, twin.origin.back(gradients))


if __name__ == "__main__":
    main()
