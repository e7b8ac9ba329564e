"""A dry run of a training step's memory: what fills each device and the host, and what swapping would cost.

State (parameters, gradients, optimizer) is cut over all devices; activations are those of the sequence's shard. Saved
activations and swap plans come from ``seqpar.offload.plan_swap``, transients from a trace of one layer of this library
on fake tensors, placed by ``seqpar.offload.place``. No GPU is needed, and nothing is allocated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.layers import RMSNorm, SoftmaxAttention
from seqpar.layers.parts.mlp import SwiGLU
from seqpar.offload.placement.buffers import Buffer, Placement
from seqpar.offload.placement.place import place
from seqpar.offload.planning.decoders import Decoder, Gpu, machine_of, profile_of, skeletal_bytes
from seqpar.offload.planning.plan import SwapPlan
from seqpar.offload.planning.swap_plan import Compared, compare
from seqpar.offload.trace import Trace, TracedBuffer, trace
from seqpar.sharding.cut import Cut

STRATEGIES: Mapping[str, str] = MappingProxyType(
    {"auto": "auto", "memo": "memo", "recompute": "recompute", "input": "input_only", "none": "keep"}
)
LOSS_TOKENS = 1024  # logits that are there at a time
_STATE = MappingProxyType({"parameters": 2, "gradients": 2, "optimizer": 12})  # bytes each; fp32 weights and moments
_PEAK_FLOPS = MappingProxyType({"H100": 989e12, "H200": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12})
_LARGE = 1 << 20  # smaller buffers are left out of the address plan


@dataclass(frozen=True)
class DryRun:
    """What one step of a decoder needs on one device and its host, by strategy.

    ``categories``: bytes of one device at its peak under the chosen strategy. ``layer``: the buffers of one layer's
    forward and backward pass, and ``addresses`` where its large transients go.
    """

    decoder: Decoder
    gpu: Gpu
    tokens: int
    devices: int
    chosen: SwapPlan | None
    compared: tuple[Compared, ...]
    categories: Mapping[str, int]
    layer: Trace
    addresses: Placement

    @property
    def skeletal_bytes(self) -> int:
        """What one layer saves of the whole sequence, over all devices."""
        return skeletal_bytes(self.decoder, self.tokens)

    @property
    def mfu(self) -> float:
        """Model FLOP/s of the layers over the data sheet's, recomputation not counted as work."""
        assert self.chosen is not None
        mine = -(-self.tokens // self.devices)
        work = 3 * 2 * mine * self.decoder.layers * (self.decoder.layer_parameters + self.tokens * self.decoder.width)
        return work / self.chosen.step_seconds / _PEAK_FLOPS[self.gpu.name.partition("-")[0]]

    @property
    def limit(self) -> str:
        """What stands in the way, in words."""
        if self.chosen is None:
            return next(each.refused for each in self.compared if each.plan is None)
        return ", ".join(self.chosen.binds) or "nothing"


def dry_run(
    decoder: Decoder, gpu: Gpu, tokens: int, devices: int, *, strategy: str, host_bytes: float, devices_per_host: int
) -> DryRun:
    """Plan the memory of one step with a sequence of ``tokens`` cut over ``devices``.

    ``host_bytes`` are shared by ``devices_per_host`` devices. Raises ``ValueError`` for numbers below 1.
    """
    for name, value in (("tokens", tokens), ("devices", devices), ("devices per host", devices_per_host)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    mine = -(-tokens // devices)
    layer = trace(lambda: _layer(decoder, mine))
    addresses = place(_large(layer), seconds=10.0)
    fixed = {
        **{name: math.ceil(parameters(decoder) * each / devices) for name, each in _STATE.items()},
        "transient": addresses.peak + 2 * 4 * min(mine, LOSS_TOKENS) * decoder.vocabulary,
        "communication": _communication(decoder, mine, devices),
    }
    profile = profile_of(decoder, tokens, devices, gpu, resident_bytes=float(sum(fixed.values())))
    machine = machine_of(gpu, host_bytes=host_bytes, devices_per_host=min(devices, devices_per_host))
    compared = compare(profile, machine)
    chosen = next(each.plan for each in compared if each.strategy == STRATEGIES[strategy])
    saved = 0 if chosen is None else chosen.device_peak_bytes - sum(fixed.values())
    categories = MappingProxyType({**fixed, "saved": saved})
    return DryRun(decoder, gpu, tokens, devices, chosen, compared, categories, layer, addresses)


def parameters(decoder: Decoder) -> int:
    """Weights of all layers, and embeddings at both ends."""
    return decoder.layers * decoder.layer_parameters + 2 * decoder.vocabulary * decoder.width


def _communication(decoder: Decoder, tokens: int, devices: int) -> int:
    """Two layers' gathered weights, and in a ring one block of keys and values that comes and one that goes."""
    if devices == 1:
        return 0
    return 2 * 2 * decoder.layer_parameters + 2 * 2 * 2 * tokens * decoder.kv_width


def large_transients(layer: Trace) -> tuple[TracedBuffer, ...]:
    """What lives within one pass of a layer, without what is too small to matter."""
    return tuple(each for each in layer.buffers if each.kind == "transient" and each.buffer.size >= _LARGE)


def _large(layer: Trace) -> tuple[Buffer, ...]:
    return tuple(each.buffer for each in large_transients(layer))


class _Layer(nn.Module):
    """One layer of a decoder of this shape, built from the layers of this library."""

    def __init__(self, shape: Decoder) -> None:
        super().__init__()
        self.mixer_norm, self.mlp_norm = RMSNorm(shape.width), RMSNorm(shape.width)
        self.mixer = SoftmaxAttention(shape.width, shape.heads, kv_heads=shape.kv_heads)
        self.mlp = SwiGLU(shape.width, shape.ffn) if shape.gated else _Gelu(shape.width, shape.ffn)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), cut)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class _Gelu(nn.Module):
    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, ffn, bias=False), nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.gelu(self.up(x)))
        return y


def _layer(shape: Decoder, tokens: int) -> "tuple[nn.Module, _Step]":
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # fake tensors cannot be converted later
    try:
        module = _Layer(shape)
        x = torch.zeros(1, tokens, shape.width, requires_grad=True)
    finally:
        torch.set_default_dtype(before)
    return module, _Step(module, x)


@dataclass(frozen=True)
class _Step:
    """Forward and backward of one layer, alone with its tokens."""

    module: nn.Module
    x: Tensor

    def __call__(self) -> None:
        y = self.module(self.x, Cut.whole([self.x.shape[1]]))
        y.backward(torch.ones_like(y))
