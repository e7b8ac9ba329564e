"""The battery's rows of ``catalog_memory``: small layers and their oracles; chunks end within shards and at cuts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from seqpar.layers.attention.softmax_attention import SoftmaxAttention
from seqpar.layers.memory import neural_memory as memories
from seqpar.layers.memory.mac import MAC
from seqpar.layers.memory.neural_memory import NeuralMemory
from seqpar.layers.memory.segments import HierarchicalMemory, RecurrentTokens, segment_recurrence
from seqpar.layers.memory.swla import SWLA
from seqpar.layers.memory.titans import MAG, MAL
from tests.layers.oracles.oracles_memory import memory_layer, swla_layer
from tests.layers.oracles.oracles_segments import hmt_layer, rmt_layer
from tests.layers.oracles.oracles_titans import mac_layer, mag_layer, mal_layer
from tests.layers.rows.row import Row


def calm(
    make: Callable[..., NeuralMemory], step: float = -3.0, third: float = 0.0, **options: Any
) -> Callable[[], NeuralMemory]:
    """A memory of width 8 whose steps are small: it learns, but a rounding at its start is no other memory at its
    end. ``third``: where the gate after that of the step begins."""

    def made() -> NeuralMemory:
        layer = make(8, 2, **options)
        gates, each = (layer.gates if options.get("channel_gates", 0) == 0 else layer.gates[1]), layer.counts[0]
        with torch.no_grad():
            gates.bias.view(2, -1)[:, each : 2 * each] = step
            gates.bias.view(2, -1)[:, 2 * each :] += third
            gates.weight.mul_(0.5)
        return layer

    return made


def own(chunk: int) -> NeuralMemory:
    """Titans' memory within another layer."""
    return calm(memories.titans, chunk=chunk)()


def segments(memory: Callable[[], nn.Module], segment: int = 4, bptt_depth: int = 0) -> Callable[[], nn.Module]:
    """Softmax attention in segments."""
    return lambda: segment_recurrence(
        SoftmaxAttention(8, 2), memory(), 8, segment=segment, bptt_depth=bptt_depth
    )  # fmt: skip


ROWS: dict[str, Row] = {
    "titans": Row("titans", calm(memories.titans, chunk=4), memory_layer, dim=8),
    "titans, loop, three matrices": Row(
        "titans", calm(memories.titans, chunk=3, depth=3, closed=False), memory_layer, dim=8, nightly=True
    ),
    "titans mag": Row("titans_mag", lambda: MAG(8, 2, window=6, persistent=2, memory=own(4)), mag_layer, dim=8),
    "titans mal": Row(
        "titans_mal", lambda: MAL(8, 2, window=6, persistent=2, memory=own(4)), mal_layer, dim=8, nightly=True
    ),
    "titans mac": Row("titans_mac", lambda: MAC(8, 2, segment=6, persistent=2, memory=own(3)), mac_layer, dim=8),
    "moneta": Row("moneta", calm(memories.moneta, -6.0, chunk=4), memory_layer, dim=8, nightly=True),
    "yaad": Row("yaad", calm(memories.yaad, -4.0, chunk=4), memory_layer, dim=8),
    "yaad, within its bound": Row("yaad", calm(memories.yaad, -6.0, 4.0, chunk=4), memory_layer, dim=8, nightly=True),
    "memora": Row("memora", calm(memories.memora, -6.0, chunk=3), memory_layer, dim=8, nightly=True),
    "omeganet": Row("omeganet", calm(memories.omeganet, chunk=4, window=6), memory_layer, dim=8),
    "atlas": Row("atlas", calm(memories.atlas, chunk=3, window=2), memory_layer, dim=8),
    "atlas plus": Row("atlas_plus", calm(memories.atlas_plus, chunk=3, window=2), memory_layer, dim=8, nightly=True),
    "atlas plus, no muon": Row(
        "atlas_plus", calm(memories.atlas_plus, chunk=4, window=3, muon=False), memory_layer, dim=8, nightly=True
    ),
    "dla": Row("dla", calm(memories.deep_linear, chunk=4), memory_layer, dim=8, nightly=True),
    "dla, one matrix, window": Row(
        "dla", calm(memories.deep_linear, chunk=4, window=3, depth=1), memory_layer, dim=8, nightly=True
    ),
    "titans, four matrices": Row("titans", calm(memories.titans, chunk=4, depth=4), memory_layer, dim=8, nightly=True),
    "moneta, gates of channels": Row(
        "moneta", calm(memories.moneta, -6.0, chunk=4, channel_gates=3), memory_layer, dim=8, nightly=True
    ),
    "yaad, gates of channels": Row(
        "yaad", calm(memories.yaad, -4.0, chunk=4, channel_gates=3), memory_layer, dim=8, nightly=True
    ),
    "swla": Row("swla", lambda: SWLA(8, 2, window=3), swla_layer, dim=8),
    "rmt": Row("rmt", segments(lambda: RecurrentTokens(8, 2), 8), rmt_layer, dim=8, nightly=True),
    "rmt, gradients of two segments": Row(
        "rmt",
        segments(lambda: RecurrentTokens(8, 2), 3, 2),
        rmt_layer,
        dim=8,
        remembers=False,
    ),
    "hmt": Row("hmt", segments(lambda: HierarchicalMemory(8, 3, 2)), hmt_layer, dim=8),
}
