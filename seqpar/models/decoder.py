"""Any stack of token mixers as one decoder, trained on whole documents or run token by token from its states."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from seqpar.layers.catalog import find
from seqpar.layers.entry import Sizes
from seqpar.layers.parts.block import Block
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.norm import RMSNorm
from seqpar.sharding.cut import Cut
from seqpar.sharding.states import States


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a :class:`Decoder`.

    ``pattern``: names of the catalog (``seqpar layers`` lists them), one per layer; the whole of it is repeated
    ``repeats`` times. ``mlp_ratio`` is the hidden dim of the feed-forward part over ``dim`` (rounded up to a multiple
    of 8), which works on ``mlp_tokens`` tokens at a time (0: all). Raises ``ValueError`` for what does not fit.
    """

    pattern: str = "gla gla gla softmax"
    repeats: int = 1
    vocabulary: int = 256
    dim: int = 128
    heads: int = 4
    mlp_ratio: float = 8 / 3
    checkpoint: bool = False
    mlp_tokens: int = 0

    def __post_init__(self) -> None:
        positive(vocabulary=self.vocabulary, repeats=self.repeats)
        if not self.pattern.split():
            raise ValueError("pattern must name at least one layer, such as 'gla gla gla softmax'")
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be above 0, got {self.mlp_ratio}")
        for name in self.pattern.split():
            if not find(name).causal:
                raise ValueError(f"{name} lets tokens see later ones, so a decoder of it would see what it predicts")

    @property
    def names(self) -> tuple[str, ...]:
        """What each layer is."""
        return tuple(self.pattern.split() * self.repeats)

    def mixers(self) -> list[nn.Module]:
        """A mixer for every layer."""
        count = len(self.names)
        return [find(name).make(Sizes(self.dim, self.heads, place, count)) for place, name in enumerate(self.names)]

    @property
    def hidden(self) -> int:
        """The hidden dim of the feed-forward parts."""
        return -(-round(self.dim * self.mlp_ratio) // 8) * 8


class Decoder(nn.Module):
    """Embedding, blocks, norm and head: predicts the next token of every document.

    ``forward(tokens, cut)``: ``tokens [b, t]`` int64 are mine; returns logits ``[b, t, vocabulary]``. Law: under any
    cut the ranks' logits, put together, are those of one device; and :meth:`step`, token by token, gives them, too.

    Initialisation is GPT-2's: matrices and embedding normal with standard deviation 0.02; those that write into the
    residual stream divided by ``sqrt(2 layers)``, so that its variance does not grow with depth; biases 0, norms 1.
    What a mixer initialises in its paper's own way (``mixer.own_initialisation``, names of modules), it keeps.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self._build(config.mixers(), config.vocabulary, config.dim, config.hidden, config.checkpoint, config.mlp_tokens)

    def _build(
        self, mixers: Sequence[nn.Module], vocabulary: int, dim: int, hidden: int, checkpoint: bool, mlp_tokens: int
    ) -> None:
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(
            Block(dim, mixer, hidden, checkpoint=checkpoint, mlp_tokens=mlp_tokens) for mixer in mixers
        )
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        initialise(self, len(mixers))

    def hidden(self, tokens: Tensor, cut: Cut) -> Tensor:
        """What the head reads, ``[b, t, dim]``: for losses that never hold all logits."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cut)
        return self.norm(x)

    def forward(self, tokens: Tensor, cut: Cut) -> Tensor:
        return self.head(self.hidden(tokens, cut))

    def step(self, tokens: Tensor, states: States) -> tuple[Tensor, States]:
        """Logits ``[b, vocabulary]`` after one more token each, ``tokens [b]``, and the states for the next step.

        Begin with ``States()``, or with the :meth:`~seqpar.sharding.states.States.next` of a prefill.
        """
        logits = self(tokens[:, None], Cut.whole([1], states))
        return logits[:, 0], states.next(1)


def initialise(model: nn.Module, layers: int) -> None:
    """GPT-2's initialisation; see :class:`Decoder`."""
    kept = tuple(
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        for own in getattr(module, "own_initialisation", ())
    )
    for name, module in model.named_modules():
        if name not in kept:
            _initialise(name, module, layers)


def _initialise(name: str, module: nn.Module, layers: int) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        writes_residual = name.endswith(("mixer.out", "mlp.down"))
        nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if writes_residual else 0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
