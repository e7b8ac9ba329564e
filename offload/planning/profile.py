"""What a layer saves for its backward, what it costs to build again, and the machine that it runs on."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

PINNED = ("exact", "power_of_two")
_NO_LIMIT = 2**60  # cgroup version 1 says "none" by a number near 2**63


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that a layer's forward leaves for its backward, per token of this device.

    ``must_swap`` marks the layer input and the attention output: they are never computed again from a slice of
    tokens, one because nothing is left to build it from, the other because it mixes tokens. ``elementwise`` marks
    what is built again without a matrix product (norm outputs, activations).
    """

    name: str
    bytes_per_token: float
    recompute_seconds_per_token: float
    must_swap: bool = False
    elementwise: bool = False

    def __post_init__(self) -> None:
        _above(f"bytes_per_token of {self.name!r}", self.bytes_per_token, zero=False)
        _above(f"recompute_seconds_per_token of {self.name!r}", self.recompute_seconds_per_token, zero=True)


@dataclass(frozen=True)
class LayerProfile:
    """One layer of ``layers`` that are alike, at one length: ``saved`` in the order in which forward makes them.

    ``tokens`` are those of this device. ``forward_seconds`` and ``backward_seconds`` are of one layer for them;
    ``attention_seconds`` is the part of forward that grows with the square of the length, and backward has the same
    share of it. ``context_tokens`` is the length of the whole sequence, over all devices that share it; for packed
    documents sum(s^2)/sum(s); 0 stands for ``tokens``. ``resident_bytes`` are on the device whatever the plan:
    parameters, gradients, optimizer, scratch.
    """

    saved: tuple[SavedTensor, ...]
    forward_seconds: float
    backward_seconds: float
    tokens: int
    layers: int
    attention_seconds: float = 0.0
    context_tokens: float = 0.0
    resident_bytes: float = 0.0

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.saved]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"saved tensors of a layer need names, each its own: got {names}")
        for name in ("tokens", "layers"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is a whole number >= 1, got {getattr(self, name)!r}")
        for name in ("forward_seconds", "backward_seconds"):
            _above(name, getattr(self, name), zero=False)
        for name in ("attention_seconds", "context_tokens", "resident_bytes"):
            _above(name, getattr(self, name), zero=True)
        if self.attention_seconds > self.forward_seconds:
            raise ValueError(
                f"attention_seconds {self.attention_seconds} is a part of forward_seconds {self.forward_seconds}"
            )

    @property
    def context(self) -> float:
        """The length of the whole sequence, or what stands for it in a packed batch."""
        return self.context_tokens or float(self.tokens)

    @property
    def layer_bytes(self) -> float:
        """What one layer saves on this device if it keeps all."""
        return self.tokens * math.fsum(tensor.bytes_per_token for tensor in self.saved)


@dataclass(frozen=True)
class Machine:
    """Bandwidths of one device in each direction while its peers copy too, and what host and device can hold.

    ``host_bytes`` and ``cgroup_bytes`` are shared by ``devices_per_host`` devices; the lower of the two counts.
    ``pinned`` says how the host pool of a device is rounded: ``"exact"`` for registered memory, ``"power_of_two"``
    for PyTorch's pinned allocator.
    """

    d2h_bytes_per_second: float
    h2d_bytes_per_second: float
    host_bytes: float = math.inf
    device_bytes: float = math.inf
    devices_per_host: int = 1
    cgroup_bytes: float = math.inf
    pinned: str = "exact"

    def __post_init__(self) -> None:
        for name in ("d2h_bytes_per_second", "h2d_bytes_per_second", "devices_per_host"):
            _above(name, getattr(self, name), zero=False)
        for name in ("host_bytes", "device_bytes", "cgroup_bytes"):
            _above(name, getattr(self, name), zero=True, endless=True)
        if self.pinned not in PINNED:
            raise ValueError(f"pinned is one of {', '.join(PINNED)}, got {self.pinned!r}")

    @property
    def host_share_bytes(self) -> float:
        """What one device may take of its host, rounding included."""
        return min(self.host_bytes, self.cgroup_bytes) / self.devices_per_host

    @property
    def host_pool_bytes(self) -> float:
        """The largest pool of one device that still fits after rounding."""
        share = self.host_share_bytes
        if self.pinned == "exact" or math.isinf(share):
            return share
        return 0.0 if share < 1 else 2.0 ** math.floor(math.log2(share))


def at_length(profile: LayerProfile, tokens: int) -> LayerProfile:
    """The same layer with ``tokens`` on this device and the whole sequence longer in proportion.

    Attention grows with the square, all else with the tokens.
    """
    _above("tokens", tokens, zero=False)
    scale = tokens / profile.tokens
    longer = at_context(profile, profile.context * scale)
    return replace(
        longer,
        tokens=tokens,
        forward_seconds=longer.forward_seconds * scale,
        backward_seconds=longer.backward_seconds * scale,
        attention_seconds=longer.attention_seconds * scale,
    )


def at_context(profile: LayerProfile, context_tokens: float) -> LayerProfile:
    """As many tokens on this device, out of a sequence of another length: only attention takes longer or shorter."""
    _above("context_tokens", context_tokens, zero=False)
    attention = profile.attention_seconds * context_tokens / profile.context
    forward = profile.forward_seconds - profile.attention_seconds + attention
    backward = profile.backward_seconds * forward / profile.forward_seconds
    return replace(
        profile,
        context_tokens=context_tokens,
        forward_seconds=forward,
        backward_seconds=backward,
        attention_seconds=attention,
    )


def effective_length(lengths: Sequence[int]) -> float:
    """sum(s^2)/sum(s): the length of one document whose attention costs as much per token as these documents'."""
    if not lengths or min(lengths) < 0 or sum(lengths) < 1:
        raise ValueError(f"lengths of documents are whole numbers with a sum of at least 1, got {list(lengths)!r:.60}")
    return sum(length**2 for length in lengths) / sum(lengths)


def bucket(tokens: int) -> int:
    """The key of a plan: ``tokens`` rounded up to one of eight steps per power of two, so at most an eighth more.

    A plan made for the bucket holds for every batch in it: host and device bytes only fall with fewer tokens.
    """
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"tokens is a whole number >= 1, got {tokens!r}")
    step = 2 ** max(0, (tokens - 1).bit_length() - 4)
    return -(-tokens // step) * step


def available_bytes(root: Path = Path("/")) -> float:
    """Host memory that is free to take, as the kernel reckons it; infinite where it does not say."""
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return 1024.0 * int(value.split()[0])
    return math.inf


def cgroup_limit_bytes(root: Path = Path("/")) -> float:
    """The lowest memory limit of this process's control group and those above it; infinite where there is none."""
    limits = [_text(file).strip() for file in _cgroup_files(root)]
    return min((float(words) for words in limits if words.isdigit() and int(words) < _NO_LIMIT), default=math.inf)


def _cgroup_files(root: Path) -> Iterator[Path]:
    """Version 2 has one tree, version 1 a tree for memory; in a container this group's path may lie outside."""
    for line in ("0::/", "0:memory:/", *_text(root / "proc/self/cgroup").splitlines()):
        number, kinds, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not kinds:
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in kinds.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        yield from (base.joinpath(*parts[:depth], name) for depth in range(len(parts) + 1))


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _above(name: str, value: float, *, zero: bool, endless: bool = False) -> None:
    fits = isinstance(value, (int, float)) and (value > 0 or (zero and value == 0))
    if not fits or (math.isinf(value) and not endless):
        raise ValueError(f"{name} is a number {'>= 0' if zero else '> 0'}, got {value!r}")
