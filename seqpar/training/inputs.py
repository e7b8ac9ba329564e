"""An open call: whatever a model is called with, cut where it has tokens, and the same on every rank."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from seqpar.sharding.agreement import Fact, digest, text_fingerprint
from seqpar.sharding.cut import Cut
from seqpar.sharding.shard import Shard
from seqpar.training.loss import next_token_targets
from seqpar.training.output import Rebuild, opened
from seqpar.training.rows import Rows, per_row, rows_of

Lengths = Sequence[int] | Sequence[Sequence[int]]
TOKENS = ("input_ids", "inputs_embeds")  # what stands for tokens where there are none
_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Packed:
    """A second sequence of a call, with lengths of its own: what an encoder reads, what is attended to.

    ``x [b, s2, ...]``, the same on every rank; ``lengths`` of its documents and ``attention_mask`` as for the call. The
    model gets it as a :class:`CutSequence`.
    """

    x: Tensor
    lengths: Lengths | None = None
    attention_mask: Tensor | None = None


@dataclass(frozen=True)
class CutSequence:
    """My tokens of a :class:`Packed`, ``x [b, t2, ...]``, and the cut to call layers with that mix them. Attention of
    the call's tokens to these takes ``key_shard=cut.shard``."""

    x: Tensor
    cut: Cut


@dataclass(frozen=True)
class Call:
    """What a wrapped model was called with, as it came."""

    tokens: Tensor | None = None
    labels: Tensor | None = None
    lengths: Any = None
    targets: Tensor | None = None
    weights: Tensor | None = None
    attention_mask: Tensor | None = None
    divisor: float | Tensor | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def said_lengths(self) -> list[Any]:
        """The lengths that were given, or those of one document."""
        if self.lengths is None:
            shape = () if self.tokens is None else self.tokens.shape
            return list(shape[1:2] or shape)
        return list(self.lengths.tolist() if isinstance(self.lengths, Tensor) else self.lengths)

    def other_inputs(self) -> Fact:
        """All but tokens, labels and lengths as one thing that is the same on every rank: names, kinds and numbers."""
        named = {name: getattr(self, name) for name in ("targets", "weights", "attention_mask", "divisor")}
        given = {**{name: value for name, value in named.items() if value is not None}, **self.inputs}
        if not given:
            return Fact(0, "none")
        said, digests = [], []
        for name, value in sorted(given.items()):
            for word, number in _facts(value):
                said.append(f"{name} {word}")
                digests += [] if number is None else [number]
        total: Tensor | int = text_fingerprint(" | ".join(said))
        for number in digests:
            total = number + torch.as_tensor(total, device=number.device) * 31
        return Fact(total, ", ".join(each[:80] for each in said[:6]))


