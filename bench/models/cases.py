"""What is timed: one training step (forward and backward) of a small decoder, cut in different ways."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One way to cut one step. ``scaling``: "total" keeps the whole sequence, "per_rank" the tokens of each rank."""

    mixer: str
    scaling: str
    ranks: int
    tokens: int
    layout: str
    way: str  # the scan (linear attention) or the transport (softmax attention)

    @property
    def name(self) -> str:
        return f"{self.mixer:7} {self.way:10} {self.layout:10} {self.ranks} ranks {self.tokens:6} tokens"

    @property
    def cutting(self) -> dict[str, str]:
        """The options of `sequence_parallel`."""
        if self.mixer == "linear":
            return {"layout": self.layout, "scan": self.way}
        return {"layout": self.layout, "transport": self.way}


@dataclass(frozen=True)
class Sizes:
    """How large the steps are."""

    tokens: int = 16384
    dim: int = 256
    layers: int = 2
    softmax_dim: int = 128
    softmax_layers: int = 1
    head_dim: int = 64


LINEAR = [("contiguous", scan) for scan in ("all_gather", "all_scan", "ring", "doubling")] + [("zigzag", "all_scan")]
SOFTMAX = [
    ("zigzag", "ring"),
    ("contiguous", "ring"),
    ("striped", "ring"),
    ("zigzag", "all_gather"),
    ("contiguous", "all_to_all"),
]


def cases(sizes: Sizes, mixers: list[str], rank_counts: list[int]) -> list[Case]:
    """Every case of a run; the one-rank step of each size comes first and serves all ways."""
    found: list[Case] = []
    for mixer in mixers:
        ways = LINEAR if mixer == "linear" else SOFTMAX
        found.append(Case(mixer, "total", 1, sizes.tokens, "contiguous", ways[0][1]))
        for ranks in rank_counts:
            found += [Case(mixer, "total", ranks, sizes.tokens, *way) for way in ways]
    for mixer in mixers:
        ways = LINEAR if mixer == "linear" else SOFTMAX
        per_rank = sizes.tokens // max(rank_counts)
        found.append(Case(mixer, "per_rank", 1, per_rank, "contiguous", ways[0][1]))
        for ranks in rank_counts:
            found += [Case(mixer, "per_rank", ranks, per_rank * ranks, *way) for way in ways]
    return found
