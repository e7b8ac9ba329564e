"""Decoders and GPUs by name, and the profile of a layer from its shape alone: no GPU, no model, no allocation.

Skeletal activations are counted as MEMO does (arXiv 2407.12117, figure 4): all that a layer's forward makes and its
backward needs, two bytes an element. A GPT layer saves 16 times tokens times width. Figures of GPUs are what training
achieves, not what a data sheet promises; a measured profile takes their place where there is one.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from seqpar.offload.planning.profile import LayerProfile, Machine, SavedTensor, effective_length

BACKWARD = 2.0  # backward by forward: two matrix products for each one of forward


@dataclass(frozen=True)
class Decoder:
    """The shape of a decoder; ``gated`` for a SwiGLU feed-forward (gate and up), else one projection and GeLU."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    gated: bool = False

    @property
    def kv_width(self) -> int:
        """Width of the keys of one token, and of its values."""
        return self.width // self.heads * self.kv_heads

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrix products of one layer: 12 h^2 for GPT, 13 h^2 for Llama-8B."""
        attention = 2 * self.width * (self.width + self.kv_width)
        return attention + (3 if self.gated else 2) * self.width * self.ffn


@dataclass(frozen=True)
class Gpu:
    """One GPU: ``flops_per_second`` that a dense training step achieves in bf16, its own memory and the host link.

    ``link_bytes_per_second`` is one way with pinned memory; ``memory_bytes_per_second`` is the data sheet's.
    """

    name: str
    flops_per_second: float
    link_bytes_per_second: float
    memory_bytes_per_second: float
    memory_bytes: float


# Vocabulary 50257 and feed-forward 4h as in MEMO's table 2.
DECODERS = (
    Decoder("gpt-7b", 32, 4096, 32, 32, 16384, 50257),
    Decoder("gpt-13b", 40, 5120, 40, 40, 20480, 50257),
    Decoder("gpt-30b", 48, 7168, 56, 56, 28672, 50257),
    Decoder("gpt-65b", 80, 8192, 64, 64, 32768, 50257),
    Decoder("llama-1b", 16, 2048, 32, 8, 8192, 128256, gated=True),
    Decoder("llama-8b", 32, 4096, 32, 8, 14336, 128256, gated=True),
    Decoder("llama-70b", 80, 8192, 64, 8, 28672, 128256, gated=True),
)

# The A800's link is what MEMO's own 192K implies at its 52.3% of 312 TFLOP/s: eight GPUs share switches and host.
# The B200 is taken to achieve the same share of its peak as the H100.
GPUS = (
    Gpu("A100-40G", 170e12, 25e9, 1.555e12, 40e9),
    Gpu("A100-80G", 170e12, 25e9, 2.04e12, 80e9),
    Gpu("A800-80G", 163e12, 10.6e9, 2.04e12, 80e9),
    Gpu("H100-80G", 450e12, 50e9, 3.35e12, 80e9),
    Gpu("H200-141G", 450e12, 50e9, 4.8e12, 141e9),
    Gpu("B200-180G", 1020e12, 50e9, 8e12, 180e9),
)


def decoder(name: str) -> Decoder:
    """The decoder of this name, in any case or by its beginning; raises ``ValueError`` with the names that there are.

    Names are those of the planner's models, but for the ones in which layers pass a state on.
    """
    return {each.name: each for each in DECODERS}[_pick("model", name, [each.name for each in DECODERS])]


def gpu(name: str) -> Gpu:
    """The GPU of this name, in any case or by its beginning; raises ``ValueError`` with the names that there are."""
    return {each.name: each for each in GPUS}[_pick("GPU", name, [each.name for each in GPUS])]


def profile_of(
    decoder: Decoder,
    tokens: int,
    devices: int,
    gpu: Gpu,
    *,
    lengths: Sequence[int] | None = None,
    resident_bytes: float = 0.0,
) -> LayerProfile:
    """The profile of one layer with a sequence of ``tokens`` cut over ``devices``.

    Forward takes (2 c S h^2 + 2 S^2 h) / (P R) with c h^2 the layer's weights, backward twice that. ``lengths`` are
    the documents of a packed batch: their sum is ``tokens``, and sum(s^2)/sum(s) stands for S in the attention.
    """
    for name, value in (("tokens", tokens), ("devices", devices)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is a whole number >= 1, got {value!r}")
    if lengths is not None and sum(lengths) != tokens:
        raise ValueError(f"the documents have {sum(lengths)} tokens in all, expected {tokens}")
    context = float(tokens) if lengths is None else effective_length(lengths)
    mine = -(-tokens // devices)
    attention = mine * 2 * context * decoder.width / gpu.flops_per_second
    forward = mine * 2 * decoder.layer_parameters / gpu.flops_per_second + attention
    return LayerProfile(tuple(_saved(decoder, gpu, context)), forward, BACKWARD * forward, mine, decoder.layers,
                        attention, context, resident_bytes)  # fmt: skip


def machine_of(
    gpu: Gpu,
    *,
    host_bytes: float = math.inf,
    devices_per_host: int = 8,
    pinned: str = "exact",
    cgroup_bytes: float = math.inf,
) -> Machine:
    """A host of these GPUs, each with its link's bandwidth in both directions."""
    link = gpu.link_bytes_per_second
    return Machine(link, link, host_bytes, gpu.memory_bytes, devices_per_host, cgroup_bytes, pinned)