def _facts(value: Any) -> Iterator[tuple[str, Tensor | None]]:
    """The kind of each value in what was given, and the digest of its numbers. Nothing raises here: others wait."""
    if isinstance(value, Packed):
        for part in (value.x, value.attention_mask):
            yield from _facts(part)
        yield f"lengths {value.lengths}", None
        return
    try:
        leaves, _ = opened(value)
    except ValueError:
        leaves = [type(value)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            plain = leaf.layout == torch.strided and not leaf.is_meta
            yield f"{list(leaf.shape)} {leaf.dtype}", digest(leaf) if plain else None
        else:
            yield (repr(leaf) if isinstance(leaf, _PLAIN) else type(leaf).__name__), None


@dataclass(frozen=True)
class _Placed:
    """An input of the call: its leaves, in which dim each has tokens (None: in none), and what puts it together."""

    leaves: list[Any]
    dims: list[int | None]
    rebuild: Rebuild

    def mine(self, cut: Cut) -> Any:
        """With my tokens only."""
        taken = [each if dim is None else cut.shard.take(each, dim) for each, dim in zip(self.leaves, self.dims)]
        return self.rebuild(taken)


@dataclass(frozen=True)
class Batch:
    """A call that fits together, with rows put one after the other where they have documents of their own."""

    tokens: Tensor | None
    labels: Tensor | None
    targets: Tensor | None
    weights: Tensor | None
    lengths: tuple[int, ...]
    inputs: Mapping[str, "_Placed | Packed"]
    rows: Rows | None
    divisor: float | Tensor | None = None

    def mine(self, cut: Cut) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The arguments for the model but for the cut: by place and by name."""
        tokens = () if self.tokens is None else (cut.shard.take(self.tokens),)
        named = {
            n: _beside(each, cut) if isinstance(each, Packed) else each.mine(cut) for n, each in self.inputs.items()
        }
        return tokens, named

    def all_targets(self) -> Tensor | None:
        """``[b, s]`` or ``[b, s, ...]``: what to predict at each token."""
        return self.targets if self.labels is None else next_token_targets(self.labels, self.lengths)

    def all_weights(self) -> Tensor | None:
        """``[b, s]``: what each target counts, None where all count alike. Those of labels are shifted with them."""
        if self.weights is None or self.labels is None:
            return self.weights
        return next_token_targets(self.weights, self.lengths, 0)


def _beside(other: Packed, cut: Cut) -> CutSequence:
    """My part of a second sequence, cut as the first one is."""
    lengths: Any = other.lengths or ()
    shard = Shard.of(lengths, cut.group, cut.shard.layout)
    return CutSequence(shard.take(other.x), replace(cut, shard=shard, states=None))


def batch_of(call: Call, token_dims: Mapping[str, int | None], who: str) -> Batch:
    """The call, if it fits together. Raises ``ValueError`` if not; ranks with the same call raise the same."""
    shape = _shape(call, who)
    rows, lengths = _rows(call.lengths and call.said_lengths, call.attention_mask, shape, who)
    lengths = tuple(lengths or [shape[1]])
    if rows is None and sum(lengths) != shape[1]:
        raise ValueError(f"{who}: lengths sum to {sum(lengths)}, tokens hold {shape[1]}")
    _check_targets(call, shape, who)
    inputs = {name: _placed(name, value, shape, token_dims, rows, who) for name, value in call.inputs.items()}
    kept = [None if x is None else x if rows is None else rows.packed(x) for x in _along(call)]
    return Batch(kept[0], kept[1], kept[2], kept[3], lengths, inputs, rows, call.divisor)


def _along(call: Call) -> tuple[Tensor | None, ...]:
    return call.tokens, call.labels, call.targets, call.weights


def _rows(
    lengths: Any, mask: Tensor | None, shape: tuple[int, int], who: str
) -> tuple[Rows | None, Sequence[int] | None]:
    """How rows with documents of their own become one, and the lengths of the documents."""
    if mask is None and not per_row(lengths):
        return None, lengths
    if lengths and not per_row(lengths):
        raise ValueError(f"{who}: beside attention_mask, lengths must be a list for each row, got {lengths[:6]}")
    rows = rows_of(shape, lengths or None, mask, who)
    return rows, rows.lengths


def _shape(call: Call, who: str) -> tuple[int, int]:
    """Rows and tokens of the call: those of its tokens, or of what stands for them."""
    if call.tokens is not None:
        _check_tokens(call.tokens, who)
        return call.tokens.shape[0], call.tokens.shape[1]
    known = [call.labels, call.targets, call.attention_mask, *(call.inputs.get(name) for name in TOKENS)]
    for each in known:
        if isinstance(each, Tensor) and each.dim() >= 2:
            return each.shape[0], each.shape[1]
    raise ValueError(f"{who}: call the model with tokens [batch, tokens], or with {' or '.join(TOKENS)}")


def _check_tokens(tokens: Tensor, who: str) -> None:
    if tokens.dim() < 2 or (tokens.dim() == 2 and tokens.is_floating_point()):
        if tokens.dim() == 2:
            raise ValueError(f"{who}: tokens must be int64 (or int32), got {tokens.dtype}: pass tokens.long()")
        raise ValueError(f"{who}: tokens must be [batch, tokens], got {list(tokens.shape)}")
    if tokens.dim() == 2 and tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{who}: tokens must be int64 (or int32), got {tokens.dtype}: pass tokens.long()")


def _check_targets(call: Call, shape: tuple[int, int], who: str) -> None:
    labels, targets, weights = call.labels, call.targets, call.weights
    if labels is not None and targets is not None:
        raise ValueError(f"{who}: labels are shifted by one token and targets are not: pass one of them")
    if labels is not None and tuple(labels.shape) != shape:
        raise ValueError(f"{who}: labels must be {list(shape)} like tokens, got {list(labels.shape)}")
    if labels is not None and labels.dtype != torch.int64:
        raise ValueError(f"{who}: labels must be int64, got {labels.dtype}: pass labels.long()")
    if targets is not None and tuple(targets.shape[:2]) != shape:
        raise ValueError(f"{who}: targets must be {list(shape)} like tokens, or more dims, got {list(targets.shape)}")
    if weights is not None and (tuple(weights.shape) != shape or not weights.is_floating_point()):
        given = f"{weights.dtype} {list(weights.shape)}"
        raise ValueError(f"{who}: weights must be floating point, {list(shape)} like tokens, got {given}")
    if labels is None and targets is None and not (weights is None and call.divisor is None):
        raise ValueError(f"{who}: weights and divisor are those of a loss: pass labels or targets, too")


def _placed(
    name: str, value: Any, shape: tuple[int, int], token_dims: Mapping[str, int | None], rows: Rows | None, who: str
) -> _Placed | Packed:
    """An input with its token dims, in one row."""
    if isinstance(value, Packed):
        return _second(name, value, who)
    leaves, rebuild = opened(value)
    dims = [token_dims[name] if name in token_dims else _token_dim(name, each, shape, who) for each in leaves]
    for each, dim in zip(leaves, dims):
        if dim is not None and (not isinstance(each, Tensor) or each.dim() <= dim or each.shape[dim] != shape[1]):
            given = list(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(f"{who}: token_dims says that dim {dim} of {name} holds {shape[1]} tokens, got {given}")
        if rows is not None and dim not in (None, 1):
            raise ValueError(f"{who}: where rows have documents of their own, {name} must be [batch, tokens, ...]")
    kept = [each if dim is None or rows is None else rows.packed(each) for each, dim in zip(leaves, dims)]
    return _Placed(kept, dims, rebuild)


def _token_dim(name: str, x: Any, shape: tuple[int, int], who: str) -> int | None:
    """Dim 1 of ``[b, tokens, ...]``; None where no dim is that long. Anything else is for the user to say."""
    rows, tokens = shape
    if not isinstance(x, Tensor) or tokens not in x.shape or (tokens == 1 and (x.dim() < 2 or x.shape[1] != 1)):
        return None
    if x.dim() >= 2 and x.shape[1] == tokens and x.shape[0] in (1, rows):
        return 1
    raise ValueError(
        f"{who}: {name} {list(x.shape)} has a dim of {tokens}, as many as there are tokens, but is not [batch, tokens, "
        f"...]: say sequence_parallel(token_dims={{{name!r}: ...}}), the dim that holds tokens, or None"
    )


def _second(name: str, other: Packed, who: str) -> Packed:
    """A second sequence in one row, if it fits."""
    x = other.x
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise ValueError(f"{who}: Packed({name}) takes a tensor [batch, tokens, ...]")
    shape = x.shape[0], x.shape[1]
    lengths = other.lengths.tolist() if isinstance(other.lengths, Tensor) else other.lengths
    rows, lengths = _rows(lengths, other.attention_mask, shape, f"{who}: {name}")
    lengths = [shape[1]] if lengths is None else list(lengths)
    if rows is None and sum(lengths) != shape[1]:
        raise ValueError(f"{who}: lengths of {name} sum to {sum(lengths)}, it holds {shape[1]} tokens")
    return Packed(x if rows is None else rows.packed(x), lengths)
