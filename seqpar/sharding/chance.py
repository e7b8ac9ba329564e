"""Random numbers of a cut sequence: those of a token are the same whichever rank holds it, and however it is cut.

They come from a counter and a key, not from a state that moves on: Philox-4x32-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3") of the layer, the sequence of the batch, the token's place in the packed sequence and the
channel. The key is drawn once per forward pass from torch's default generator, and is that of rank 0 everywhere. So P
ranks draw what one draws, and what runs again in backward draws it again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from seqpar.collectives import Group
from seqpar.collectives.group import where
from seqpar.sharding.exchanged import backward_pass
from seqpar.sharding.parts import parts_of
from seqpar.sharding.shard import Shard

WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Four random words of 32 bits for each counter of four; int64 tensors that broadcast, from 0 to 2**32 - 1."""
    a, b, c, d = counter
    first, second = key
    for _ in range(ROUNDS):
        (high_a, low_a), (high_c, low_c) = _product(a, MULTIPLIERS[0]), _product(c, MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
        first, second = (first + WEYL[0]) & WORD, (second + WEYL[1]) & WORD
    return a, b, c, d


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of 32-bit products, in int64, which their 64 bits would overflow."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * factor
    return (high + (low >> 16)) >> 16, (low + (high << 16)) & WORD


class Chance:
    """The random numbers of one forward pass: its key, and how often each layer asked.

    ``seed``: what the key is made of (None: drawn when it is first needed); that of rank 0 counts.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed
        self._key: tuple[int, int] | None = None
        self._layers: dict[int, int] = {}
        self._calls: dict[int, int] = {}

    def key(self, group: Group, device: torch.device) -> tuple[int, int]:
        """Two words, the same on every rank: one small message where there are several, once per pass."""
        if self._key is None:
            drawn = torch.randint(0, WORD + 1, (2,), dtype=torch.int64, device="cpu")
            if self._seed is not None:
                drawn = torch.tensor([self._seed & WORD, self._seed >> 32 & WORD])
            first, second = group.all_gather(drawn.to(device)).wait()[0].tolist()
            self._key = int(first), int(second)
        return self._key

    def stream(self, layer: nn.Module) -> tuple[int, int]:
        """Which of the pass's layers this is, and which of its calls, counted alike on every rank.

        Raises ``ValueError`` if a layer that was called more than once is computed again in backward: which call it is
        cannot be told.
        """
        number = self._layers.setdefault(id(layer), len(self._layers))
        calls = self._calls.get(number, 0)
        if backward_pass() is None:
            self._calls[number] = calls + 1
        elif calls > 1:
            raise ValueError(
                f"{type(layer).__name__} draws random numbers {calls} times in a forward pass that is computed again "
                "in backward, where it cannot be told which of them are wanted: use one module for each call"
            )
        return number, max(0, calls - 1) if backward_pass() is not None else calls


@dataclass(frozen=True)
class Random:
    """What one call of a layer draws; ``cut.random(layer)`` makes one."""

    shard: Shard
    key: tuple[int, int]
    stream: int

    def of_tokens(self, x: Tensor) -> Tensor:
        """Numbers from 0 to 1 (without 1), fp32, for the entries of ``x [b, t, ...]``, my tokens."""
        if x.dim() < 2 or x.shape[1] != self.shard.num_local:
            raise ValueError(f"expected [b, t, ...] of my {self.shard.num_local} tokens, got {list(x.shape)}")
        channels = x.shape[2:].numel()
        places = self.shard.indices_of(self.shard.rank).to(x.device)
        rows, quads = (torch.arange(n, device=x.device) for n in (x.shape[0], -(-channels // 4)))
        counter = quads, places[:, None], rows[:, None, None], quads.new_full((), self.stream)
        words = torch.stack(torch.broadcast_tensors(*philox(counter, self.key)), -1)
        return _unit(words.flatten(-2)[..., :channels]).reshape(x.shape)

    def of_layer(self, count: int = 1) -> Tensor:
        """``count`` numbers from 0 to 1, fp32 on the CPU, the same on every rank: whether a layer is skipped."""
        quads = torch.arange(-(-count // 4))
        zero = quads.new_zeros(())
        counter = quads, zero, zero.bitwise_not() & WORD, zero + self.stream  # beyond every row of a batch
        return _unit(torch.stack(torch.broadcast_tensors(*philox(counter, self.key)), -1).flatten()[:count])

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """``x [b, t, ...]`` with entries set to 0 with probability ``p`` and the others divided by ``1 - p``."""
        return torch.where(self.of_tokens(x) >= p, x / (1 - p), 0) if p < 1 else x * 0


def _unit(words: Tensor) -> Tensor:
    return (words >> 8).float() * 2.0**-24


def refuse_own_random_numbers(model: nn.Module, group: Group) -> None:
    """Raise ``ValueError`` if modules of torch's in ``model`` draw random numbers, each rank its own, in training.

    What a function draws (``functional.dropout``, ``torch.rand``) cannot be seen.
    """
    if group.size == 1:
        return
    found = [f"{name} ({type(each).__name__})" for name, each in parts_of(model) if _draws(each)]
    if found:
        raise ValueError(
            f"{where(group)}: {', '.join(found[:4])}{' and others' if len(found) > 4 else ''} would draw numbers that "
            "depend on how the sequence is cut: use seqpar.layers.Dropout, called with the cut, or set p to 0"
        )


def _draws(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RReLU):
        return module.lower < module.upper
    return isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0
