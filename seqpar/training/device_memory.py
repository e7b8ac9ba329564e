"""What training takes of a device's memory: per token, for the model's state, and how much there is."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

_MOMENTS = 2  # of Adam
_USABLE = 0.9  # of a device: the rest is for its context, and for what the allocator cannot join
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def state_bytes(module: nn.Module) -> int:
    """Bytes of the parameters, their gradients and the two moments of Adam, each in the parameter's dtype, and of the
    buffers: 16 a trained parameter in fp32."""
    copies = {True: 2 + _MOMENTS, False: 1}
    trained = sum(each.numel() * each.element_size() * copies[each.requires_grad] for each in module.parameters())
    return trained + sum(each.numel() * each.element_size() for each in module.buffers())


def saved_bytes(forward: Callable[[], Tensor], ours: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from ``forward`` to backward: each storage once, without those of ``ours``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in ours}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # while it lives, no storage that it keeps gives its place to another
    del result
    return sum(bytes_ for place, bytes_ in found.items() if place not in known)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that ``step`` has on a GPU at any moment, beyond what was there before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def usable_bytes(device: torch.device, sharing: int) -> int:
    """Nine tenths of a rank's share of a GPU's memory, or of the host's; ``sharing`` ranks have one."""
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
    else:
        total = min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_cgroup_limits()])
    return int(_USABLE * total / sharing)


def _cgroup_limits() -> list[int]:
    found = []
    for path in map(Path, _CGROUP_LIMITS):
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return [limit for limit in found if limit > 0]
