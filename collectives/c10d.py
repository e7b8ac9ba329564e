"""Ranks as processes: the only file that imports ``torch.distributed``, and the one that hides its versions.

What travels between two ranks travels as bytes, so every dtype does. A message that was sent is kept until the receiver
has it: a verb's ``wait()`` finishes what it receives and what *earlier* verbs sent, so that no sender is held up by a
receiver which has not come to the verb yet.
"""

import atexit
import functools
import hashlib
import math
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from seqpar.collectives.group import (
    Group,
    Later,
    Pending,
    alone,
    as_bytes,
    check_apart,
    check_count,
    check_peer,
    check_shapes,
    check_subgroup,
    contiguous,
    done,
    empty_like_shape,
    group_errors,
    is_shut,
    partition,
    shut,
    sum_in_order,
    where,
)
from seqpar.collectives.launcher import SLURM, Place, gpu_of, this_place
from seqpar.collectives.meeting import wait_for_all

T = TypeVar("T")
Operation = tuple[Callable[..., Any], Tensor, int]
_torch: Any = dist.distributed_c10d
_untyped: Any = dist
Message = tuple[Tensor, int]
"""A tensor and the rank it goes to or comes from."""
Ranks = Group | DeviceMesh | dist.ProcessGroup
"""What ``group=`` takes: see :func:`group_of`."""


def connect(backend: str | None = None, *, timeout_seconds: float = 60.0) -> Group:
    """Join the ranks that torchrun, mpirun or Slurm started with this process; alone, the group of one.

    All ranks call it. ``backend`` is ``"gloo"`` or ``"nccl"``; by default NCCL where there is CUDA. A rank waits
    ``timeout_seconds`` for a message (and for the others to come) before it raises :class:`GroupError`. End with
    :func:`disconnect`, since a message that its receiver has not come to is lost when its sender ends. Where the
    default process group of ``torch.distributed`` exists already, it is used as it is. Closing the group closes its
    subgroups; the process group that it speaks through goes on until :func:`disconnect`.
    """
    if not dist.is_initialized():
        place = this_place()
        backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        if backend == "nccl":
            torch.cuda.set_device(gpu_of(place, torch.cuda.device_count()))
        if place.size == 1:
            return alone()
        _join(place, backend, timeout_seconds)
    return _process_ranks(dist.group.WORLD, timedelta(seconds=timeout_seconds))


def group_of(ranks: Ranks) -> Group:
    """The group of ranks in a process group or a mesh of one dim that the user already has; all its ranks call this.

    A :class:`Group` is returned as it is. Everything else is ``ValueError``.
    """
    if isinstance(ranks, Group):
        return ranks
    if isinstance(ranks, DeviceMesh):
        if ranks.ndim != 1:
            names = ranks.mesh_dim_names or tuple(f"dim {dim}" for dim in range(ranks.ndim))
            raise ValueError(
                f"a mesh of {ranks.ndim} dims {names} holds several groups: pick one dim, mesh[{names[-1]!r}]"
            )
        ranks = ranks.get_group()
    if not isinstance(ranks, dist.ProcessGroup):
        raise ValueError(
            "group must be a Group (seqpar.connect()), one dim of a mesh (mesh['sp']) or a process group that holds "
            f"this rank, got {ranks!r}"
        )
    return _process_ranks(ranks, None)


def disconnect() -> None:
    """Leave what :func:`connect` joined, once every rank has come here; while an error is raised, leave at once."""
    if not dist.is_initialized():
        return
    if sys.exc_info()[0] is None:
        with group_errors(f"rank {dist.get_rank()} of {dist.get_world_size()}", "disconnect", "all ranks"):
            dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
    _leave()


def _leave() -> None:
    """End what Gloo runs beside us. At the latest before the interpreter ends: its threads must not see that."""
    atexit.unregister(_leave)
    if dist.is_initialized():
        dist.destroy_process_group()


def available_backends() -> dict[str, bool]:
    """Which backends this build of torch has; joins nothing."""
    return {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
    }


