"""A small decoder of linear and softmax attention: the hybrid of LASP-2H (Sun et al. 2025, arXiv 2502.07563)."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from seqpar.cut import Cut
from seqpar.layers import GLA, Block, LightningAttention, LinearAttention, Retention, RMSNorm, SoftmaxAttention
from seqpar.layers.checks import one_of, positive
from seqpar.layers.linear_attention import FEATURE_MAPS


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


class HybridLM(nn.Module):
    """Embedding, blocks, norm and head: predicts the next token of every document.

    ``forward(tokens, cut)``: ``tokens [b, t]`` int64 are mine; returns logits ``[b, t, vocabulary]``. Law: under any
    cut the ranks' logits, put together, are those of one device.

    Initialisation is GPT-2's: matrices and embedding normal with standard deviation 0.02; those that write into the
    residual stream divided by ``sqrt(2 layers)``, so that its variance does not grow with depth; biases 0, norms 1.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(_block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)
        for name, module in self.named_modules():
            _initialise(name, module, config.layers)

    def hidden(self, tokens: Tensor, cut: Cut) -> Tensor:
        """What the head reads, ``[b, t, dim]``: for losses that never hold all logits."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cut)
        return self.norm(x)

    def forward(self, tokens: Tensor, cut: Cut) -> Tensor:
        return self.head(self.hidden(tokens, cut))


def _block(config: HybridConfig, layer: int) -> Block:
    mixer = _softmax(config) if config.is_softmax(layer) else MIXERS[config.mixer](config, layer)
    hidden = -(-round(config.dim * config.mlp_ratio) // 8) * 8
    return Block(config.dim, mixer, hidden, checkpoint=config.checkpoint, mlp_tokens=config.mlp_tokens)


def _initialise(name: str, module: nn.Module, layers: int) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        writes_residual = name.endswith(("mixer.out", "mlp.down"))
        nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if writes_residual else 0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
