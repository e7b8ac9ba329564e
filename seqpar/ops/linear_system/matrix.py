"""Matrices of linear systems and their powers, in fp64: dense ones, and diagonal ones of complex numbers."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """``a [h, n, n]``, fp64."""

    a: Tensor

    def columns(self, x: Tensor) -> Tensor:
        """The matrix times each of the vectors ``x [h, i, n]``."""
        return x @ self.a.mT

    def rows(self, x: Tensor) -> Tensor:
        """Each of the vectors ``x [h, i, n]`` times the matrix."""
        return x @ self.a

    def states(self, x: Tensor) -> Tensor:
        """The matrix times states ``[..., h, n, v]``, in fp64 whatever precision is set for matmuls."""
        return torch.einsum("hkn,...hnv->...hkv", self.a, x.double()).to(x.dtype)

    def squared(self) -> Self:
        return type(self)(self.a @ self.a)

    def raised(self, power: int) -> Self:
        return type(self)(torch.linalg.matrix_power(self.a, power))

    def dense(self) -> Tensor:
        return self.a


@dataclass(frozen=True)
class Diagonal:
    """``a [h, n / 2]``, complex: the entries of a diagonal matrix, beside which those of their conjugates are not kept.

    Vectors of ``n`` numbers are the real parts, then the imaginary ones, of what it multiplies.
    """

    a: Tensor

    def columns(self, x: Tensor) -> Tensor:
        return _apart(_together(x, -1) * self.a[:, None], -1)

    def rows(self, x: Tensor) -> Tensor:
        return _apart(_together(x, -1) * self.a[:, None].conj(), -1)

    def states(self, x: Tensor) -> Tensor:
        return _apart(_together(x.double(), -2) * self.a[..., None], -2).to(x.dtype)

    def squared(self) -> Self:
        return type(self)(self.a.square())

    def raised(self, power: int) -> Self:
        return type(self)(self.a**power)

    def dense(self) -> Tensor:
        real, imaginary = torch.diag_embed(self.a.real), torch.diag_embed(self.a.imag)
        return torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)


Matrix = Dense | Diagonal


def matrix_of(a: Tensor) -> Matrix:
    """``a [h, n, n]`` real, or ``[h, n / 2]`` complex."""
    return Diagonal(a.to(torch.complex128)) if a.is_complex() else Dense(a.double())


def _together(x: Tensor, dim: int) -> Tensor:
    return torch.complex(*x.chunk(2, dim))


def _apart(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x.real, x.imag], dim)
