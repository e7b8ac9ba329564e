"""What some tokens do to a state that passes through them, besides what they add to it: a linear map, in few numbers.

``S -> exp(log_decay) * S`` (a decay for all, for each row, or for each entry of the state), or ``S -> A S`` (a matrix,
as the delta rule has). Decays compose by adding logarithms, matrices by multiplying. States and decays may be complex.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transition:
    """``value`` says all that must travel. Give ``rates`` only for a decay that they recover, and which all ranks know.

    A decay: ``log_decay = value`` or, with ``rates``, ``rates * value``: broadcasts to the state ``[..., k, v]``. A
    Mamba layer's is its matrix times the sum of the step sizes, and so ``v`` times smaller on its way.
    ``matrix``: ``value`` is ``A [..., k, k]`` instead.
    """

    value: Tensor
    rates: Tensor | None = None
    matrix: bool = False

    @property
    def kind(self) -> str:
        """``scalar`` per head, ``vector`` (for each row), ``full`` (for each entry) or ``matrix``."""
        if self.matrix:
            return "matrix"
        decay = self.log_decay
        return "full" if decay.shape[-1] > 1 else "vector" if decay.shape[-2] > 1 else "scalar"

    @property
    def log_decay(self) -> Tensor:
        """Logarithm of what multiplies the state; broadcasts to it."""
        assert not self.matrix
        return self.value if self.rates is None else self.rates * self.value

    @property
    def block_dim(self) -> int:
        """The dim along which a state can be cut, so that each block goes through by itself."""
        return -1 if self.matrix else -2

    def apply(self, state: Tensor) -> Tensor:
        """The state ``[..., k, v]`` that leaves when ``state`` enters."""
        return exact_matmul(self.value, state) if self.matrix else self.log_decay.exp() * state

    def after(self, earlier: "Transition") -> "Transition":
        """``earlier``, then this one."""
        if self.matrix:
            return Transition(exact_matmul(self.value, earlier.value), matrix=True)
        return Transition(self.value + earlier.value, self.rates)

    def nothing(self) -> "Transition":
        """One of the same kind that changes nothing."""
        if self.matrix:
            return Transition(torch.eye(self.value.shape[-1]).to(self.value).expand_as(self.value), matrix=True)
        return Transition(torch.zeros_like(self.value), self.rates)

    def adjoint(self) -> "Transition":
        """What gradients pass through on their way back."""
        if self.matrix:
            return Transition(self.value.mH.contiguous(), matrix=True)
        return Transition(self.value.conj().resolve_conj(), None if self.rates is None else self.rates.conj())

    def block(self, offset: int, length: int) -> "Transition":
        """For the part of a state that :func:`torch.narrow` along :attr:`block_dim` gives."""
        return self if self.matrix else Transition(_narrow(self.log_decay, offset, length))


def _narrow(x: Tensor, offset: int, length: int) -> Tensor:
    return x if x.shape[-2] == 1 else x.narrow(-2, offset, length)


def together(transitions: Sequence[Transition | None]) -> Transition | None:
    """One after another, in this order; None changes nothing."""
    result = None
    for later in transitions:
        result = later if result is None or later is None else later.after(result)
    return result


def exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in full precision, whatever precision is set for the matmuls of the process (TF32, bf16)."""
    exact = torch.complex128 if left.is_complex() else torch.float64
    return (left.to(exact) @ right.to(exact)).to(right.dtype)