def _join(place: Place, backend: str, timeout_seconds: float) -> None:
    address = f"[{place.address}]" if ":" in place.address else place.address
    with group_errors(f"rank {place.rank} of {place.size}", "connect", f"rank 0 at {address}:{place.port}"):
        timeout = timedelta(seconds=timeout_seconds)
        if place.launcher == SLURM:
            store = _untyped.TCPStore(place.address, place.port, None, place.rank == 0, timeout, False)
            wait_for_all(store, place, timeout_seconds)
        else:
            url = f"tcp://{address}:{place.port}"
            store, _, _ = next(_torch.rendezvous(url, place.rank, place.size, timeout=timeout))
        store.set_timeout(timeout)
        # torchrun's store outlives an attempt, and holds the addresses of ranks that are dead by the next one.
        store = _torch.PrefixStore(f"attempt_{place.attempt}", store)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout)
    if backend == "gloo":
        atexit.register(_leave)


def _all_gather_single(out: Tensor, mine: Tensor, process_group: dist.ProcessGroup) -> dist.Work:
    """``all_gather_single`` of torch 2.13, ``all_gather_into_tensor`` before."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(out, mine, group=process_group, async_op=True)


def _reduce_scatter_single(out: Tensor, parts: Tensor, process_group: dist.ProcessGroup) -> dist.Work:
    """``reduce_scatter_single`` of torch 2.13, ``reduce_scatter_tensor`` before."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(out, parts, group=process_group, async_op=True)


def _after(arrived: Callable[[], None], result: Callable[[], T]) -> Pending[T]:
    def finish() -> T:
        arrived()
        return result()

    return Later(finish)


@dataclass
class _Family:
    """What a group and its subgroups share: the messages on their way out, and the process groups made."""

    timeout: timedelta | None
    references: list["weakref.ref[dist.ProcessGroup]"] = field(default_factory=list)
    made: Counter[str] = field(default_factory=Counter)
    verbs: int = 0
    sent: deque[tuple[int, Callable[[], None]]] = field(default_factory=deque)

    @property
    def process_groups(self) -> list[dist.ProcessGroup]:
        """Those that were neither closed nor disconnected: the one given, then those of its subgroups."""
        return [found for reference in self.references if (found := reference()) is not None]

    def finish_sends(self, before: float) -> None:
        """Wait until what verbs before number ``before`` sent has left."""
        while self.sent and self.sent[0][0] < before:
            self.sent.popleft()[1]()


def _process_ranks(process_group: dist.ProcessGroup | None, timeout: timedelta | None) -> Group:
    assert process_group is not None
    if dist.get_world_size(process_group) == 1:
        return alone()
    group = ProcessRanks(process_group, _Family(timeout), "")
    # Rank 0 draws a number from the store that all ranks share: the names of no other group's subgroups begin with it.
    drawn = _torch._get_default_store().add("collectives/groups", 1) if group.rank == 0 else 0
    number = group.all_reduce(torch.tensor([drawn], device="cuda" if group.on_gpus else "cpu")).wait()
    group.name = f"collectives_{int(number)}"
    return group


def _new_process_group(
    members: Sequence[int], like: dist.ProcessGroup, name: str, timeout: timedelta | None
) -> dist.ProcessGroup:
    """A process group of these ranks of another one, made by them alone.

    ``dist.new_group`` names a group by how many this process made before, which need not be the same number on all
    members once a part of the ranks has made groups of its own; so the name is given here.
    """
    ranks = [dist.get_global_rank(like, rank) for rank in members]
    backend, me = dist.get_backend(like), ranks.index(dist.get_rank())
    timeout = timeout or _torch._get_default_timeout(backend)
    store = _torch._get_default_store()
    group, _ = _torch._new_process_group_helper(len(ranks), me, ranks, backend, store, name, timeout=timeout)
    _torch._world.pg_group_ranks[group] = {rank: number for number, rank in enumerate(ranks)}
    return group


