"""An independent checker of swap plans: it lays the step out in time, copy by copy, and adds the bytes up by layer.

It shares no formula with ``strategies.py``: where that one has closed forms, here three streams (compute, out, back)
run through all layers, each waiting for what it must.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from seqpar.offload.planning.profile import LayerProfile, Machine

if TYPE_CHECKING:
    from seqpar.offload.planning.plan import SwapPlan

_CLOSE = 1e-9
_LIMIT = 1e-8


class SwapPlanRefusedError(ValueError):
    """A plan that must not be used; ``faults`` holds a line for each thing that is wrong."""

    def __init__(self, faults: tuple[str, ...]) -> None:
        self.faults = faults
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        super().__init__(f"swap plan refused: {faults[0]}{more}")


def check_swap_plan(plan: "SwapPlan", profile: LayerProfile, machine: Machine) -> None:
    """Raise :class:`SwapPlanRefusedError` unless the plan is for this profile, keeps all limits and is right."""
    found = tuple(_identity(plan, profile)) or (
        *_shares(plan, profile),
        *_bytes(plan, profile, machine),
        *_seconds(plan, profile, machine),
    )
    if found:
        raise SwapPlanRefusedError(found)


def _identity(plan: "SwapPlan", profile: LayerProfile) -> Iterator[str]:
    expected = {
        "tokens": profile.tokens,
        "context_tokens": profile.context,
        "layers": profile.layers,
        "saved_bytes_per_layer": math.ceil(profile.layer_bytes),
    }
    for name, value in expected.items():
        if getattr(plan, name) != value:
            yield f"{name} is {getattr(plan, name)!r}, expected {value!r}"
    names, known = [name for name, _ in plan.fractions], [tensor.name for tensor in profile.saved]
    if names != known:
        yield f"the plan is for tensors {names}, the layer saves {known}"


def _shares(plan: "SwapPlan", profile: LayerProfile) -> Iterator[str]:
    sliced = plan.strategy not in ("recompute", "input_only")
    for tensor, (name, shares) in zip(profile.saved, plan.fractions):
        three = (shares.keep, shares.swap, shares.recompute)
        if abs(sum(three) - 1) > _CLOSE or min(three) < 0:
            yield f"keep, swap and recompute of {name!r} are {three}, expected shares that sum to 1"
        if tensor.must_swap and sliced and shares.recompute:
            yield f"{name!r} cannot be computed again from a slice of tokens, and {shares.recompute:.3g} of it is to be"
    yield from _own_law(plan, profile)


def _own_law(plan: "SwapPlan", profile: LayerProfile) -> Iterator[str]:
    """What the name of a strategy promises."""
    for number, (tensor, (name, shares)) in enumerate(zip(profile.saved, plan.fractions)):
        if plan.strategy == "memo":
            swap = 1.0 if tensor.must_swap else plan.alpha
            fits = swap is not None and abs(shares.swap - swap) <= _CLOSE and not shares.keep
        elif plan.strategy == "auto":
            fits = True
        else:
            fate = {"keep": "keep", "recompute": "recompute", "input_only": "recompute"}[plan.strategy]
            if number == 0 and plan.strategy != "keep":
                fate = "keep" if plan.strategy == "recompute" else "swap"
            fits = getattr(shares, fate) == 1
        if not fits:
            yield f"strategy {plan.strategy!r} does not deal with {name!r} as {shares}"


def _bytes(plan: "SwapPlan", profile: LayerProfile, machine: Machine) -> Iterator[str]:
    away = _part(plan, profile, "swap")
    host = sum(away for layer in range(plan.layers) if _leaves(plan, layer))
    pool = host
    if machine.pinned == "power_of_two" and host > 0:
        pool = 2.0**-20
        while pool < host * (1 - _LIMIT):
            pool *= 2
    limit = min(machine.host_bytes, machine.cgroup_bytes) / machine.devices_per_host
    device = max(_on_device(plan, profile, layer) for layer in range(plan.layers))
    for name, value, most in (("host_peak_bytes", pool, limit), ("device_peak_bytes", device, machine.device_bytes)):
        if abs(getattr(plan, name) - value) > 1 + _CLOSE * value:
            yield f"{name} is {getattr(plan, name)}, expected {value:.0f}"
        if value > most * (1 + _LIMIT):
            yield f"{name} comes to {value:.0f}, and the limit is {most:.0f}"


def _on_device(plan: "SwapPlan", profile: LayerProfile, working: int) -> float:
    """Bytes while ``working`` runs and the layers before it have run: it in full, its neighbour in the other buffer."""
    total = profile.resident_bytes
    for layer in range(working + 1):
        total += _part(plan, profile, "keep")
        if layer >= working - 1:
            total += _part(plan, profile, "swap")
        if layer == working or (layer == working - 1 and not _whole(plan)):
            total += _part(plan, profile, "recompute")
    return total


def _seconds(plan: "SwapPlan", profile: LayerProfile, machine: Machine) -> Iterator[str]:
    again = [_again(plan, profile, layer) for layer in range(plan.layers)]
    swapped = _part(plan, profile, "swap")
    forward_end = _forward(plan, profile, swapped / machine.d2h_bytes_per_second)
    step = _backward(plan, profile, swapped / machine.h2d_bytes_per_second, forward_end, again)
    compute = plan.layers * (profile.forward_seconds + profile.backward_seconds)
    expected = {
        "recompute_seconds": sum(again),
        "exposed_seconds": step - compute - sum(again),
        "step_seconds": step,
    }
    for name, value in expected.items():
        if abs(getattr(plan, name) - value) > _CLOSE * step:
            yield f"{name} is {getattr(plan, name):.6g}, expected {value:.6g}"


def _forward(plan: "SwapPlan", profile: LayerProfile, copy: float) -> float:
    """When forward ends: a layer waits until its buffer, used two layers earlier, has been copied out."""
    now = stream = 0.0
    copied = [0.0] * plan.layers
    for layer in range(plan.layers):
        if layer >= 2:
            now = max(now, copied[layer - 2])
        now += profile.forward_seconds
        if _leaves(plan, layer):
            stream = max(stream, now) + copy
            copied[layer] = stream
    return now


def _backward(plan: "SwapPlan", profile: LayerProfile, copy: float, now: float, again: list[float]) -> float:
    """When backward ends: a layer's copy starts once its buffer is free, and the layer waits for it."""
    stream = now
    ready = [now] * plan.layers
    for layer in reversed(range(plan.layers)):
        now = max(now, ready[layer]) + again[layer] + profile.backward_seconds
        if layer >= 2:  # its buffer is free for the layer two before
            stream = max(stream, now) + copy
            ready[layer - 2] = stream
    return now


def _again(plan: "SwapPlan", profile: LayerProfile, layer: int) -> float:
    """What one layer computes twice."""
    if _whole(plan):
        return profile.forward_seconds
    if not _leaves(plan, layer):
        return 0.0
    return sum(
        tensor.recompute_seconds_per_token * profile.tokens * shares.recompute
        for tensor, (_, shares) in zip(profile.saved, plan.fractions)
    )


def _part(plan: "SwapPlan", profile: LayerProfile, fate: str) -> float:
    """Bytes of one layer with one fate."""
    return sum(
        tensor.bytes_per_token * profile.tokens * float(getattr(shares, fate))
        for tensor, (_, shares) in zip(profile.saved, plan.fractions)
    )


def _leaves(plan: "SwapPlan", layer: int) -> bool:
    return layer < plan.layers - 2


def _whole(plan: "SwapPlan") -> bool:
    return plan.strategy in ("recompute", "input_only")
