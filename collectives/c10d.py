"""Ranks as processes: the only file that imports ``torch.distributed``, and the one that hides its versions.

With Gloo everything travels between pairs of ranks (:mod:`seqpar.collectives.messages`): its own collectives end the
process where ranks bring other sizes, and give garbage where they bring other dtypes of one size.

With NCCL, and for tensors on a GPU under Gloo's collectives, messages say nothing of what they are, and nobody watches:
compared is what functions agree on (:meth:`ProcessRanks.agree`) and what a wrapped model compares in every call. A rank
that skips or repeats a message ends in the time-out of the process group.
"""

import atexit
import functools
import hashlib
import sys
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from seqpar.collectives.agreed import closed
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
    sum_in_order,
    where,
)
from seqpar.collectives.launcher import SLURM, Place, gpu_of, this_place
from seqpar.collectives.meeting import wait_for_all
from seqpar.collectives.messages import Message, Messages, after
from seqpar.collectives.shared import Shared, alive, close, hang_up
from seqpar.collectives.watch import Family, Watch

T = TypeVar("T")
Operation = tuple[Callable[..., Any], Tensor, int]
_torch: Any = dist.distributed_c10d
_untyped: Any = dist
Ranks = Group | DeviceMesh | dist.ProcessGroup
"""What ``group=`` takes: see :func:`group_of`."""


def connect(backend: str | None = None, *, timeout_seconds: float = 60.0, debug: bool = False) -> Group:
    """Join the ranks that torchrun, mpirun or Slurm started with this process; alone, the group of one.

    All ranks call it. ``backend`` is ``"gloo"`` or ``"nccl"``; by default NCCL where there is CUDA. A rank waits
    ``timeout_seconds`` for a message (and for the others to come) before it raises :class:`GroupError`. End with
    :func:`disconnect`, since a message that its receiver has not come to is lost when its sender ends. Where the
    default process group of ``torch.distributed`` exists already, it is used as it is. Closing the group closes its
    subgroups; the process group that it speaks through goes on until :func:`disconnect`. ``debug`` compares what ranks
    call at every call, not only the first time that they come to it.
    """
    if not dist.is_initialized():
        place = this_place()
        backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        if backend == "nccl":
            torch.cuda.set_device(gpu_of(place, torch.cuda.device_count()))
        if place.size == 1:
            return alone()
        _join(place, backend, timeout_seconds)
    return _process_ranks(dist.group.WORLD, timedelta(seconds=timeout_seconds), debug)


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


def ranks_of(process_group: dist.ProcessGroup) -> list[int]:
    """The ranks of the whole job that are in it."""
    return list(dist.get_process_group_ranks(process_group))


def disconnect() -> None:
    """Leave what :func:`connect` joined, once every rank has come here; while an error is raised, leave at once."""
    if not dist.is_initialized():
        return
    for watch in Watch.all():
        watch.leave("it has come to disconnect()")
    if sys.exc_info()[0] is None:
        _wait_for_all()
        Watch.stop_all()
        _wait_for_all()  # nobody asks the store any more, so the rank that holds it may end
    _leave()


def _leave() -> None:
    """End what runs beside us, the watch and Gloo's threads: at the latest before the interpreter ends."""
    atexit.unregister(_leave)
    Watch.stop_all()
    if dist.is_initialized():
        dist.destroy_process_group()


def _wait_for_all() -> None:
    who = f"rank {dist.get_rank()} of {dist.get_world_size()}"
    for why in filter(None, (watch.why() for watch in Watch.all())):
        raise closed(who, "disconnect", why)
    with group_errors(who, "disconnect", "all ranks"):
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


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


def _process_ranks(process_group: dist.ProcessGroup | None, timeout: timedelta | None, debug: bool = False) -> Group:
    assert process_group is not None
    if dist.get_world_size(process_group) == 1:
        return alone()
    shared = Shared(timeout, every=debug, family=Family(dist.get_rank()))
    group = ProcessRanks(process_group, shared, "")
    # Rank 0 draws a number from the store that all ranks share: the names of no other group's subgroups begin with it.
    store = _torch._get_default_store()
    drawn = store.add("collectives/groups", 1) if group.rank == 0 else 0
    number = group.all_reduce(torch.tensor([drawn], device="cuda" if group.on_gpus else "cpu")).wait()
    group.messages.named(f"collectives_{int(number)}")
    if not group.on_gpus:
        name, hang_up_all = group.messages.name, functools.partial(hang_up, shared.references)
        shared.watch = Watch(name, shared.family, store, hang_up_all)
        shared.watch.start()
        weakref.finalize(shared, shared.watch.stop)
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
    shared = group.shared
    name = f"{group.messages.name}/{hashlib.blake2b(str(members).encode(), digest_size=8).hexdigest()}"
    shared.made[name] += 1
    name += f".{shared.made[name]}"
    with group_errors(where(group), "subgroup", f"ranks {list(members)}"):
        made = _new_process_group(members, group.process_group(), name, shared.timeout)
    part = ProcessRanks(made, shared, name)
    if part.on_gpus:  # NCCL wants all ranks at the first call; a later exchange may be between two of them only
        part.all_reduce(torch.zeros(1, device="cuda")).wait()
    return part


def _start_together(
    process_group: dist.ProcessGroup, who: str, verb: str, operations: Sequence[Operation]
) -> Callable[[], None]:
    """NCCL makes one work of all, waited for on the stream."""
    if not operations:
        return lambda: None
    with group_errors(who, verb, f"ranks {sorted({peer for _, _, peer in operations})}"):
        works = dist.batch_isend_irecv(
            [dist.P2POp(op, t, group=process_group, group_peer=peer) for op, t, peer in operations]
        )

    def wait(keep: object = operations) -> None:
        with group_errors(who, verb, "all ranks"):
            for work in works:
                work.wait()

    return wait