def _new_subgroup(group: "ProcessRanks", members: tuple[int, ...]) -> "ProcessRanks":
    """Made by its members alone; where they closed one before, under another name: the store keeps old addresses."""
    name, family = f"{group.name}/{hashlib.blake2b(str(members).encode(), digest_size=8).hexdigest()}", group._family
    family.made[name] += 1
    name += f".{family.made[name]}"
    with group_errors(where(group), "subgroup", f"ranks {list(members)}"):
        made = _new_process_group(members, group._process_group, name, family.timeout)
    part = ProcessRanks(made, family, name)
    if part.on_gpus:  # NCCL wants all ranks at the first call; a later exchange may be between two of them only
        part.all_reduce(torch.zeros(1, device="cuda")).wait()
    return part


def _alive(process_group: dist.ProcessGroup | None, group: Group) -> dist.ProcessGroup:
    if process_group is None:
        raise ValueError(f"{where(group)}: the group was disconnected, so no message can travel")
    return process_group


def _close(group: "ProcessRanks", subgroups: dict[tuple[int, ...], Group]) -> None:
    """What :meth:`Group.close` does: last of all, once nobody waits for a message, the process group goes."""
    for _, part in sorted(subgroups.items()):  # in one order on all ranks, since each waits for its ranks
        part.close()
    family, reference = group._family, group._reference
    process_group = reference()
    try:
        if process_group is not None and sys.exc_info()[0] is None:
            family.finish_sends(before=math.inf)
            int(group.all_reduce(torch.zeros(1, device="cuda" if group.on_gpus else "cpu")).wait())
    finally:
        shut(group)
        if reference is not family.references[0]:  # that one is torch's, or the user's own
            family.references.remove(reference)
            if process_group is not None:
                dist.destroy_process_group(process_group)


