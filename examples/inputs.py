"""Models that read more than one row of tokens: encoders and decoders, masked tokens, images, padded batches.

What a wrapped model is called with by name goes to its forward: ``[b, s, ...]`` is cut like the tokens, a
``seqpar.Packed`` is cut along documents of its own, and the rest goes through.
"""

import torch
from torch import Tensor, nn

from seqpar import Cut, CutSequence, attention
from seqpar.layers import SoftmaxAttention
from seqpar.models import Decoder, DecoderConfig


class CrossAttention(nn.Module):
    """Each token looks at all tokens of its document in another sequence."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, cut: Cut, source: CutSequence) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.q(x), *self.kv(source.x).chunk(2, -1)))
        here = {"shard": cut.shard, "group": cut.group, "slot": cut.slot(self), "transport": cut.transport}
        return x + self.out(attention(q, k, v, key_shard=source.cut.shard, causal=False, **here).flatten(2))


class EncoderDecoder(nn.Module):
    """``model(tokens, labels=labels, lengths=lengths, source=Packed(source, source_lengths))``."""

    def __init__(self, words: int, dim: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(words, dim), nn.Linear(dim, words)
        self.encoder = SoftmaxAttention(dim, heads, causal=False)
        self.decoder, self.cross = SoftmaxAttention(dim, heads), CrossAttention(dim, heads)

    def forward(self, tokens: Tensor, cut: Cut, source: CutSequence) -> Tensor:
        read = self.embedding(source.x)
        read = read + self.encoder(read, source.cut)
        x = self.embedding(tokens)
        x = self.cross(x + self.decoder(x, cut), cut, CutSequence(read, source.cut))
        return self.head(x)


class MaskedModel(nn.Module):
    """Tokens see both sides: ``model(hidden, targets=targets)``, -100 where nothing is hidden."""

    def __init__(self, words: int, dim: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(words, dim), nn.Linear(dim, words)
        self.mixer = SoftmaxAttention(dim, heads, causal=False)

    def forward(self, tokens: Tensor, cut: Cut) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.mixer(x, cut))


class WithImages(nn.Module):
    """Embeddings of images stand where ``is_image [b, s]`` says: ``model(tokens, images=..., is_image=...)``."""

    def __init__(self, words: int, dim: int, heads: int) -> None:
        super().__init__()
        self.decoder = Decoder(DecoderConfig("softmax gla", vocabulary=words, dim=dim, heads=heads))

    def forward(self, tokens: Tensor, cut: Cut, images: Tensor, is_image: Tensor) -> Tensor:
        x = torch.where(is_image[..., None], images, self.decoder.embedding(tokens))
        for block in self.decoder.blocks:
            x = block(x, cut)
        return self.decoder.head(self.decoder.norm(x))