class ProcessRanks:
    """One process's view of the ranks in a process group of ``torch.distributed``."""

    def __init__(self, process_group: dist.ProcessGroup, shared: Shared, name: str) -> None:
        self.global_ranks = tuple(dist.get_process_group_ranks(process_group))
        self.rank, self.size = dist.get_rank(process_group), len(self.global_ranks)
        self.on_gpus = dist.get_backend(process_group) == "nccl"
        self.shared, self.reference = shared, weakref.ref(process_group)  # once torch lets it go, its threads end
        shared.references.append(self.reference)
        self.process_group = functools.partial(alive, self.reference, where(self))
        self.messages = Messages(where(self), self.process_group, self.global_ranks, shared, name)
        self._subgroups: dict[tuple[int, ...], Group] = {}

    def exchange(
        self, send: Tensor | None, to: int | None, receive: Tensor | None, source: int | None
    ) -> Pending[Tensor | None]:
        sends = [] if send is None or to is None else [(send, to)]
        buffer = None if receive is None or source is None else contiguous(receive)
        receives = [] if buffer is None or source is None else [(buffer, source)]
        return after(self._travel("exchange", sends, receives), lambda: buffer)

    def all_gather(self, tensor: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> Pending[list[Tensor]]:
        all_shapes = check_shapes(self, tensor, shapes)
        if tensor.is_cuda and len(set(all_shapes)) == 1 and tensor.numel():
            return self._all_gather_equal(tensor)
        gathered = [empty_like_shape(shape, tensor) for shape in all_shapes]
        gathered[self.rank] = tensor
        peers = self._peers()
        arrived = self._travel("all_gather", [(tensor, p) for p in peers], [(gathered[p], p) for p in peers])
        return after(arrived, lambda: gathered)

    def _all_gather_equal(self, tensor: Tensor) -> Pending[list[Tensor]]:
        gathered = empty_like_shape((self.size, *tensor.shape), tensor)
        arrived = self._collective(
            "all_gather", lambda group: _all_gather_single(as_bytes(gathered), as_bytes(tensor), group)
        )
        return after(arrived, lambda: [tensor if peer == self.rank else gathered[peer] for peer in range(self.size)])

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
        return after(arrived, lambda: buffers)

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Pending[Tensor]:
        check_count(self, "reduce_scatter", "parts", len(parts))
        mine = parts[self.rank]
        if self.on_gpus and mine.numel() and len({part.shape for part in parts}) == 1:
            total, stacked = torch.empty_like(mine), torch.stack([part.detach() for part in parts])
            arrived = self._collective("reduce_scatter", lambda group: _reduce_scatter_single(total, stacked, group))
            return after(arrived, lambda: total)
        receives = [empty_like_shape(mine.shape, mine) for _ in parts]
        arriving = self._all_to_all("reduce_scatter", parts, receives)
        return Later(lambda: sum_in_order(arriving.wait()))

    def all_reduce(self, tensor: Tensor) -> Pending[Tensor]:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        if not total.numel():
            return done(total)
        if not total.is_cuda:
            return self.messages.add_up(total, self.rank, self.size, self)
        arrived = self._collective("all_reduce", lambda group: dist.all_reduce(total, group=group, async_op=True))
        return after(arrived, lambda: total)

    def agree(self, place: str, what: str) -> None:
        """All go to one public function with the same options (:mod:`seqpar.collectives.agreed`)."""
        device = "cuda" if self.on_gpus else "cpu"
        self.messages.agreed.move(where(self), place, what, lambda number: self.all_gather(number.to(device)).wait())

    def note(self, call: str) -> None:
        """What errors say that this is."""
        self.messages.agreed.call = call

    def leave(self, why: str) -> None:
        """Ranks that wait for this one are told that it raised an error."""
        self.shared.family.leave(why)

    def subgroup(self, ranks: Sequence[int]) -> Group:
        members = check_subgroup(self, ranks)
        if members not in self._subgroups or is_shut(self._subgroups[members]):
            self._subgroups[members] = _new_subgroup(self, members) if len(members) > 1 else alone()
        return self._subgroups[members]

    def partition(self, groups: Sequence[Sequence[int]]) -> Group:
        return partition(self, groups)

    def close(self) -> None:
        close(self, self._subgroups, dist.destroy_process_group)

    def _peers(self) -> list[int]:
        """The others, beginning behind me, so that not all ranks send to the same one first."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _collective(self, verb: str, start: Callable[[dist.ProcessGroup], dist.Work]) -> Callable[[], None]:
        """Start a collective of ``torch.distributed``; the result waits for it."""
        number = self.shared.begin(where(self), verb)
        errors = functools.partial(group_errors, where(self), verb, "all ranks")
        with errors():
            work = start(self.process_group())

        def finish() -> None:
            with errors():
                work.wait()
            self.shared.finish_sends(before=number)

        return finish

    def _travel(self, verb: str, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """Start messages between pairs of ranks; the result waits for those that come in. No elements, no message."""
        if not self.on_gpus:
            return self.messages.travel(verb, sends, receives, self)
        number = self.shared.begin(where(self), verb)
        operations: list[Operation] = [(dist.isend, as_bytes(tensor), peer) for tensor, peer in sends if tensor.numel()]
        operations += [(dist.irecv, as_bytes(tensor), peer) for tensor, peer in receives if tensor.numel()]
        for _, _, peer in operations:
            check_peer(self, verb, peer)
        wait = _start_together(self.process_group(), where(self), verb, operations)
        if not receives:
            self.shared.sent.append((number, wait))

        def finish() -> None:
            if receives:
                wait()
            self.shared.finish_sends(before=number)

        return finish
