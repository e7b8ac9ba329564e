"""What bf16 costs a cut model, beside what it costs transformers: ``python -m bench.models.hf.halves [types]``.

Both run the same bf16 weights, and are compared with transformers itself in fp64, each document alone. The errors are
root mean squares over all logits and over all gradients, relative to those of the numbers themselves, of several draws
of the weights together: of one draw alone either may be the better one by luck.
"""

import argparse
import copy
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from bench.models.hf.measure import LENGTHS, Numbers, alone, gradients
from bench.models.hf.shrink import built, shrunk
from seqpar.collectives import Group, run_ranks
from seqpar.hf import Exact, adapted
from seqpar.training.wrap import Options, SequenceParallel

TYPES = ("llama", "gemma2", "gpt_oss", "deepseek_v3", "mamba2", "falcon_h1", "qwen3_next", "kimi_linear", "rwkv")
AIM = 1.1


@dataclass(frozen=True)
class Halves:
    """Relative errors in bf16: of transformers' own runs (``own_``), and cut."""

    model_type: str
    draws: int
    ranks: int
    own_logits: float
    logits: float
    own_gradients: float
    gradients: float

    @property
    def ratio(self) -> float:
        """The larger one of those of logits and of gradients."""
        return max(self.logits / self.own_logits, self.gradients / self.own_gradients)


def halves(model_type: str, draws: int, ranks: int, layout: str = "zigzag") -> Halves:
    """Everything about one ``model_type``."""
    rows = [_draw(model_type, seed, ranks, layout) for seed in range(draws)]
    return Halves(model_type, draws, ranks, *(math.sqrt(sum(column) / draws) for column in zip(*rows)))


def _draw(model_type: str, seed: int, ranks: int, layout: str) -> list[float]:
    """Mean squares: of logits alone and cut, of gradients alone and cut."""
    config = shrunk(model_type)
    model = built(config, seed).bfloat16()
    tokens = torch.randint(3, config.get_text_config().vocab_size, (2, sum(LENGTHS)))
    with Exact():
        whole = alone(copy.deepcopy(model).double(), tokens)
    both = alone(model, tokens), run_ranks(ranks, _rank, model, tokens, layout)[-1]
    logits = [_square([whole.logits], [each.logits]) for each in both]
    names = list(whole.gradients)
    return logits + [_square([whole.gradients[n] for n in names], [each.gradients[n] for n in names]) for each in both]


def _square(whole: Sequence[Tensor], mine: Sequence[Tensor]) -> float:
    error = sum(float((one.double() - each).square().sum()) for each, one in zip(whole, mine))
    return error / sum(float(each.square().sum()) for each in whole)


def _rank(group: Group, model: nn.Module, tokens: Tensor, layout: str) -> Numbers:
    twin = copy.deepcopy(model)
    output = SequenceParallel(adapted(twin, group), group, Options(layout))(tokens, labels=tokens, lengths=LENGTHS)
    output.loss.backward()
    return Numbers(output.loss.detach(), output.shard.gather(output.logits.detach()), gradients(twin))


def main() -> None:
    """Measure, print a line for each, and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.models.hf.halves", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="model_type", help=f"default: {', '.join(TYPES)}")
    parser.add_argument("--draws", type=int, default=8, help="of the weights (8)")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = []
    for model_type in options.types or TYPES:
        row = halves(model_type, options.draws, options.ranks)
        found.append({**asdict(row), "ratio": row.ratio})
        print(
            f"{model_type:20} logits {row.own_logits:.2e} cut {row.logits:.2e}   gradients {row.own_gradients:.2e} "
            f"cut {row.gradients:.2e}   ratio {row.ratio:.3f} (aim {AIM})",
            flush=True,
        )
    if options.out:
        head = {"transformers": transformers.__version__, "torch": torch.__version__, "lengths": LENGTHS, "aim": AIM}
        options.out.write_text(json.dumps({**head, "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
