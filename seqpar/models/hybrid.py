"""A small decoder of linear and softmax attention: the hybrid of LASP-2H (Sun et al. 2025, arXiv 2502.07563)."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from seqpar.layers import GLA, LightningAttention, LinearAttention, Retention, SoftmaxAttention
from seqpar.layers.linear.linear_attention import FEATURE_MAPS
from seqpar.layers.parts.checks import one_of, positive
from seqpar.models.decoder import Decoder, DecoderConfig


@dataclass(frozen=True)
class HybridConfig:
    """The sizes of a :class:`HybridLM`.

    Every ``softmax_every``-th layer is softmax attention, the others are ``mixer``: 4 is the 1/4 hybrid of the paper, 1
    is a plain Transformer, 0 has linear layers only. ``feature_map`` is that of linear attention; ``window`` limits
    softmax attention; ``mlp_ratio`` is the hidden dim of the feed-forward part over ``dim`` (rounded up to a multiple
    of 8), which works on ``mlp_tokens`` tokens at a time (0: all). Raises ``ValueError`` for what does not fit.
    """

    vocabulary: int = 256
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    softmax_every: int = 4
    mixer: str = "linear_attention"
    feature_map: str = "elu_plus_one"
    window: int | None = None
    mlp_ratio: float = 8 / 3
    rope_base: float = 10000.0
    checkpoint: bool = False
    mlp_tokens: int = 0

    def __post_init__(self) -> None:
        positive(vocabulary=self.vocabulary, layers=self.layers)
        one_of("mixer", self.mixer, MIXERS)
        one_of("feature_map", self.feature_map, FEATURE_MAPS)
        if self.softmax_every < 0:
            raise ValueError(f"softmax_every must not be negative, got {self.softmax_every}")
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be above 0, got {self.mlp_ratio}")

    @property
    def names(self) -> tuple[str, ...]:
        """What each layer is."""
        return tuple("softmax" if self.is_softmax(layer) else self.mixer for layer in range(self.layers))

    def is_softmax(self, layer: int) -> bool:
        """Whether ``layer`` (from 0) is softmax attention."""
        return self.softmax_every > 0 and (layer + 1) % self.softmax_every == 0


def _linear(config: HybridConfig, layer: int) -> nn.Module:
    return LinearAttention(config.dim, config.heads, feature_map=config.feature_map)


def _lightning(config: HybridConfig, layer: int) -> nn.Module:
    return LightningAttention(config.dim, config.heads, layer=layer, layers=config.layers)


def _softmax(config: HybridConfig) -> nn.Module:
    return SoftmaxAttention(
        config.dim, config.heads, kv_heads=config.kv_heads, window=config.window, rope_base=config.rope_base
    )


MIXERS: MappingProxyType[str, Callable[[HybridConfig, int], nn.Module]] = MappingProxyType(
    {
        "linear_attention": _linear,
        "lightning_attention": _lightning,
        "retention": lambda config, layer: Retention(config.dim, config.heads, rope_base=config.rope_base),
        "gla": lambda config, layer: GLA(config.dim, config.heads),
    }
)


class HybridLM(Decoder):
    """A :class:`Decoder` of linear layers with softmax attention between them."""

    def __init__(self, config: HybridConfig) -> None:
        nn.Module.__init__(self)
        mixers = [
            _softmax(config) if config.is_softmax(layer) else MIXERS[config.mixer](config, layer)
            for layer in range(config.layers)
        ]
        hidden = -(-round(config.dim * config.mlp_ratio) // 8) * 8
        self._build(mixers, config.vocabulary, config.dim, hidden, config.checkpoint, config.mlp_tokens)


def build(config: HybridConfig | DecoderConfig) -> Decoder:
    """The decoder of either kind of config."""
    return HybridLM(config) if isinstance(config, HybridConfig) else Decoder(config)
