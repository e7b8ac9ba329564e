"""Which share of each saved tensor is kept, swapped or computed again: five strategies and their predictions.

The last two layers need no swap: they still lie in the two rounding buffers when backward begins. The other
``layers - 2`` leave for the host during the forward of the layer after them, and come back during the backward of
the layer before them (MEMO, arXiv 2407.12117). ``memo`` is that paper's uniform share alpha of all that is not always
swapped; ``auto`` is a linear program with a share for each tensor.
"""

import math
from dataclasses import dataclass, replace

from seqpar.offload.planning.linear_program import LinearProgram, solve
from seqpar.offload.planning.profile import LayerProfile, Machine, at_context

STRATEGIES = ("keep", "recompute", "input_only", "memo", "auto")
LIMITS = ("d2h", "h2d", "host", "device")
BUFFERED_LAYERS = 2
WHOLE_LAYER = ("recompute", "input_only")  # computed again from the input, attention included
_GIB = 2**30
_MARGIN = 1e-9  # what rounding may add to a limit, or leave of a share
_TIGHT = 1e-6
_TIE = 1e-10


@dataclass(frozen=True)
class Fractions:
    """Shares of the tokens of one saved tensor; they sum to 1."""

    keep: float
    swap: float
    recompute: float


KEEP, SWAP, RECOMPUTE = Fractions(1.0, 0.0, 0.0), Fractions(0.0, 1.0, 0.0), Fractions(0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Prediction:
    """What a step is predicted to take on one device: bytes at the peak, and seconds over all layers.

    ``binds`` names the limits that are used up: ``"d2h"``, ``"h2d"``, ``"host"``, ``"device"``.
    """

    device_peak_bytes: int
    host_peak_bytes: int
    recompute_seconds: float
    exposed_seconds: float
    step_seconds: float
    binds: tuple[str, ...]


def swapped_layers(profile: LayerProfile) -> int:
    """Layers that leave the device: all but those in the two rounding buffers."""
    return max(0, profile.layers - BUFFERED_LAYERS)


def choose(profile: LayerProfile, machine: Machine, strategy: str) -> tuple[Fractions, ...]:
    """The fractions of each saved tensor, in their order; raises ``ValueError`` if a limit cannot be kept."""
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; there are: {', '.join(STRATEGIES)}")
    if strategy == "auto":
        found = fractions_by_program(profile, machine)
    elif strategy == "memo":
        found = _uniform(profile, alpha(profile, machine))
    else:
        found = _fixed(profile, strategy)
    _require_device(profile, machine, strategy, found)
    return found


def alpha(profile: LayerProfile, machine: Machine) -> float:
    """MEMO's share of the tokens that are swapped, in closed form: what one layer's forward hides and the host holds.

    alpha = (min(B T_forward, M/(n - 2)) - always swapped) / others, between 0 and 1. At 0 the layer input and the
    attention output are swapped all the same.
    """
    always, others = _bytes(profile, must_swap=True), _bytes(profile, must_swap=False)
    away, pool = swapped_layers(profile), machine.host_pool_bytes
    if away * always > pool * (1 + _MARGIN):
        raise ValueError(_host_too_small(profile, machine, away * always))
    if not others:
        return 1.0
    room = machine.d2h_bytes_per_second * profile.forward_seconds
    if away:
        room = min(room, pool / away)
    return min(1.0, max(0.0, (room - always) / others))


def predict(profile: LayerProfile, machine: Machine, strategy: str, fractions: tuple[Fractions, ...]) -> Prediction:
    """Bytes and seconds of a step with these fractions.

    A layer's copy out is exposed as far as it outlasts one forward; its copy back as far as it outlasts the backward
    of the layer after it and what that one computes again.
    """
    away, whole = swapped_layers(profile), strategy in WHOLE_LAYER
    swapped = _weighted(profile, [each.swap for each in fractions])
    out, back = swapped / machine.d2h_bytes_per_second, swapped / machine.h2d_bytes_per_second
    again = profile.forward_seconds if whole else _recompute_seconds(profile, fractions)
    # The first layer to come back does so during the backward of a buffered one, which recomputes nothing by tokens.
    first = profile.backward_seconds + (again if whole else 0.0)
    exposed = away * max(0.0, out - profile.forward_seconds)
    if away:
        exposed += max(0.0, back - first) + (away - 1) * max(0.0, back - profile.backward_seconds - again)
    recompute = again * (profile.layers if whole else away)
    host, device = away * swapped, device_bytes(profile, strategy, fractions)
    used = {
        "d2h": out / profile.forward_seconds if away else 0.0,
        "h2d": back / first if away else 0.0,
        "host": _share(host, machine.host_pool_bytes),
        "device": _share(device, machine.device_bytes),
    }
    return Prediction(
        device_peak_bytes=_whole(device),
        host_peak_bytes=_whole(_rounded(machine, host)),
        recompute_seconds=recompute,
        exposed_seconds=exposed,
        step_seconds=profile.layers * (profile.forward_seconds + profile.backward_seconds) + recompute + exposed,
        binds=tuple(name for name, share in used.items() if share >= 1 - _TIGHT),
    )


def device_bytes(profile: LayerProfile, strategy: str, fractions: tuple[Fractions, ...]) -> float:
    """The device at its peak: what is kept of every layer, and two layers in full (see ``BUFFERED_LAYERS``).

    With a whole layer computed again, only what is swapped lies in two buffers, and the rest once.
    """
    kept = _weighted(profile, [each.keep for each in fractions])
    swapped = _weighted(profile, [each.swap for each in fractions])
    buffers = min(profile.layers, BUFFERED_LAYERS)
    rest = profile.layer_bytes - kept - swapped
    copies = 1 if strategy in WHOLE_LAYER else buffers
    return profile.resident_bytes + profile.layers * kept + buffers * swapped + copies * rest


def hides_from_tokens(profile: LayerProfile, machine: Machine, strategy: str) -> int | None:
    """The shortest sequence whose layers leave and come back unseen, with no matrix product computed twice.

    Only bandwidth against time counts here: what host and device can hold ends it from above, not from below. The
    share of tokens that is on this device does not matter. ``None`` where no length does it. ``memo`` in closed form
    (all tokens of all tensors in one forward); ``auto`` by bisection over lengths, each a linear program.
    """
    if strategy in WHOLE_LAYER:
        return None
    if strategy == "keep":
        return 1
    uniform = _hides_all(profile, machine)
    if strategy == "memo":
        return uniform
    return _search(profile, machine, uniform)


def fractions_by_program(profile: LayerProfile, machine: Machine) -> tuple[Fractions, ...]:
    """The fractions that cost the fewest seconds of recompute and exposed transfer: a linear program.

    Of plans equally fast it takes the one that swaps the fewest bytes. Raises ``ValueError`` if a limit cannot be
    kept, or without a solver.
    """
    if not swapped_layers(profile):
        return (KEEP,) * len(profile.saved)
    room = _keep_room(profile, machine)
    _require_host(profile, machine, room)
    return _cleaned(profile, _solved(profile, machine, room))


def _fixed(profile: LayerProfile, strategy: str) -> tuple[Fractions, ...]:
    if strategy == "keep":
        return (KEEP,) * len(profile.saved)
    first = KEEP if strategy == "recompute" else SWAP
    return (first, *(RECOMPUTE for _ in profile.saved[1:]))


def _uniform(profile: LayerProfile, share: float) -> tuple[Fractions, ...]:
    others = Fractions(0.0, share, 1.0 - share)
    return tuple(SWAP if tensor.must_swap else others for tensor in profile.saved)


def _solved(profile: LayerProfile, machine: Machine, room: float) -> list[tuple[float, float]]:
    """Keep and swap of each tensor. Bytes are in units of a layer's, seconds in units of its forward and backward."""
    program, unit = LinearProgram(), profile.forward_seconds + profile.backward_seconds
    away, layer = swapped_layers(profile), profile.layer_bytes
    shares = [profile.tokens * tensor.bytes_per_token / layer for tensor in profile.saved]
    costs = [profile.tokens * tensor.recompute_seconds_per_token / unit for tensor in profile.saved]
    keep = [program.variable(0.0, high=1.0) for _ in shares]
    swap = [program.variable(0.0, high=1.0) for _ in shares]
    again = [
        program.variable(cost, high=0.0 if tensor.must_swap else 1.0) for tensor, cost in zip(profile.saved, costs)
    ]
    for three in zip(keep, swap, again):
        program.equals(dict.fromkeys(three, 1.0), 1.0)
    bytes_out, seconds_again = dict(zip(swap, shares)), dict(zip(again, costs))
    for bandwidth, window, weight, also in (
        (machine.d2h_bytes_per_second, profile.forward_seconds, 1.0, {}),
        (machine.h2d_bytes_per_second, profile.backward_seconds, 1 / away, {}),
        (machine.h2d_bytes_per_second, profile.backward_seconds, (away - 1) / away, seconds_again),
    ):
        _window(program, bytes_out, layer / bandwidth / unit, window / unit, weight, also)
    program.at_most(bytes_out, machine.host_pool_bytes / (away * layer))
    program.at_most(dict(zip(keep, shares)), room / (away * layer))
    values = _least_swapped(program, bytes_out)
    return [(values[one], values[two]) for one, two in zip(keep, swap)]


def _window(
    program: LinearProgram,
    bytes_out: dict[int, float],
    whole: float,
    window: float,
    weight: float,
    also: dict[int, float],
) -> None:
    """A row for copies against a window of compute and what ``also`` lengthens it; what sticks out costs ``weight``.

    ``whole`` is the time that all bytes of a layer take; the row is in units of it.
    """
    if whole <= window:
        return  # all fits, whatever is swapped
    exposed = program.variable(weight * whole)
    longer = {number: -seconds / whole for number, seconds in also.items()}
    program.at_most({**bytes_out, **longer, exposed: -1.0}, window / whole)


def _least_swapped(program: LinearProgram, bytes_out: dict[int, float]) -> tuple[float, ...]:
    """Solve, then once more for the fewest bytes swapped at the same cost; the first answer if that loses anything."""
    values = solve(program)
    assert values is not None, "a program whose limits can be kept has a solution"
    best = _cost(program.cost, values)
    fewest = [bytes_out.get(number, 0.0) for number in range(len(program.cost))]
    again = LinearProgram(fewest, program.bounds, [*program.rows, (dict(enumerate(program.cost)), best)], program.equal)
    fewer = solve(again)
    if fewer is None or _cost(program.cost, fewer) > best + _TIE:
        return values
    return fewer


def _cost(cost: list[float], values: tuple[float, ...]) -> float:
    return math.fsum(price * value for price, value in zip(cost, values))


def _cleaned(profile: LayerProfile, found: list[tuple[float, float]]) -> tuple[Fractions, ...]:
    """Shares between 0 and 1 that sum to 1: what rounding left over goes to the fate that no limit counts."""
    fractions = []
    for tensor, (keep, swap) in zip(profile.saved, found):
        keep = _snapped(keep)
        if tensor.must_swap:
            fractions.append(Fractions(keep, 1.0 - keep, 0.0))
        else:
            swap = min(_snapped(swap), 1.0 - keep)
            fractions.append(Fractions(keep, swap, _snapped(1.0 - keep - swap)))
    return tuple(fractions)


def _snapped(value: float) -> float:
    return 0.0 if value < _MARGIN else 1.0 if value > 1 - _MARGIN else value


def _keep_room(profile: LayerProfile, machine: Machine) -> float:
    """Bytes for what is kept beside the two layers in the rounding buffers."""
    return max(0.0, machine.device_bytes - profile.resident_bytes - BUFFERED_LAYERS * profile.layer_bytes)


def _require_device(profile: LayerProfile, machine: Machine, strategy: str, fractions: tuple[Fractions, ...]) -> None:
    needed = device_bytes(profile, strategy, fractions)
    if needed <= machine.device_bytes * (1 + _MARGIN):
        return
    raise ValueError(
        f"device memory too small for strategy {strategy!r}: needs {_gib(needed)}, there is "
        f"{_gib(machine.device_bytes)}; {_advice(profile, machine)}"
    )


def _advice(profile: LayerProfile, machine: Machine) -> str:
    """Which of the strategies that need the least would fit; if none, how much each of them lacks."""
    lacks = {name: _lacks(profile, machine, name) for name in ("recompute", "input_only", "memo")}
    fitting = [repr(name) for name, lack in lacks.items() if not lack]
    if fitting:
        return f"strategy {' or '.join(fitting)} fits"
    words = "; ".join(f"{name!r} lacks {lack}" for name, lack in lacks.items() if name in WHOLE_LAYER)
    return f"even full recompute does not fit: {words}; use fewer tokens, more devices or a smaller model"


def _lacks(profile: LayerProfile, machine: Machine, strategy: str) -> str:
    """What a strategy lacks of device and host at the least that it can do with; empty if it fits."""
    fractions = _uniform(profile, 0.0) if strategy == "memo" else _fixed(profile, strategy)
    device = device_bytes(profile, strategy, fractions) - machine.device_bytes
    host = swapped_layers(profile) * _weighted(profile, [each.swap for each in fractions])
    missing = {"device": device, "host": _rounded(machine, host) - machine.host_share_bytes}
    return " and ".join(f"{_gib(more)} of {place}" for place, more in missing.items() if more > 0)


def _require_host(profile: LayerProfile, machine: Machine, room: float) -> None:
    """Layer input and attention output are swapped, unless the device has room to keep them."""
    needed = swapped_layers(profile) * _bytes(profile, must_swap=True) - room
    if needed > machine.host_pool_bytes + _MARGIN * swapped_layers(profile) * profile.layer_bytes:
        raise ValueError(_host_too_small(profile, machine, needed))


def _host_too_small(profile: LayerProfile, machine: Machine, needed: float) -> str:
    rounding = " in pools rounded to powers of two" if machine.pinned != "exact" else ""
    enough = machine.devices_per_host * _rounded(machine, needed)
    return (
        f"host memory too small: layer input and attention output of {swapped_layers(profile)} layers are always "
        f"swapped, {_gib(needed)} for each of {machine.devices_per_host} devices, and each has "
        f"{_gib(machine.host_pool_bytes)}{rounding}; give the host {_gib(enough)}; or else {_advice(profile, machine)}"
    )


def _rounded(machine: Machine, host: float) -> float:
    """The pool that holds so many bytes."""
    if machine.pinned == "exact" or host <= 0:
        return host
    return 2.0 ** math.ceil(math.log2(host) - _MARGIN)


def _hides_all(profile: LayerProfile, machine: Machine) -> int | None:
    each = math.fsum(tensor.bytes_per_token for tensor in profile.saved)
    ratio = profile.backward_seconds / profile.forward_seconds
    needed = max(each / machine.d2h_bytes_per_second, each / machine.h2d_bytes_per_second / ratio)
    linear = (profile.forward_seconds - profile.attention_seconds) / profile.tokens
    missing = needed - linear
    if missing <= 0 or not swapped_layers(profile):
        return 1
    if not profile.attention_seconds:
        return None
    return max(1, math.ceil(missing * profile.tokens * profile.context / profile.attention_seconds))


def _search(profile: LayerProfile, machine: Machine, uniform: int | None) -> int | None:
    """The first length at which the program needs no exposed copy and no matrix product; that grows no worse later."""
    free = tuple(
        replace(tensor, recompute_seconds_per_token=0.0) if tensor.elementwise else tensor for tensor in profile.saved
    )
    free_of_limits = replace(machine, host_bytes=math.inf, cgroup_bytes=math.inf)
    bare = replace(profile, saved=free)

    def hides(length: int) -> bool:
        at = at_context(bare, length)
        found = _cleaned(at, _solved(at, free_of_limits, 0.0))
        predicted = predict(at, free_of_limits, "auto", found)
        cost = predicted.recompute_seconds + predicted.exposed_seconds
        return cost <= _TIGHT * predicted.step_seconds

    if uniform is None:
        return 1 if hides(1) else None
    low, high = 0, uniform
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if hides(middle) else (middle, high)
    return high


def _recompute_seconds(profile: LayerProfile, fractions: tuple[Fractions, ...]) -> float:
    """Of one layer, from slices of tokens."""
    return profile.tokens * math.fsum(
        tensor.recompute_seconds_per_token * each.recompute for tensor, each in zip(profile.saved, fractions)
    )


def _weighted(profile: LayerProfile, shares: list[float]) -> float:
    """Bytes of one layer, each tensor by its share."""
    return profile.tokens * math.fsum(tensor.bytes_per_token * share for tensor, share in zip(profile.saved, shares))


def _bytes(profile: LayerProfile, *, must_swap: bool) -> float:
    return _weighted(profile, [float(tensor.must_swap is must_swap) for tensor in profile.saved])


def _share(used: float, limit: float) -> float:
    return 0.0 if not used else used / limit if limit else math.inf


def _whole(bytes_: float) -> int:
    """Bytes as a whole number, up, but not for the last bit of a float."""
    return math.ceil(bytes_ * (1 - 1e-12))


def _gib(bytes_: float) -> str:
    return f"{bytes_ / _GIB:,.4g} GiB"