def skeletal_bytes(decoder: Decoder, tokens: int) -> int:
    """What one layer saves of a whole sequence, over all devices: 128 GiB for gpt-7b at a million tokens."""
    return 2 * tokens * sum(width for _, width, *_ in _shapes(decoder))


def hides_from(units: float, decoder: Decoder, gpu: Gpu) -> float:
    """The length from which ``units`` times tokens times width leave within one layer's forward: k R/B - c h.

    At most 0 where they always do. It is the same for any number of devices.
    """
    per_width = gpu.flops_per_second / gpu.link_bytes_per_second
    return units * per_width - decoder.layer_parameters / decoder.width


def _shapes(decoder: Decoder) -> Iterator[tuple[str, int, int, str]]:
    """Saved tensors in the order of forward: name, width, multiply-adds to build a token's slice, and its kind."""
    width, kv, ffn = decoder.width, decoder.kv_width, decoder.ffn
    yield "input", width, 0, "swap"
    yield "attention_norm", width, 0, "elementwise"
    yield "query", width, width * width, "product"
    yield "key", kv, width * kv, "product"
    yield "value", kv, width * kv, "product"
    yield "attention", width, 0, "swap"
    yield "residual", width, width * width, "product"
    yield "mlp_norm", width, 0, "elementwise"
    if decoder.gated:
        yield "gate", ffn, width * ffn, "product"
    yield "up", ffn, width * ffn, "product"
    yield "activation", ffn, 0, "elementwise"


def _saved(decoder: Decoder, gpu: Gpu, context: float) -> Iterator[SavedTensor]:
    for name, width, products, kind in _shapes(decoder):
        flops = 2 * context * decoder.width if name == "attention" else 2.0 * products
        # Elementwise work reads and writes; the activation of a gated layer reads two.
        reads = 2 if name == "activation" and decoder.gated else 1
        moved = 2 * width * (reads + 1) if kind == "elementwise" else 0
        seconds = flops / gpu.flops_per_second + moved / gpu.memory_bytes_per_second
        yield SavedTensor(name, 2.0 * width, seconds, must_swap=kind == "swap", elementwise=kind == "elementwise")


def _pick(what: str, name: str, known: Sequence[str]) -> str:
    """As the planner's ``pick``, which this room does not know; a test holds them equal."""
    small, shown = name.strip().lower(), repr(name if len(name) <= 60 else f"{name[:60]}...")
    found = [each for each in known if each.lower() == small]
    found = found or [each for each in known if small and each.lower().startswith(small)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{what} {shown} may be {' or '.join(found)}: say which")
    cased = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name[:100].lower(), list(cased), n=1)
    meant = f", did you mean {cased[close[0]]!r}?" if close else ""
    raise ValueError(f"no {what} {shown}{meant}; known are {', '.join(known)}")
