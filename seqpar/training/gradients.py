"""Sums over the ranks that share a sequence: of gradients, in a few small messages, and of single tensors.

Every rank holds all parameters and some of the tokens, so its gradients are parts of a sum.
:mod:`seqpar.training.aliases` says which gradients these are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from seqpar.collectives import Group, Pending
from seqpar.collectives.c10d import ranks_of
from seqpar.collectives.group import where
from seqpar.sharding.agreement import text_fingerprint
from seqpar.sharding.parts import parts_of, tensors_of
from seqpar.training.alike import is_distributed, tensor_parallel

BUCKET = 1 << 21  # numbers in one message


def sum_over_ranks(
    gradients: Sequence[Tensor | None],
    like: Sequence[Tensor],
    group: Group,
    names: Sequence[str] = (),
    overwrite: Sequence[bool] = (),
) -> list[Tensor | None]:
    """Each gradient summed over the ranks in fp32 (fp64), rounded once; None where no rank has one.

    ``like``: the parameters, whose shapes and dtypes sums have; ``names``: theirs. Two messages of ``BUCKET`` numbers
    are under way at a time; more memory than these take is not needed for gradients that may be overwritten with their
    sums, whatever the model. Raises ``ValueError``, the same on every rank and before any gradient is sent, if ranks
    would sum those of different parameters, or if one is sparse.
    """
    _check_alike(gradients, like, group, names)
    sums = [_Sum(each, gradient) for gradient, each in zip(gradients, like)]
    for each, may in zip(sums, overwrite):
        if may:
            each.overwrite()
    dtype = torch.float64 if any(_real(each).dtype == torch.float64 for each in like) else torch.float32
    device = next((each.device for each in like if each.is_cuda), like[0].device)
    flags = torch.tensor([float(g is not None) for g in gradients], dtype=dtype, device=device)
    used: list[float] = []  # by how many ranks; it comes before all gradients
    for part, total in _totals(flags, sums, group):
        if not part.index:
            used += total.tolist()
        elif used[part.index - 1]:
            sums[part.index - 1].put(part, total)
    return [each.result() if count else None for each, count in zip(sums, used)]


def _check_alike(
    gradients: Sequence[Tensor | None], like: Sequence[Tensor], group: Group, names: Sequence[str]
) -> None:
    """Raise the same ``ValueError`` on every rank unless all can be summed. One message of two numbers."""
    what = " ".join(f"{tuple(each.shape)} {each.dtype}" for each in like) + " ".join(names)
    sparse = [number for number, g in enumerate(gradients) if g is not None and g.layout != torch.strided]
    device = next((each.device for each in like if each.is_cuda), like[0].device)
    mine = torch.tensor([text_fingerprint(what), sparse[0] + 1 if sparse else 0], dtype=torch.int64, device=device)
    table = torch.stack(group.all_gather(mine).wait()).tolist()
    odd = [rank for rank, (digest, _) in enumerate(table) if digest != table[0][0]]
    if odd:
        raise ValueError(
            f"{where(group)}: ranks would sum gradients of different parameters: those of rank {odd[0]} are not rank "
            f"0's; mine are {len(like)}; freeze and unfreeze the same on every rank"
        )
    first = next((number - 1 for _, number in table if number), None)
    if first is not None:
        name = names[first] if names else f"parameter {first}"
        raise ValueError(f"{where(group)}: the gradient of {name} is sparse, which cannot be summed: use sparse=False")


@dataclass(frozen=True)
class Averaged:
    """What DDP, around a module or inside of it, makes of its gradients: ``held`` by these ranks, of which ``sharing``
    share a sequence with me; ``left_out``: a trained parameter that it does not look at."""

    held: tuple[int, ...]
    sharing: int
    left_out: str

    @staticmethod
    def of(module: nn.Module, group: Group) -> "list[Averaged]":
        """Around ``module``, while DDP calls it, and inside."""
        sharing, parts = getattr(group, "global_ranks", None), parts_of(module)
        if sharing is None:
            return []
        trained = {id(each): name for name, each in tensors_of(parts).items() if each.requires_grad}
        around = DistributedDataParallel._get_active_ddp_module()
        found = []
        for each in (around, *(part for _, part in parts if isinstance(part, DistributedDataParallel))):
            its = set() if each is None else {id(parameter) for parameter in each.parameters()}
            if each is not None and not its.isdisjoint(trained):
                read = {id(parameter) for parameter in each._module_parameters}
                held, left = ranks_of(each.process_group), [trained[key] for key in its & trained.keys() - read]
                found.append(Averaged(tuple(held), len({*held} & {*sharing}), min(left, default="")))
        return found

    def compared(self) -> str:
        """What is the same on all ranks of a sequence."""
        return f"{self.sharing} of {len(self.held)} {self.left_out}"

    def check(self, group: Group, summed: bool) -> None:
        """Raise ``ValueError`` if an average over these ranks is not the gradient of one device. ``summed``: the ranks
        of ``group`` have all the same gradient before."""
        who, ranks = where(group), f"ranks {list(self.held)}"
        if not summed and self.sharing < group.size:
            raise ValueError(
                f"{who}: DDP averages gradients over {ranks}, but {self.sharing} of them share a sequence with me, of "
                f"{group.size}: put DDP over the joint mesh of data and sequence ranks, or leave sync_gradients on"
            )
        if len(self.held) % self.sharing:
            raise ValueError(
                f"{who}: DDP averages gradients over {ranks}, {self.sharing} of which share my sequence, so sequences "
                "do not count alike: put DDP over whole groups of ranks that share a sequence"
            )
        if not summed and self.left_out:
            raise ValueError(
                f"{who}: DDP leaves the gradient of {self.left_out} alone, so nobody would sum it over the ranks that "
                "share a sequence: let DDP have it, freeze it, or leave sync_gradients on"
            )


def check_distributed(module: nn.Module, summed: bool, who: str) -> None:
    """Raise ``ValueError`` if gradients would be summed by two or by none, or heads that a layer counts are split."""
    if not tensor_parallel(module):
        if summed:
            raise ValueError(f"{who}: under FSDP2 pass sync_gradients=False: it reduces the gradients itself")
        return
    if not summed:
        raise ValueError(
            f"{who}: nobody sums the gradients of tensor-parallel weights over the ranks that share a sequence: leave "
            "sync_gradients on, or have FSDP2 over the joint mesh own them, too"
        )
    for name, part in module.named_modules():
        mixes = hasattr(part, "mix") and type(part).__module__.startswith("seqpar.layers.")
        if mixes and is_distributed(part) and not getattr(part, "plain", False):
            raise ValueError(
                f"{who}: {name} ({type(part).__name__}) counts its heads, so tensor parallelism cannot split them; it "
                "can split plain SoftmaxAttention (q, k, v by columns, out by rows) and what mixes no tokens"
            )


def check_meshes(module: nn.Module, group: Group) -> None:
    """Raise ``ValueError`` if FSDP2 reduces gradients over ranks that are not all of those that share a sequence."""
    sharing = getattr(group, "global_ranks", None)
    for name, part in module.named_modules():
        if sharing is None or not hasattr(part, "set_requires_gradient_sync"):
            continue
        for mesh in _meshes(part):
            held = mesh.mesh.flatten().tolist()
            if not set(sharing) <= set(held):
                raise ValueError(
                    f"{where(group)}: FSDP2 reduces the gradients of {name or 'the model'} over ranks {held}, but "
                    f"ranks {list(sharing)} share a sequence: shard over the joint mesh of data and sequence ranks"
                )


def check_whole_mesh(module: nn.Module, group: Group) -> None:
    """Raise ``ValueError`` unless FSDP2 shards everything over the ranks of ``group``, and over no others."""
    sharing = set(getattr(group, "global_ranks", None) or range(group.size))
    for name, part in module.named_modules():
        for mesh in _meshes(part) if hasattr(part, "set_requires_gradient_sync") else []:
            held = mesh.mesh.flatten().tolist()
            if set(held) != sharing:
                raise ValueError(
                    f"{where(group)}: FSDP2 shards {name or 'the model'} over ranks {held}, but the plan is for ranks "
                    f"{sorted(sharing)}: shard over these, in a mesh of one or two dims"
                )


def _meshes(part: Any) -> list[Any]:
    """Those that FSDP2 shards this part over; it alone knows while parameters are whole for the time of a call."""
    state = part._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    known = [each.mesh_info.mesh for each in groups if each is not None]
    return known or [each.device_mesh for each in part.parameters() if hasattr(each, "device_mesh")]


@dataclass(frozen=True)
class _Part:
    """Some numbers of one tensor: of the flags (0) or of a gradient."""

    index: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def _buckets(sizes: Sequence[int]) -> Iterator[list[_Part]]:
    """All numbers of tensors of these sizes, in order, ``BUCKET`` at a time."""
    bucket: list[_Part] = []
    room = BUCKET
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            bucket.append(_Part(index, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield bucket
                bucket, room = [], BUCKET
    if bucket:
        yield bucket


def _totals(flags: Tensor, sums: "Sequence[_Sum]", group: Group) -> Iterator[tuple[_Part, Tensor]]:
    """All parts with their sums over ranks, in order; a bucket is on its way while the one before it is read."""
    pending: tuple[list[_Part], Pending[Tensor]] | None = None
    for bucket in _buckets([len(flags), *(each.num for each in sums)]):
        message = flags.new_zeros(sum(part.size for part in bucket))
        for part, into in zip(bucket, message.split([part.size for part in bucket])):
            if part.index:
                sums[part.index - 1].read(part, into)
            else:
                into.copy_(flags[part.start : part.stop])
        following = bucket, group.all_reduce(message)
        if pending is not None:
            yield from _split(*pending)
        pending = following
    if pending is not None:
        yield from _split(*pending)


def _split(bucket: list[_Part], pending: Pending[Tensor]) -> Iterator[tuple[_Part, Tensor]]:
    return zip(bucket, pending.wait().split([part.size for part in bucket]))


class _Sum:
    """One gradient on its way to being a sum: read part by part, and written behind."""

    def __init__(self, like: Tensor, gradient: Tensor | None) -> None:
        self.num = _real(like).numel()
        self._like, self._gradient = like, gradient
        self._result: Tensor | None = None

    def overwrite(self) -> None:
        """Write the sum over the gradient, where it has room for it."""
        gradient = self._gradient
        if gradient is not None and _plain(gradient) and gradient.dtype == self._like.dtype:
            self._result = gradient

    def read(self, part: _Part, into: Tensor) -> None:
        """Fill ``into`` with numbers of the gradient."""
        if self._gradient is None:
            return
        if not _plain(self._gradient):
            self._gradient = self._gradient.resolve_conj().resolve_neg().contiguous()
        into.copy_(_real(self._gradient).view(-1)[part.start : part.stop])

    def put(self, part: _Part, total: Tensor) -> None:
        """Write numbers of the sum."""
        if self._result is None:
            self._result = torch.empty_like(self._like, memory_format=torch.contiguous_format)
        _real(self._result).view(-1)[part.start : part.stop] = total

    def result(self) -> Tensor:
        """The sum."""
        return torch.zeros_like(self._like) if self._result is None else self._result


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _plain(x: Tensor) -> bool:
    """Whether its numbers lie one after the other."""
    return x.is_contiguous() and not x.is_conj() and not x.is_neg()
