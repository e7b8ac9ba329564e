"""The battery's rows of ``catalog_memory``: small layers and their oracles; chunks end within shards and at cuts."""

from collections.abc import Callable
from typing import Any

import torch

from seqpar.layers.memory import neural_memory as memories
from seqpar.layers.memory.mac import MAC
from seqpar.layers.memory.neural_memory import NeuralMemory
from seqpar.layers.memory.titans import MAG, MAL
from tests.layers.oracles.oracles_memory import memory_layer
from tests.layers.oracles.oracles_titans import mac_layer, mag_layer, mal_layer
from tests.layers.rows.row import Row


def calm(
    make: Callable[..., NeuralMemory], step: float = -3.0, third: float = 0.0, **options: Any
) -> Callable[[], NeuralMemory]:
    """A memory of width 8 whose steps are small: it learns, but a rounding at its start is no other memory at its
    end. ``third``: where the gate after that of the step begins."""

    def made() -> NeuralMemory:
        layer = make(8, 2, **options)
        with torch.no_grad():
            layer.gates.bias.view(2, -1)[:, 1] = step
            layer.gates.bias.view(2, -1)[:, 2:] += third
            layer.gates.weight.mul_(0.5)
        return layer

    return made


def own(chunk: int) -> NeuralMemory:
    """Titans' memory within another layer."""
    return calm(memories.titans, chunk=chunk)()


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
    "omeganet, one matrix, dot": Row(
        "omeganet", calm(memories.deep_linear, chunk=4, window=3, depth=1), memory_layer, dim=8, nightly=True
    ),
    "atlas": Row("atlas", calm(memories.atlas, chunk=3, window=2), memory_layer, dim=8),
}
