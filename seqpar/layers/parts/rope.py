"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), and the ways it is stretched to longer documents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from seqpar.collectives.planned import Planned


@dataclass(frozen=True)
class Rope:
    """Rotate pairs of channels by angles that grow with the position of each token.

    Law: the product of a rotated query and key depends on the distance of their positions only. Positions are those in
    the document, so they start at 0 in each and do not depend on how the sequence is cut.

    ``inv_freq``: the angle of each pair for one position; pairs are the first ``2 len(inv_freq)`` channels, the rest
    stay (partial rotation). ``factor`` weighs what is turned. ``interleaved``: channel 2i is paired with 2i + 1,
    otherwise i with ``i + len(inv_freq)``. The makers are those of published checkpoints. Angles are fp64.
    """

    inv_freq: tuple[float, ...]
    factor: float = 1.0
    interleaved: bool = False

    @staticmethod
    def plain(dim: int, base: float = 10000.0, *, interleaved: bool = False) -> "Rope":
        """``base**(-2 i / dim)``; a ``dim`` below that of a head rotates its first channels only."""
        if dim < 2 or dim % 2:
            raise ValueError(f"rotary positions need an even dim of at least 2, got {dim}")
        return Rope(tuple(base ** (-2 * i / dim) for i in range(dim // 2)), interleaved=interleaved)

    def scaled(self, factor: float) -> "Rope":
        """Positions divided by ``factor`` (position interpolation, arXiv 2306.15595)."""
        return self._with([freq / factor for freq in self.inv_freq])

    @staticmethod
    def dynamic(dim: int, base: float, factor: float, trained: int, tokens: int) -> "Rope":
        """A base that grows with documents of ``tokens`` tokens beyond the ``trained`` ones (dynamic NTK)."""
        tokens = max(tokens, trained)
        grown = (factor * tokens / trained - (factor - 1)) ** (dim / (dim - 2))
        return Rope.plain(dim, base * grown)

    def llama3(self, factor: float, low_freq_factor: float, high_freq_factor: float, trained: int) -> "Rope":
        """Long waves divided by ``factor``, short ones as they are, those between blended (Llama 3.1)."""

        def one(freq: float) -> float:
            turns = trained * freq / (2 * math.pi)
            smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
            smooth = min(max(smooth, 0.0), 1.0)
            return (1 - smooth) * freq / factor + smooth * freq

        return self._with([one(freq) for freq in self.inv_freq])

    @staticmethod
    def yarn(
        dim: int,
        base: float,
        factor: float,
        trained: int,
        *,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        mscale: float | None = None,
        mscale_all_dim: float | None = None,
        attention_factor: float | None = None,
        truncate: bool = True,
    ) -> "Rope":
        """YaRN (arXiv 2309.00071): a ramp over pairs from unchanged to interpolated, and a weight of what is turned."""

        def pair_of(turns: float) -> float:
            return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

        def weight(scale: float = 1.0) -> float:
            return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

        low, high = pair_of(beta_fast), pair_of(beta_slow)
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 * (low == high)
        plain, freqs = Rope.plain(dim, base), []
        for i, freq in enumerate(plain.inv_freq):
            ramp = min(max((i - low) / (high - low), 0.0), 1.0)
            freqs.append(freq / factor * ramp + freq * (1 - ramp))
        if attention_factor is None:
            both = mscale and mscale_all_dim
            attention_factor = weight(mscale or 1) / weight(mscale_all_dim or 1) if both else weight()
        return Rope(tuple(freqs), attention_factor)

    def longrope(
        self, factors: Sequence[float], factor: float, trained: int, attention_factor: float | None = None
    ) -> "Rope":
        """Each pair divided by its own factor (LongRoPE, arXiv 2402.13753): the short or the long ones, as the longest
        document asks; ``factor``: how many times the ``trained`` tokens a document may have."""
        if attention_factor is None:
            attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
        freqs = [freq / each for freq, each in zip(self.inv_freq, factors, strict=True)]
        return Rope(tuple(freqs), attention_factor, self.interleaved)

    def _with(self, freqs: Sequence[float]) -> "Rope":
        return Rope(tuple(freqs), self.factor, self.interleaved)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x [b, t, h, k]`` turned by ``positions [t]`` or ``[b, t]``, in its dtype; in fp32 (fp64 for fp64)."""
        turned = 2 * len(self.inv_freq)
        if turned > x.shape[-1]:
            raise ValueError(f"rotary positions of {turned} channels do not fit heads of {x.shape[-1]}")
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = (each.to(exact) for each in self._turns(positions.to(x.device)))
        some = x[..., :turned].to(exact)
        first, second = some.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else some.chunk(2, -1)
        pairs = first * cos - second * sin, second * cos + first * sin
        new = torch.stack(pairs, -1).flatten(-2) if self.interleaved else torch.cat(pairs, -1)
        return torch.cat([new.to(x.dtype), x[..., turned:]], -1) if turned < x.shape[-1] else new.to(x.dtype)

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Weighed cosine and sine ``[t, 1, pairs]`` of the angles.

        In fp64: at position 1e6 a product in fp32 is off by up to 0.03 radian.
        """
        angles = positions.double()[..., None, None] * self._freqs(positions.device)
        return angles.cos() * self.factor, angles.sin() * self.factor

    def _freqs(self, device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():  # a constant of the graph
            return torch.tensor(self.inv_freq, dtype=torch.float64, device=device)
        return _planned(self.inv_freq).on(device)


@lru_cache(maxsize=64)
def _planned(inv_freq: tuple[float, ...]) -> Planned:
    return Planned(np.array(inv_freq, np.float64))


@lru_cache(maxsize=64)
def _plain(dim: int, base: float) -> Rope:
    return Rope.plain(dim, base)


def rotary(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """``x [b, t, h, k]`` with all its channels turned by :meth:`Rope.plain`, ``k`` even; ``positions [t]``."""
    return _plain(x.shape[-1], base)(x, positions)
