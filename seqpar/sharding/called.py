"""Every function that crosses the cuts says, as its first line, what must be the same on every rank."""

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.agreed import agree
from seqpar.collectives.group import where
from seqpar.sharding.exchanged import backward_pass
from seqpar.sharding.shard import Shard, digest_of


def called(
    place: str,
    group: Group,
    shard: Shard | None,
    options: object,
    *tokens: Tensor | None,
    shared: tuple[Tensor | None, ...] = (),
) -> None:
    """All ranks of ``group`` call ``place``, under one cut, with the same ``options`` and tensors of the same kind.

    Compared are, besides: how the documents are cut, dtypes and shapes (of ``tokens``, ``[b, t, ...]``, but for ``t``,
    which is to be what the shard says), and whether gradients will come. At first sight one small all-gather each for
    the cut and for the call, and the same ``ValueError`` on every rank; then nothing is sent
    (:mod:`seqpar.collectives.agreed`). Nothing at size 1, nor where a forward pass is computed again in backward: that
    ends where a rank has all it needs, which is not the same place on every rank.
    """
    if group.size == 1 or backward_pass() is not None:
        return
    if shard is not None:
        agree(group, "the cut", digest_of(shard))
    mine = -1 if shard is None else shard.num_local
    kinds = [_kind(tensor, mine) for tensor in tokens] + [_kind(tensor, -1) for tensor in shared]
    given = [tensor for tensor in (*tokens, *shared) if tensor is not None]
    grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    agree(group, place, f"options {options}, tensors {', '.join(kinds)}, {'gradients' if grad else 'no gradients'}")


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device: it lies in memory and is no stand-in."""
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, torch.nn.Parameter)


def check_range(what: str, tensor: Tensor | None, low: float, high: float, group: Group) -> None:
    """Raise ``ValueError`` for values out of ``low`` to ``high``, where they are :func:`readable`."""
    if tensor is None or not tensor.numel() or tensor.is_complex() or not readable(tensor):
        return
    least, most = (float(bound) for bound in tensor.detach().aminmax())
    if least < low or most > high:
        raise ValueError(f"{where(group)}: {what} must be from {low:g} to {high:g}, got {least:g} to {most:g}")


def _kind(tensor: Tensor | None, num_local: int) -> str:
    if tensor is None:
        return "none"
    shape: list[int | str] = list(tensor.shape)
    if len(shape) > 1 and shape[1] == num_local:
        shape[1] = "t"
    return f"{tensor.dtype} {shape}".replace("'", "")
