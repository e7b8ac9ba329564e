"""How weights of one model are those of another: rules that are read both ways, so that one table loads and saves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """``theirs`` are ``ours``: of several on one side, the one on the other is made of them.

    They stand one after the other along ``dim``, ``sizes`` rows each, in every one of ``groups`` (heads, say).
    ``joins``: how many neighbouring parts make one of ours, each of them over all groups (default: one).
    ``transposed``: theirs has its last two dims the other way round. ``shape``: of ours, where only the shape differs;
    ``their_shape``: of theirs then. ``negated``: ours is minus theirs. Law: ``back(out(x)) == x``, bit by bit; a rule
    moves numbers and changes no more than signs, so gradients go through it as weights do.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    groups: int = 1
    dim: int = 0
    joins: tuple[int, ...] = ()
    transposed: bool = False
    shape: tuple[int, ...] | None = None
    their_shape: tuple[int, ...] | None = None
    negated: bool = False

    def out(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ours, made of theirs."""
        found = [self._turned(theirs[name]) for name in self.theirs]
        found = self._dealt(found, len(self.ours))
        return {name: self._shaped(each, self.shape) for name, each in zip(self.ours, found, strict=True)}

    def back(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Theirs, made of ours."""
        found = self._dealt([self._shaped(ours[name], self.their_shape) for name in self.ours], len(self.theirs))
        return {name: self._turned(each) for name, each in zip(self.theirs, found, strict=True)}

    def _turned(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2) if self.transposed else x

    def _shaped(self, x: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        x = x if shape is None else x.reshape(shape)
        return -x if self.negated else x

    def _dealt(self, x: Sequence[Tensor], parts: int) -> list[Tensor]:
        """One as several, or several as one."""
        if len(x) == parts == 1:
            return list(x)
        if len(x) == 1:
            split = x[0].unflatten(self.dim, (self.groups, -1)).split(self.sizes, self.dim + 1)
            return self._several([each.flatten(self.dim, self.dim + 1) for each in split])
        grouped = [each.unflatten(self.dim, (self.groups, -1)) for each in self._single(x)]
        return [torch.cat(grouped, self.dim + 1).flatten(self.dim, self.dim + 1)]

    def _several(self, parts: list[Tensor]) -> list[Tensor]:
        """Parts of which some are put together."""
        ends = list(accumulate(self.joins))
        return [torch.cat(parts[end - n : end], self.dim) for n, end in zip(self.joins, ends)] if ends else parts

    def _single(self, x: Sequence[Tensor]) -> Sequence[Tensor]:
        """The parts again, one by one."""
        sizes, parts = [self.groups * size for size in self.sizes], list[Tensor]()
        ends = list(accumulate(self.joins))
        for each, n, end in zip(x, self.joins, ends):
            parts += each.split(sizes[end - n : end], self.dim)
        return parts if ends else x


def out(rules: Sequence[Rule], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of ours, made of all of theirs."""
    return {name: each for rule in rules for name, each in rule.out(theirs).items()}


def back(rules: Sequence[Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Theirs, of rules all of whose weights are there (gradients have none for buffers)."""
    there = [rule for rule in rules if all(name in ours for name in rule.ours)]
    return {name: each for rule in there for name, each in rule.back(ours).items()}
