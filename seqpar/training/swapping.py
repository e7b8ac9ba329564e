"""``swap=`` of the decorator: which activations leave the device, planned from the first step of each length."""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.offload.planning.plan import SwapPlan
from seqpar.offload.planning.profile import (
    LayerProfile,
    Machine,
    SavedTensor,
    at_length,
    available_bytes,
    bucket,
    cgroup_limit_bytes,
)
from seqpar.offload.planning.strategies import Fractions
from seqpar.offload.planning.swap_plan import plan_swap
from seqpar.offload.runtime.activations import Activations, Plan, activations
from seqpar.offload.runtime.runs import SavedStorage
from seqpar.offload.runtime.tiers import HostTier, Tier
from seqpar.sharding.cut import Cut
from seqpar.training.device_memory import state_bytes, usable_bytes
from seqpar.training.swapped import is_checkpointed, swapped_cut

AUTO = "auto"
_ALL = Fractions(0.0, 1.0, 0.0)
_SAMPLE_BYTES = 1 << 25  # what bandwidth is measured with
_BACKWARD = 2.0  # by forward


class Swapping:
    """Swaps what a model's layers save, by a plan; or by plans of its own, one for each bucket of lengths.

    Law: loss and gradients are those without it (see :func:`seqpar.offload.activations.activations`). With ``"auto"``
    the first step of a bucket swaps everything and is timed: names and bytes of what each layer saves, the seconds of
    its forward pass and of its token-wise parts, and the bandwidth of the tier. From the second step on a linear
    programme says what is kept, swapped and computed again, for the longest batch of the bucket; ``plans`` has what it
    said, and ``measured`` what it knew. ``ranks`` share the host's memory, as far as is known.
    """

    def __init__(self, module: nn.Module, plan: "Plan | str", tier: Tier | None, ranks: int = 1) -> None:
        if isinstance(plan, str) and plan != AUTO:
            raise ValueError(f"swap is a plan, shares, or {AUTO!r}, got {plan!r}")
        self.plans: dict[int, SwapPlan] = {}
        self.measured: dict[int, tuple[LayerProfile, Machine]] = {}
        self._observed: tuple[SavedStorage, ...] = ()
        self._module, self._plan, self._ranks = module, plan, ranks
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._tier = HostTier(pinned=self._device.type == "cuda") if tier is None else tier
        self._checkpointed = is_checkpointed(module)
        self._swaps: dict[int, Activations] = {}
        self._bandwidth: tuple[float, float] | None = None

    @contextmanager
    def over(self, cut: Cut) -> Iterator[Cut]:
        """Within, a forward pass with the cut that this gives swaps; backward may come later."""
        if not torch.is_grad_enabled():
            yield cut
            return
        key = bucket(max(1, cut.shard.num_local)) if self._plan == AUTO else 0
        watch = _Watch(self._device) if self._plan == AUTO and key not in self.plans else None
        if key not in self._swaps:
            self._swaps[key] = self._with(_ALL if isinstance(self._plan, str) else self._plan)
        swap = self._swaps[key]
        mine = swapped_cut(cut, swap, checkpointed=self._checkpointed)
        if watch is None:
            with swap:
                yield mine
            return
        with swap, watch.layers(swap.layers):
            yield replace(mine, token_wise=watch.segments(swap.token_wise))
        if swap.saved:
            self._observed = swap.saved
            self.measured[key] = at_length(self._profile(swap, watch, cut), key), self._machine()
            self.plans[key] = plan_swap(*self.measured[key])
            self._swaps[key] = self._with(self.plans[key])

    def close(self) -> None:
        """Finish all copies and give the tier back."""
        for swap in self._swaps.values():
            swap.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Swapping":
        return Swapping(copy.deepcopy(self._module, memo), self._plan, self._tier, self._ranks)

    def _with(self, plan: Plan) -> Activations:
        return activations(self._module, plan, tier=self._tier)

    def _profile(self, swap: Activations, watch: "_Watch", cut: Cut) -> LayerProfile:
        tokens = max(1, cut.shard.num_local)
        layers = len({each.layer for each in swap.saved})
        forward = fmean(watch.layer_seconds)
        return LayerProfile(
            saved=tuple(_saved(swap.saved, watch.segment_seconds, tokens, layers)),
            forward_seconds=forward,
            backward_seconds=_BACKWARD * forward,
            tokens=tokens,
            layers=len(swap.layers),
            context_tokens=float(max(1, cut.shard.num_tokens)),
            resident_bytes=float(state_bytes(self._module)),
        )

    def _machine(self) -> Machine:
        if self._bandwidth is None:
            self._bandwidth = measure(self._tier, self._device)
        sharing = 1 if self._device.type == "cuda" else self._ranks
        return Machine(
            *self._bandwidth,
            host_bytes=available_bytes(),
            device_bytes=usable_bytes(self._device, sharing),
            devices_per_host=self._ranks,
            cgroup_bytes=cgroup_limit_bytes(),
        )


def _saved(
    found: tuple[SavedStorage, ...], segment_seconds: dict[str, float], tokens: int, layers: int
) -> Iterator[SavedTensor]:
    """What a layer saves, by name, as the mean over layers. Building a tensor again runs its whole segment: its seconds
    are shared out by bytes. What no segment made cannot be built again, and is swapped or kept."""
    bytes_: dict[str, int] = defaultdict(int)
    for each in found:
        bytes_[each.name] += each.kept_bytes + each.swapped_bytes + each.recomputed_bytes
    by_segment: dict[str, int] = defaultdict(int)
    for name, total in bytes_.items():
        by_segment[name.partition(".")[0]] += total
    for name, total in bytes_.items():
        segment, dot, _ = name.partition(".")
        share = total / by_segment[segment] if dot else 0.0
        seconds = segment_seconds.get(segment, 0.0) * share / (tokens * layers)
        yield SavedTensor(name, total / (tokens * layers), seconds, must_swap=not dot)


class _Watch:
    """Seconds of layers and of their token-wise parts in one forward pass."""

    def __init__(self, device: torch.device) -> None:
        self.layer_seconds: list[float] = []
        self.segment_seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._begun: list[float] = []

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def layers(self, layers: "list[nn.Module]") -> Iterator[None]:
        handles = [layer.register_forward_pre_hook(lambda *_: self._begun.append(self.now())) for layer in layers]
        handles += [layer.register_forward_hook(lambda *_: self._end()) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _end(self) -> None:
        self.layer_seconds.append(self.now() - self._begun.pop())

    def segments(self, token_wise: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def timed(name: str, function: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            begin = self.now()
            outputs = token_wise(name, function, inputs)
            self.segment_seconds[name] += self.now() - begin
            return outputs

        return timed


def measure(tier: Tier, device: torch.device, bytes_: int = _SAMPLE_BYTES) -> tuple[float, float]:
    """Bytes per second into a tier and back, each the better of two copies."""
    sample = torch.zeros(1, bytes_, dtype=torch.uint8, device=device)
    region = tier.reserve(bytes_)
    watch = _Watch(device)
    rates = []
    for copy_ in (tier.write, tier.read):
        seconds = []
        for _ in range(2):
            begin = watch.now()
            copy_(region, sample)
            seconds.append(watch.now() - begin)
        rates.append(bytes_ / max(min(seconds), 1e-9))
    tier.release(region)
    return rates[0], rates[1]
