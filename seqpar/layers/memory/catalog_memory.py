"""The rows of the catalog of memories that learn while they read: all their weights travel."""

from collections.abc import Callable

from torch import nn

from seqpar.crossing.attention import TRANSPORTS
from seqpar.layers.attention.softmax_attention import SoftmaxAttention
from seqpar.layers.entry import FLOAT_BYTES, Entry, Sizes
from seqpar.layers.memory import neural_memory as memories
from seqpar.layers.memory.mac import MAC
from seqpar.layers.memory.segments import HierarchicalMemory, RecurrentTokens, segment_recurrence
from seqpar.layers.memory.swla import SWLA
from seqpar.layers.memory.titans import MAG, MAL

CROSSES = "weights, those of the chunk's start{}; the last 3 rows before the convolution"
WITH_WINDOW = "weights, those of the chunk's start, momentum; 3 rows; a window's keys and values"
SCANS = ()  # no ways through a memory compose
WINDOW, SEGMENT = 512, 128
SLOTS, MEMORIES, KEPT = 16, 100, 32


def _weights(times: int, rows: int = 0, matrices: int = 2) -> Callable[[Sizes, int], int]:
    """So many times the weights of matrices four times as wide inside; keys and values of ``rows`` tokens."""

    def bytes_per_cut(sizes: Sizes, tokens: int) -> int:
        state = sizes.heads * (times * matrices * 4 * sizes.head_dim**2 + rows * 2 * sizes.head_dim)
        return FLOAT_BYTES * (state + min(3, tokens) * 3 * sizes.dim)

    return bytes_per_cut


def _with_window(sizes: Sizes, tokens: int) -> int:
    """Titans' memory, and keys and values of a window."""
    return _weights(3)(sizes, tokens) + FLOAT_BYTES * 2 * sizes.dim * min(WINDOW - 1, tokens)


def _with_segment(sizes: Sizes, tokens: int) -> int:
    """The memory's state, its weights at the segment's start, keys and values of its reads and tokens, and what two
    convolutions see: the memory's, of all three, and that of what it is asked."""
    state = sizes.heads * 4 * 2 * 4 * sizes.head_dim**2 + 4 * (SEGMENT - 1) * sizes.dim + 3 * 3 * sizes.dim
    return FLOAT_BYTES * (state + min(3, tokens) * sizes.dim)


def _swla(sizes: Sizes, tokens: int) -> int:
    """A state, and a window's keys, values and gates."""
    window = min(15, tokens) * sizes.heads * (2 * sizes.head_dim + 1 + 16)
    return FLOAT_BYTES * (sizes.heads * sizes.head_dim**2 + window + min(3, tokens) * 3 * sizes.dim)


def _segments(sizes: Sizes, memory: nn.Module) -> nn.Module:
    """Softmax attention within segments."""
    return segment_recurrence(SoftmaxAttention(sizes.dim, sizes.heads), memory, sizes.dim, segment=SEGMENT)


def _rows(rows: int, numbers: int) -> Callable[[Sizes, int], int]:
    """So many rows beside those of the segment so far, and so many numbers."""
    return lambda sizes, tokens: FLOAT_BYTES * ((SEGMENT - 1 + rows) * sizes.dim + numbers)


ENTRIES = (
    Entry(
        "titans", "titans", "arXiv 2501.00663", CROSSES.format(", momentum"),
        lambda sizes: memories.titans(sizes.dim, sizes.heads), _weights(3), scans=SCANS, recalls=True,
    ),
    Entry(
        "titans_mag", "MAG", "arXiv 2501.00663", WITH_WINDOW,
        lambda sizes: MAG(sizes.dim, sizes.heads, window=WINDOW), _with_window, TRANSPORTS, SCANS, recalls=True,
    ),
    Entry(
        "titans_mal", "MAL", "arXiv 2501.00663", WITH_WINDOW,
        lambda sizes: MAL(sizes.dim, sizes.heads, window=WINDOW), _with_window, TRANSPORTS, SCANS, recalls=True,
    ),
    Entry(
        "titans_mac", "MAC", "arXiv 2501.00663",
        "weights, those of two starts, momentum; rows of the segment; 3 rows before convolutions",
        lambda sizes: MAC(sizes.dim, sizes.heads, segment=SEGMENT), _with_segment, scans=SCANS, recalls=True,
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
    Entry(
        "atlas_plus", "atlas_plus", "arXiv 2505.23735", CROSSES.format(", momentum, a window's keys and values"),
        lambda sizes: memories.atlas_plus(sizes.dim, sizes.heads), _weights(3, 15, 3), scans=SCANS, recalls=True,
    ),
    Entry(
        "dla", "deep_linear", "arXiv 2505.23735", CROSSES.format(""),
        lambda sizes: memories.deep_linear(sizes.dim, sizes.heads), _weights(2), scans=SCANS, recalls=True,
    ),
    Entry(
        "swla", "SWLA", "arXiv 2505.23735", "one state; keys, values and gates of a window, 3 rows before",
        lambda sizes: SWLA(sizes.dim, sizes.heads, window=16), _swla, recalls=True,
    ),
    Entry(
        "rmt", "RecurrentLayer", "arXiv 2207.06881", "memory tokens; the rows of the segment so far",
        lambda sizes: _segments(sizes, RecurrentTokens(sizes.dim, SLOTS)), _rows(SLOTS, 1), scans=SCANS,
    ),
    Entry(
        "hmt", "RecurrentLayer", "arXiv 2405.06067", "memories of segments, a summary, some rows; the segment so far",
        lambda sizes: _segments(sizes, HierarchicalMemory(sizes.dim, MEMORIES, KEPT)),
        _rows(MEMORIES + KEPT + 1, 2), scans=SCANS,
    ),
)  # fmt: skip
