"""The rows of the catalog of memories that learn while they read: all their weights travel."""

from collections.abc import Callable

from seqpar.layers.entry import FLOAT_BYTES, Entry, Sizes
from seqpar.layers.memory import neural_memory as memories

CROSSES = "weights, those of the chunk's start{}; the last 3 rows before the convolution"
SCANS = ()  # no ways through a memory compose


def _weights(times: int, rows: int = 0) -> Callable[[Sizes, int], int]:
    """So many times the weights of two matrices, four times as wide inside; keys and values of ``rows`` tokens."""

    def bytes_per_cut(sizes: Sizes, tokens: int) -> int:
        state = sizes.heads * (times * 2 * 4 * sizes.head_dim**2 + rows * 2 * sizes.head_dim)
        return FLOAT_BYTES * (state + min(3, tokens) * 3 * sizes.dim)

    return bytes_per_cut


ENTRIES = (
    Entry(
        "titans", "titans", "arXiv 2501.00663", CROSSES.format(", momentum"),
        lambda sizes: memories.titans(sizes.dim, sizes.heads), _weights(3), scans=SCANS, recalls=True,
    ),
    Entry(
        "moneta", "moneta", "arXiv 2504.13173", CROSSES.format(""),
        lambda sizes: memories.moneta(sizes.dim, sizes.heads), _weights(2), scans=SCANS, recalls=True,
    ),
    Entry(
        "yaad", "yaad", "arXiv 2504.13173", CROSSES.format(""),
        lambda sizes: memories.yaad(sizes.dim, sizes.heads), _weights(2), scans=SCANS, recalls=True,
    ),
    Entry(
        "memora", "memora", "arXiv 2504.13173", CROSSES.format(""),
        lambda sizes: memories.memora(sizes.dim, sizes.heads), _weights(2), scans=SCANS, recalls=True,
    ),
    Entry(
        "omeganet", "omeganet", "arXiv 2505.23735", CROSSES.format(", a window's keys and values"),
        lambda sizes: memories.omeganet(sizes.dim, sizes.heads), _weights(2, 15), scans=SCANS, recalls=True,
    ),
    Entry(
        "atlas", "atlas", "arXiv 2505.23735", CROSSES.format(", momentum, a window's keys and values"),
        lambda sizes: memories.atlas(sizes.dim, sizes.heads), _weights(3, 15), scans=SCANS, recalls=True,
    ),
)  # fmt: skip
