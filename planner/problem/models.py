"""Cost models computed from a model's shape and a GPU's data sheet, for what nobody has measured yet.

Attention over s tokens costs ``s^2``; everything else, linear-attention layers included, costs s. The all-to-all of a
softmax layer carries its activations; a linear-attention layer sends one state a head, whatever the length. The figures
are estimates: a fraction of the peak is taken as reached (``EFFICIENCY``), and a few milliseconds a layer and
collective as fixed. Fit a model from timed steps where plans matter.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from seqpar.planner.problem.problem import ALL_TO_ALL, RING, Cluster, CostModel, GroupKind
from seqpar.planner.problem.words import pick

EFFICIENCY = 0.45
_GIB = 2**30
_BACKWARD = 3  # forward and backward, in units of forward
_BYTES = 2  # bf16
_STATE_BYTES = 16  # a parameter with its gradient and Adam state, cut over all devices
_FREE = 0.9  # of a device's memory, for the plan; the rest is fragmentation and the framework
_LATENCY_SECONDS = 20e-6
_LAUNCH_SECONDS = 1.5e-3  # a layer and micro-batch: gathering weights and starting kernels


@dataclass(frozen=True)
class Gpu:
    """A row of data sheets: memory, bf16 peak without sparsity, and bandwidth of one device in and between nodes."""

    memory_bytes: int
    flops_per_second: float
    node_bytes_per_second: float
    network_bytes_per_second: float


@dataclass(frozen=True)
class Decoder:
    """The shape of a decoder. ``softmax_layers`` attend to all tokens; the other layers pass a state on.

    ``state_bytes``: what all of those together send over a cut; None: a square fp32 state for each head of each.
    ``gated``: a feed-forward of three matrices (SwiGLU), else of two.
    """

    layers: int
    softmax_layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    state_bytes: float | None = None
    gated: bool = True

    @property
    def feed_forward(self) -> int:
        """Matrices of the feed-forward, each ``hidden`` by ``ffn``; as many activations of ``ffn`` lie between them."""
        return 3 if self.gated else 2

    @property
    def sent_bytes(self) -> float:
        """What the layers that pass a state on send over a cut, all together."""
        square = 4 * self.heads * self.head_dim**2
        return (self.layers - self.softmax_layers) * square if self.state_bytes is None else self.state_bytes

    @property
    def parameters(self) -> float:
        """Weights, embeddings counted once for each end."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.key_value_heads)
        layer = attention + self.feed_forward * self.hidden * self.ffn
        return self.layers * layer + 2 * self.vocabulary * self.hidden


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "A100-40G": Gpu(40 * _GIB, 312e12, 300e9, 25e9),
        "A100-80G": Gpu(80 * _GIB, 312e12, 300e9, 25e9),
        "A800-80G": Gpu(80 * _GIB, 312e12, 200e9, 25e9),
        "H100-80G": Gpu(80 * _GIB, 989e12, 450e9, 50e9),
        "H200-141G": Gpu(141 * _GIB, 989e12, 450e9, 50e9),
        "B200-180G": Gpu(180 * _GIB, 2250e12, 900e9, 50e9),
    }
)
# The names and shapes of the swap planner, and two whose layers pass a state on (tests hold them equal).
DECODERS: Mapping[str, Decoder] = MappingProxyType(
    {
        "gpt-7b": Decoder(32, 32, 4096, 32, 32, 128, 16_384, 50_257, gated=False),
        "gpt-13b": Decoder(40, 40, 5120, 40, 40, 128, 20_480, 50_257, gated=False),
        "gpt-30b": Decoder(48, 48, 7168, 56, 56, 128, 28_672, 50_257, gated=False),
        "gpt-65b": Decoder(80, 80, 8192, 64, 64, 128, 32_768, 50_257, gated=False),
        "llama-1b": Decoder(16, 16, 2048, 32, 8, 64, 8192, 128_256),
        "llama-8b": Decoder(32, 32, 4096, 32, 8, 128, 14_336, 128_256),
        "llama-70b": Decoder(80, 80, 8192, 64, 8, 128, 28_672, 128_256),
        "hybrid-8b": Decoder(32, 8, 4096, 32, 8, 128, 14_336, 128_256),
        "linear-8b": Decoder(32, 0, 4096, 32, 32, 128, 14_336, 128_256),
    }
)


def gpu_names() -> tuple[str, ...]:
    """GPUs that ``analytic_cluster`` knows."""
    return tuple(GPUS)