class ProcessRanks:
    """One process's view of the ranks in a process group of ``torch.distributed``."""

    def __init__(self, process_group: dist.ProcessGroup, family: _Family, name: str) -> None:
        self.global_ranks = tuple(dist.get_process_group_ranks(process_group))
        self.rank, self.size = dist.get_rank(process_group), len(self.global_ranks)
        self.name = name
        self.on_gpus = dist.get_backend(process_group) == "nccl"
        self._reference = weakref.ref(process_group)  # once torch lets it go, its threads end
        self._family = family
        family.references.append(self._reference)
        self._subgroups: dict[tuple[int, ...], Group] = {}

    @property
    def _process_group(self) -> dist.ProcessGroup:
        return _alive(self._reference(), self)

    def exchange(
        self, send: Tensor | None, to: int | None, receive: Tensor | None, source: int | None
    ) -> Pending[Tensor | None]:
        sends = [] if send is None or to is None else [(send, to)]
        buffer = None if receive is None or source is None else contiguous(receive)
        receives = [] if buffer is None or source is None else [(buffer, source)]
        return _after(self._travel("exchange", sends, receives), lambda: buffer)

    def all_gather(self, tensor: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> Pending[list[Tensor]]:
        all_shapes = check_shapes(self, tensor, shapes)
        if len(set(all_shapes)) == 1 and tensor.numel():
            return self._all_gather_equal(tensor)
        gathered = [empty_like_shape(shape, tensor) for shape in all_shapes]
        gathered[self.rank] = tensor
        peers = self._peers()
        arrived = self._travel("all_gather", [(tensor, p) for p in peers], [(gathered[p], p) for p in peers])
        return _after(arrived, lambda: gathered)

    def _all_gather_equal(self, tensor: Tensor) -> Pending[list[Tensor]]:
        gathered = empty_like_shape((self.size, *tensor.shape), tensor)
        arrived = self._collective(
            "all_gather", lambda group: _all_gather_single(as_bytes(gathered), as_bytes(tensor), group)
        )
        return _after(arrived, lambda: [tensor if peer == self.rank else gathered[peer] for peer in range(self.size)])

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Pending[list[Tensor]]:
        return self._all_to_all("all_to_all", sends, receives)

    def _all_to_all(self, verb: str, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Pending[list[Tensor]]:
        check_count(self, verb, "tensors to send", len(sends))
        check_count(self, verb, "tensors to receive", len(receives))
        check_apart(self, verb, receives)
        buffers = [contiguous(buffer) for buffer in receives]
        buffers[self.rank] = sends[self.rank]
        peers = self._peers()
        arrived = self._travel(verb, [(sends[p], p) for p in peers], [(buffers[p], p) for p in peers])
        return _after(arrived, lambda: buffers)

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Pending[Tensor]:
        check_count(self, "reduce_scatter", "parts", len(parts))
        mine = parts[self.rank]
        if self.on_gpus and mine.numel() and len({part.shape for part in parts}) == 1:
            total, stacked = torch.empty_like(mine), torch.stack([part.detach() for part in parts])
            arrived = self._collective("reduce_scatter", lambda group: _reduce_scatter_single(total, stacked, group))
            return _after(arrived, lambda: total)
        receives = [empty_like_shape(mine.shape, mine) for _ in parts]
        arriving = self._all_to_all("reduce_scatter", parts, receives)
        return Later(lambda: sum_in_order(arriving.wait()))

    def all_reduce(self, tensor: Tensor) -> Pending[Tensor]:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        if not total.numel():
            return done(total)
        arrived = self._collective("all_reduce", lambda group: dist.all_reduce(total, group=group, async_op=True))
        return _after(arrived, lambda: total)

    def subgroup(self, ranks: Sequence[int]) -> Group:
        members = check_subgroup(self, ranks)
        if members not in self._subgroups or is_shut(self._subgroups[members]):
            self._subgroups[members] = _new_subgroup(self, members) if len(members) > 1 else alone()
        return self._subgroups[members]

    def partition(self, groups: Sequence[Sequence[int]]) -> Group:
        return partition(self, groups)

    def close(self) -> None:
        _close(self, self._subgroups)

    def _peers(self) -> list[int]:
        """The others, beginning behind me, so that not all ranks send to the same one first."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _collective(self, verb: str, start: Callable[[dist.ProcessGroup], dist.Work]) -> Callable[[], None]:
        """Start a collective of ``torch.distributed``; the result waits for it."""
        self._family.verbs += 1
        number = self._family.verbs
        errors = functools.partial(group_errors, where(self), verb, "all ranks")
        with errors():
            work = start(self._process_group)

        def finish() -> None:
            with errors():
                work.wait()
            self._family.finish_sends(before=number)

        return finish

    def _travel(self, verb: str, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """Start messages between pairs of ranks; the result waits for those that come in. No elements, no message."""
        self._family.verbs += 1
        number = self._family.verbs
        operations: list[Operation] = [(dist.isend, as_bytes(tensor), peer) for tensor, peer in sends if tensor.numel()]
        num_sends = len(operations)
        operations += [(dist.irecv, as_bytes(tensor), peer) for tensor, peer in receives if tensor.numel()]
        for _, _, peer in operations:
            check_peer(self, verb, peer)
        waits = self._start(verb, operations)
        # NCCL makes one work of all, waited for on the stream; elsewhere my sends may take longer than the verb.
        if self.on_gpus:
            num_sends = 0 if receives else len(waits)
        self._family.sent.extend((number, wait) for wait in waits[:num_sends])

        def finish() -> None:
            for wait in waits[num_sends:]:
                wait()
            self._family.finish_sends(before=number)

        return finish

    def _start(self, verb: str, operations: Sequence[Operation]) -> list[Callable[[], None]]:
        if not operations:
            return []
        group = self._process_group
        with group_errors(where(self), verb, f"ranks {sorted({peer for _, _, peer in operations})}"):
            works = dist.batch_isend_irecv(
                [dist.P2POp(op, t, group=group, group_peer=peer) for op, t, peer in operations]
            )
        if self.on_gpus:
            return [self._waiter(verb, work, "all ranks", operations) for work in works]
        return [self._waiter(verb, work, f"rank {op[2]}", op) for work, op in zip(works, operations, strict=True)]

    def _waiter(self, verb: str, work: dist.Work, peer: str, keep: object) -> Callable[[], None]:
        """Waits for ``work``, and keeps its tensors alive until then."""

        def wait(keep: object = keep) -> None:
            with group_errors(where(self), verb, peer):
                work.wait()

        return wait
