"""What the planner is measured on: the published case, small exact ones, corpora, random batches, large clusters."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from seqpar.planner import (
    Cluster,
    Decoder,
    Problem,
    analytic_cluster,
    analytic_costs,
    problem_of,
    published_cluster,
    published_costs,
)
from seqpar.planner.problem.lengths import read_lengths
from seqpar.planner.problem.models import DECODERS

PAD = 128  # lengths are padded to multiples of this, and what is longer than the context less this is dropped
PUBLISHED = (100_000, 48_000, 48_000, 48_000, 48_000)
COMMON_CRAWL, GITHUB = (700, 1.8), (850, 1.85)  # median and sigma of lognormal stand-ins, see the facts of FlexSP
CONTEXTS = {"gpt-7b-192k": 192_000, "gpt-7b-384k": 384_000}
GPU = "H100-80G"


@dataclass(frozen=True)
class Size:
    """How much is measured: batches of each corpus, random batches, and how large the large cases are."""

    batches: int = 10
    small: int = 10
    random: int = 1000
    devices: int = 1024
    documents: int = 8192
    large_seconds: float = 8.0


QUICK = Size(batches=1, small=2, random=20, devices=128, documents=1024, large_seconds=2.0)


@dataclass(frozen=True)
class Case:
    """A batch to be planned in so many seconds. ``static_degree`` is what it is compared with; 0 for what the model's
    context asks for."""

    section: str
    name: str
    problem: Problem
    seconds: float = 1.0
    static_degree: int = 0


Section = Callable[[Size, Path], Iterator[Case]]


def sections() -> dict[str, Section]:
    """The parts of the benchmark by name; each makes its cases one by one."""
    return {
        "published": _published_case,
        "small": _small,
        "tight": _tight,
        "wikipedia": _wikipedia,
        "commoncrawl": lambda size, _: _lognormal_batches("commoncrawl", COMMON_CRAWL, size),
        "github": lambda size, _: _lognormal_batches("github", GITHUB, size),
        "random": _random,
        "large": _large,
    }


def on_published(lengths: Sequence[int], model: str = "gpt-7b-384k", devices: int = 64) -> Problem:
    """Documents on the published cluster, or one like it."""
    cluster = published_cluster(devices)
    return problem_of(lengths, cluster, published_costs(model, cluster))


def on_analytic(lengths: Sequence[int], name: str, cluster: Cluster) -> Problem:
    """Documents of a decoder whose costs are computed from its shape."""
    return problem_of(lengths, cluster, analytic_costs(name, _decoders()[name], GPU, cluster))


def kept(lengths: Sequence[int], context: int) -> list[int]:
    """Lengths padded to 128, without those longer than the context less 128, as FlexSP trains on them."""
    padded = (-(-length // PAD) * PAD for length in lengths)
    return [length for length in padded if length <= context - PAD]


def lognormal(count: int, median: float, sigma: float, seed: int, context: int = 384_000) -> list[int]:
    """A synthetic corpus of so many documents that are kept."""
    draw = random.Random(seed)
    lengths: list[int] = []
    while len(lengths) < count:
        lengths.extend(kept([max(1, int(draw.lognormvariate(math.log(median), sigma)))], context))
    return lengths


def _decoders() -> dict[str, Decoder]:
    """The known decoders, and one with 24 heads, which all-to-alls cut in three."""
    return {**DECODERS, "decoder-24-heads": Decoder(28, 28, 3072, 24, 8, 128, 8192, 128_256)}


def _published_case(size: Size, wikipedia: Path) -> Iterator[Case]:
    yield Case("published", "1 x 100,000 and 4 x 48,000", on_published(PUBLISHED), 3.0, 32)


def _small(size: Size, wikipedia: Path) -> Iterator[Case]:
    """Few documents, long ones among them."""
    for seed in range(size.small):
        draw = random.Random(seed)
        count = draw.randint(5, 12)
        lengths = kept([int(draw.lognormvariate(math.log(24_000), 1.0)) for _ in range(count)], 192_000)
        yield Case("small", f"{len(lengths)} documents, seed {seed}", on_published(lengths), 3.0, 64)


def _tight(size: Size, wikipedia: Path) -> Iterator[Case]:
    """13 documents that fill 97 % of all memory: long ones cannot share a group, and short ones have little choice."""
    for seed in range(size.small):
        draw = random.Random(1000 + seed)
        lengths = [draw.lognormvariate(0, 0.7) for _ in range(13)]
        unit = 0.97 * 64 * on_published([1]).capacity / sum(lengths)
        padded = [int(length * unit) // PAD * PAD for length in lengths]
        yield Case("tight", f"97 % full, seed {seed}", on_published(padded), 3.0, 64)


def _wikipedia(size: Size, wikipedia: Path) -> Iterator[Case]:
    """Half of the batches are runs of the file, half are drawn from all of it."""
    lengths = read_lengths(str(wikipedia))
    for model, context in CONTEXTS.items():
        usable = kept(lengths, context)
        for number in range(size.batches):
            if number % 2 == 0:
                first = number // 2 * 512
                batch, name = usable[first : first + 512], f"documents {first:,} on"
            else:
                batch, name = random.Random(number).sample(usable, 512), f"drawn, seed {number}"
            yield Case("wikipedia", f"{model}, {name}", on_published(batch, model), 1.0, 64)


def _lognormal_batches(section: str, shape: tuple[float, float], size: Size) -> Iterator[Case]:
    for seed in range(size.batches):
        yield Case(section, f"gpt-7b-384k, seed {seed}", on_published(lognormal(512, *shape, seed)), 1.0, 64)


def _random(size: Size, wikipedia: Path) -> Iterator[Case]:
    for seed in range(size.random):
        problem = random_problem(seed)
        yield Case("random", f"seed {seed}: {problem.costs.name}, {problem.cluster.name}", problem, 0.05)


def random_problem(seed: int) -> Problem:
    """1 to 300 documents of any distribution, on 4 to 64 devices, measured costs or computed ones."""
    draw = random.Random(seed)
    count = round(math.exp(draw.uniform(0, math.log(300))))
    median, sigma = math.exp(draw.uniform(math.log(100), math.log(8000))), draw.uniform(0.2, 2.2)
    if draw.random() < 0.5:
        devices = draw.choice([8, 16, 24, 32, 48, 64])
        empty = on_published([1], draw.choice(["gpt-7b-192k", "gpt-7b-384k", "gpt-13b-384k"]), devices)
    else:
        node = draw.choice([4, 6, 8])
        devices = node * draw.randint(1, 64 // node)
        name = draw.choice(["llama-1b", "llama-8b", "hybrid-8b", "linear-8b", "decoder-24-heads"])
        empty = on_analytic([1], name, analytic_cluster(devices, GPU, node))
    if empty.capacity < 1:
        return random_problem(seed + 1_000_000)
    longest = max(kind.degree for kind in empty.costs.kinds) * empty.capacity
    lengths = [min(longest, max(1, int(draw.lognormvariate(math.log(median), sigma)))) for _ in range(count)]
    return Problem(tuple(lengths), empty.cluster, empty.costs)


def _large(size: Size, wikipedia: Path) -> Iterator[Case]:
    corpora = {
        "wikipedia": kept(read_lengths(str(wikipedia)), 384_000)[: size.documents],
        "commoncrawl": lognormal(size.documents, *COMMON_CRAWL, 0),
    }
    for corpus, lengths in corpora.items():
        yield Case(
            "large", f"gpt-7b-384k, {corpus}", on_published(lengths, devices=size.devices), size.large_seconds, 64
        )
        for model in ("llama-8b", "hybrid-8b"):
            problem = on_analytic(lengths, model, analytic_cluster(size.devices, GPU))
            yield Case("large", f"{model} on {GPU}, {corpus}", problem, size.large_seconds)