def model_names() -> tuple[str, ...]:
    """The decoders that are known by name."""
    return tuple(DECODERS)


def analytic_cluster(devices: int, gpu: str, devices_per_node: int = 8) -> Cluster:
    """So many of a GPU, with most of each one's memory to plan with."""
    gpu = pick("GPU", gpu, GPUS)
    return Cluster(f"{devices}x{gpu}", devices, min(devices, devices_per_node), int(GPUS[gpu].memory_bytes * _FREE))


def analytic_costs(
    name: str, model: Decoder, gpu: str, cluster: Cluster, network_bytes_per_second: float | None = None
) -> CostModel:
    """What a decoder of this shape costs on a cluster of this GPU.

    Degrees are all that divide the heads of the softmax layers and fit the nodes, powers of two or not; each over
    all-to-all and, with softmax layers, over the ring. Activations are recomputed, so a token keeps its inputs of all
    layers and the working set of one. ``network_bytes_per_second``: of one device between nodes, if it is not the
    data sheet's.
    """
    row = GPUS[pick("GPU", gpu, GPUS)]
    if network_bytes_per_second is not None:
        row = replace(row, network_bytes_per_second=network_bytes_per_second)
    kinds = tuple(_kind(model, row, cluster, degree, transport) for degree, transport in _degrees(model, cluster))
    kept = model.layers * model.hidden * _BYTES
    working = (6 * model.hidden + model.feed_forward * model.ffn) * _BYTES + 2 * _BYTES * model.vocabulary
    return CostModel(name, kinds, float(kept + working), model.parameters * _STATE_BYTES / cluster.devices)


def _degrees(model: Decoder, cluster: Cluster) -> Iterator[tuple[int, str]]:
    """Degrees that the heads allow over all-to-all; the ring, and linear layers alone, take any that has a place."""
    yield 1, "none"
    dividing = {degree for degree in range(2, model.heads + 1) if model.heads % degree == 0}
    for degree in sorted(dividing | _round(cluster.devices)):
        if not cluster.stride(degree):
            continue
        if not model.softmax_layers:
            yield degree, "scan"
            continue
        if degree in dividing:
            yield degree, ALL_TO_ALL
        yield degree, RING


def _round(most: int) -> set[int]:
    """2, 3, 4, 6, 8, 12, ...: enough to choose from."""
    return {odd << power for odd in (1, 3) for power in range(most.bit_length())} - {1}


def _kind(model: Decoder, gpu: Gpu, cluster: Cluster, degree: int, transport: str) -> GroupKind:
    speed = gpu.flops_per_second * EFFICIENCY * degree
    bandwidth = gpu.node_bytes_per_second if degree <= cluster.devices_per_node else gpu.network_bytes_per_second
    width = model.heads * model.head_dim
    quadratic = _BACKWARD * 2 * model.softmax_layers * width / speed  # causal: half of 4 s^2 width
    weights = model.parameters - model.vocabulary * model.hidden
    linear = _BACKWARD * 2 * weights / speed
    message = hidden = 0.0
    if transport == ALL_TO_ALL:
        values = model.softmax_layers * 2 * (width + model.key_value_heads * model.head_dim)
        message = _BACKWARD * _BYTES * values * (degree - 1) / degree**2 / bandwidth
    elif transport == RING:
        values = model.softmax_layers * 2 * model.key_value_heads * model.head_dim
        message = _BACKWARD * _BYTES * values * (degree - 1) / degree / bandwidth
        hidden = quadratic * (degree - 1) / degree  # a block travels while the block before it is worked on
    return GroupKind(
        degree=degree,
        transport=transport,
        quadratic_seconds=quadratic,
        linear_seconds=linear,
        fixed_seconds=_LAUNCH_SECONDS * model.layers,
        message_seconds=message,
        hidden_seconds=hidden,
        latency_seconds=_latency(model, degree, transport, bandwidth),
    )


def _latency(model: Decoder, degree: int, transport: str, bandwidth: float) -> float:
    """What does not depend on tokens: a state for each linear layer and direction, and the start of each message."""
    if degree == 1:
        return 0.0
    passing = model.layers - model.softmax_layers
    states = 2 * (math.log2(degree) * model.sent_bytes / bandwidth + passing * _LATENCY_SECONDS)
    starts = 2 * model.softmax_layers * (4 if transport == ALL_TO_ALL else degree - 1) * _LATENCY_SECONDS
    return states + starts
