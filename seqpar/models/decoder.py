"""Any stack of token mixers as one decoder, trained on whole documents or run token by token from its states."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from seqpar.collectives.group import where
from seqpar.layers.catalog import find
from seqpar.layers.entry import Sizes
from seqpar.layers.parts.block import Block
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.norm import RMSNorm, norm_of
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


@dataclass(frozen=True)
class Frame:
    """What stands around the blocks of a decoder that :meth:`Decoder.assembled` makes.

    ``norm`` and ``eps``: of the last norm (None: there is none). ``tied``: the head has the weights of the embedding.
    ``positions``: learned ones for so many positions of a document (0: none), counted from ``first_position`` (OPT: 2).
    ``embedding_scale`` and ``logit_scale`` multiply; ``logit_cap``: logits stay within it (``cap tanh(logit / cap)``).
    """

    vocabulary: int
    dim: int
    norm: str | None = "rms"
    eps: float = 1e-6
    tied: bool = False
    head_bias: bool = False
    positions: int = 0
    first_position: int = 0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None


class Head(nn.Linear):
    """Logits, scaled and capped, token by token."""

    def __init__(self, dim: int, vocabulary: int, *, bias: bool, scale: float, cap: float | None) -> None:
        super().__init__(dim, vocabulary, bias=bias)
        self.scale, self.cap = scale, cap

    def forward(self, input: Tensor) -> Tensor:
        logits = super().forward(input) * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap


class Decoder(nn.Module):
    """Embedding, blocks, norm and head: predicts the next token of every document.

    ``forward(tokens, cut)``: ``tokens [b, t]`` int64 are mine; returns logits ``[b, t, vocabulary]``. Law: under any
    cut the ranks' logits, put together, are those of one device; and :meth:`step`, token by token, gives them, too.

    Initialisation is GPT-2's: matrices and embedding normal with standard deviation 0.02; those that write into the
    residual stream divided by ``sqrt(2 layers)``, so that its variance does not grow with depth; biases 0, norms 1.
    What a mixer initialises in its paper's own way (``mixer.own_initialisation``, names of modules), it keeps.
    """

    positions: nn.Embedding | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self._build(config.mixers(), config.vocabulary, config.dim, config.hidden, config.checkpoint, config.mlp_tokens)

    def _build(
        self, mixers: Sequence[nn.Module], vocabulary: int, dim: int, hidden: int, checkpoint: bool, mlp_tokens: int
    ) -> None:
        self.embedding, self.positions = nn.Embedding(vocabulary, dim), None
        self.embedding_scale, self.first_position = 1.0, 0
        self.blocks = nn.ModuleList(
            Block(dim, mixer, hidden, checkpoint=checkpoint, mlp_tokens=mlp_tokens) for mixer in mixers
        )
        self.norm: nn.Module = RMSNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        initialise(self, len(mixers))

    @staticmethod
    def assembled(blocks: Sequence[nn.Module], frame: Frame) -> "Decoder":
        """A decoder of blocks that may all differ, called with the cut, for weights that come from elsewhere."""
        positive(vocabulary=frame.vocabulary, dim=frame.dim)
        decoder = Decoder.__new__(Decoder)
        nn.Module.__init__(decoder)
        decoder.embedding = nn.Embedding(frame.vocabulary, frame.dim)
        decoder.embedding_scale, decoder.first_position = frame.embedding_scale, frame.first_position
        learned = nn.Embedding(frame.positions + frame.first_position, frame.dim) if frame.positions else None
        decoder.positions = learned
        decoder.blocks = nn.ModuleList(blocks)
        decoder.norm = nn.Identity() if frame.norm is None else norm_of(frame.norm, frame.dim, frame.eps)
        how = {"bias": frame.head_bias, "scale": frame.logit_scale, "cap": frame.logit_cap}
        decoder.head = Head(frame.dim, frame.vocabulary, **how)  # type: ignore[arg-type]
        if frame.tied:
            decoder.head.weight = decoder.embedding.weight
        return decoder

    def hidden(self, tokens: Tensor, cut: Cut) -> Tensor:
        """What the head reads, ``[b, t, dim]``: for losses that never hold all logits."""
        x = self.embedding(tokens)
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        if self.positions is not None:
            x = x + self._placed(cut)
        for block in self.blocks:
            x = block(x, cut)
        return self.norm(x)

    def _placed(self, cut: Cut) -> Tensor:
        """Learned positions ``[t, dim]``; raises ``ValueError``, the same on every rank, if a document has too many."""
        assert self.positions is not None
        known, longest = self.positions.num_embeddings - self.first_position, max(cut.shard.lengths, default=0)
        if cut.states is not None and cut.shard.lengths:
            longest = max(longest, cut.shard.lengths[0] + max(cut.states.positions))
        if longest > known:
            raise ValueError(f"{where(cut.group)}: a document of {longest} tokens, but only {known} learned positions")
        placed: Tensor = self.positions(cut.positions.to(self.positions.weight.device) + self.first_position)
        return placed

    def forward(self, tokens: Tensor, cut: Cut) -> Tensor:
        return self.head(self.hidden(tokens, cut))

    def step(self, tokens: Tensor, states: States) -> tuple[Tensor, States]:
        """Logits ``[b, vocabulary]`` after one more token each, ``tokens [b]``, and the states for the next step.

        Begin with ``States()``, or with the :meth:`~seqpar.sharding.states.States.next` of a prefill; prompts of
        different lengths are prefilled each by itself, then :meth:`~seqpar.sharding.states.States.joined`.
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
