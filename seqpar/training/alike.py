"""What ranks compare of a model in every call: that they stand at the same call, in the same mode, with the same
weights.

Comparing all weights in every call would cost as much as reading them. So each call compares what costs little: names
and shapes, what is trained, how often each tensor was written (torch counts that), a few numbers of every tensor, and a
larger slice that moves on from call to call. All weights are compared, one by one, at the first call, after
``load_state_dict``, where tensors were replaced or frozen ones written, and where any of the above differs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.collectives import Group
from seqpar.collectives.agreed import note
from seqpar.collectives.group import where
from seqpar.sharding.agreement import Comparison, Fact, digest, odd_ranks, ranks_differ, text_fingerprint
from seqpar.sharding.parts import Named, parts_of, tensors_of

FEW = 16  # numbers of every tensor in every call
SLICE = 1 << 15  # numbers of the slice that moves on

_WRITTEN, _SAMPLE, _ALL = "how often the weights were written", "a sample of the weights", "whether all are compared"
_LATER = (_WRITTEN, _SAMPLE, _ALL)


class Alike:
    """The memory of one wrapped module: how many calls there were, and how its tensors stood at the last one."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._calls = 0
        self._stood: dict[str, tuple[int, int, bool]] = {}
        self._written_since: dict[str, int] = {}
        self._names = 0
        self._cursor = (0, 0)
        self._compare_all = True
        self._comparison: Comparison | None = None

    @property
    def calls(self) -> int:
        """How many calls there were."""
        return self._calls

    def check(self, facts: Mapping[str, Any], group: Group, device: torch.device) -> None:
        """Raise ``ValueError``, the same on every rank, if ranks differ in ``facts``, the call, the mode or weights.

        On the CPU at once. Elsewhere the numbers are read when the next call begins, when they have long been there:
        the error comes one call late, but no call waits for the device (the first one does).
        """
        self._conclude(group, device)
        self._calls += 1
        note(group, f"call {self._calls} of the model")
        parts = parts_of(self._module)
        tensors = _compared(parts)
        call = {"the number of the call": Fact(self._calls, f"call {self._calls}", "call {}")}
        everything = {**call, **facts, **_mode(parts), **self._weights(tensors, device)}
        self._comparison = Comparison(everything, group, device)
        if device.type == "cpu" or self._calls == 1:
            self._conclude(group, device)

    def _conclude(self, group: Group, device: torch.device) -> None:
        comparison, self._comparison = self._comparison, None
        if comparison is None:
            return
        columns = comparison.conclude(but=_LATER)
        alike = all(len(set(columns[name])) == 1 for name in (_WRITTEN, _SAMPLE))
        if not alike or any(columns[_ALL]):
            self._check_all(group, device)
        self._compare_all = False
        self._written_since = {}

    def _weights(self, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Fact]:
        trained = {name: tensor.requires_grad for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
        self._look(tensors)
        return {
            "the names and shapes of the weights": Fact(self._names, f"{len(tensors)} tensors"),
            "what is trained": Fact(text_fingerprint(str(trained)), _trained(trained)),
            _WRITTEN: Fact(text_fingerprint(str(self._written_since)), ""),
            _SAMPLE: Fact(self._sample([t for t in tensors.values() if t.device == device], device), ""),
            _ALL: Fact(int(self._compare_all), ""),
        }

    def _look(self, tensors: dict[str, Tensor]) -> None:
        """See what was written, replaced or unfrozen since all weights were last known to be the same."""
        stands = {name: (id(tensor), _version(tensor), tensor.requires_grad) for name, tensor in tensors.items()}
        for name, (identity, version, trained) in stands.items():
            known = self._stood.get(name)
            if known is None or known[0] != identity or known[2] != trained or (not trained and known[1] != version):
                self._compare_all = True
            elif known[1] != version:
                self._written_since[name] = version - known[1]
        if [each[0] for each in stands.values()] != [each[0] for each in self._stood.values()]:
            names = " ".join(f"{name}{tuple(tensor.shape)}{tensor.dtype}" for name, tensor in tensors.items())
            self._names = text_fingerprint(names)
        self._stood = stands

    def _sample(self, tensors: list[Tensor], device: torch.device) -> Tensor:
        """A digest of a few numbers of each tensor and of a slice that is another one in every call."""
        flat = [tensor.detach().view(-1) for tensor in tensors if tensor.numel() and tensor.is_contiguous()]
        parts = [
            each[start : start + FEW] for each in flat for start in [self._calls * FEW % max(1, len(each) - FEW + 1)]
        ]
        if not parts:
            return torch.zeros((), dtype=torch.int64, device=device)
        total = digest(torch.cat([part.view(torch.uint8) for part in parts]))
        for part in self._slice(flat):
            total = total * 31 + digest(part)
        return total

    def _slice(self, flat: list[Tensor]) -> Iterator[Tensor]:
        left, (index, start) = min(SLICE, sum(map(len, flat))), self._cursor
        while left > 0:
            index, start = (index, start) if index < len(flat) else (0, 0)
            part = flat[index][start : start + left]
            yield part
            left -= len(part)
            start += len(part)
            if start >= len(flat[index]):
                index, start = index + 1, 0
        self._cursor = (index, start)

    def _check_all(self, group: Group, device: torch.device) -> None:
        """Compare every tensor; the error says which differ and where numbers are not finite."""
        tensors = _compared(parts_of(self._module))
        if not tensors:
            return
        digests = torch.stack([digest(tensor).to(device) for tensor in tensors.values()])
        finite = torch.stack([_not_finite(tensor).to(device) for tensor in tensors.values()])
        tables = [torch.stack(group.all_gather(numbers).wait()).t().tolist() for numbers in (digests, finite)]
        differing = {n: (column, bad) for n, column, bad in zip(tensors, *tables) if len(set(column)) > 1}
        if differing:
            self._compare_all = True
            raise ValueError(_weights_differ(where(group), differing))


def is_distributed(module: nn.Module) -> bool:
    """Whether FSDP2 (or tensor parallelism) owns the parameters."""
    held = (each for part in module.modules() for each in part._parameters.values())  # names would cost a call more
    return any(hasattr(each, "device_mesh") for each in held)


def tensor_parallel(module: nn.Module) -> bool:
    """Whether parameters are in parts that FSDP2 does not own."""
    return is_distributed(module) and not any(hasattr(part, "set_requires_gradient_sync") for part in module.modules())


def _compared(parts: Sequence[Named]) -> dict[str, Tensor]:
    """Parameters, then buffers; none where FSDP2 has them in parts that differ by rank."""
    tensors = tensors_of(parts)
    return {} if any(hasattr(tensor, "device_mesh") for tensor in tensors.values()) else tensors


def _mode(parts: Sequence[Named]) -> dict[str, Fact]:
    training = bytes(module.training for _, module in parts)
    grad = "inference mode" if torch.is_inference_mode_enabled() else "grad" if torch.is_grad_enabled() else "no_grad"
    autocast = [str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    words = f"{_share(training)} in training mode, {grad}, autocast {' and '.join(autocast) or 'off'}"
    return {"the mode": Fact(text_fingerprint(f"{training.hex()} {grad} {autocast}"), words)}


def _version(tensor: Tensor) -> int:
    """How often the tensor was written; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _not_finite(tensor: Tensor) -> Tensor:
    """How many of its numbers are infinite or none."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    exact = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()
    return (~exact.isfinite()).sum()


def _share(flags: bytes) -> str:
    return "all modules" if all(flags) else "none" if not any(flags) else f"{sum(flags)} of {len(flags)} modules"


def _trained(trained: dict[str, bool]) -> str:
    frozen = [name for name, is_trained in trained.items() if not is_trained]
    shown = f", all but {', '.join(frozen[:3])}{', ...' if len(frozen) > 3 else ''}" if frozen else ""
    return f"{len(trained) - len(frozen)} of {len(trained)} parameters{shown}"


def _weights_differ(who: str, differing: dict[str, tuple[list[int], list[int]]]) -> str:
    name, (column, _) = next(iter(differing.items()))
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    spoiled = [
        f"{count} numbers of {name} on rank {rank} are not finite"
        for name, (column, bad) in differing.items()
        for rank, count in enumerate(bad)
        if count
    ]
    found = "".join(f"; {each}" for each in spoiled[:3])
    return (
        f"{who}: the weights must be the same on every rank, but {ranks_differ(odd_ranks(column))} in {name}{more}"
        f"{found}; seed every rank alike, load the same checkpoint on all, and let all take the same steps"
    )
