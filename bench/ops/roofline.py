"""What an op must move and multiply, counted from shapes, and the least time that takes on a card.

Bytes are those of inputs and outputs, each once, and of the states that chunked forms keep; flops count a
multiplication and an addition as two. Both are lower bounds of what kernels do.
"""

from dataclasses import dataclass

STATE_BYTES = 4
CHUNK = 64


@dataclass(frozen=True)
class Card:
    """Peak rates: bytes per second of its memory, flops per second of dense bf16 matrix products."""

    name: str
    bytes_per_second: float
    flops_per_second: float


H100_SXM = Card("H100 SXM", 3.35e12, 989e12)


@dataclass(frozen=True)
class Work:
    """Bytes and flops of forward, and of forward and backward together."""

    forward_bytes: float
    forward_flops: float
    both_bytes: float
    both_flops: float

    def seconds(self, card: Card = H100_SXM, *, backward: bool = False) -> float:
        """The roofline: the larger of the times that memory and matrix units take."""
        bytes_, flops = (self.both_bytes, self.both_flops) if backward else (self.forward_bytes, self.forward_flops)
        return max(bytes_ / card.bytes_per_second, flops / card.flops_per_second)


def linear(
    b: int,
    t: int,
    h: int,
    k: int,
    v: int,
    itemsize: int,
    *,
    gates: str = "none",
    chunk: int = CHUNK,
    directions: int = 1,
) -> Work:
    """Decayed linear attention in chunks: scores and outputs inside a chunk, states between chunks.

    ``gates``: ``"none"``, ``"constant"``, ``"scalar"`` (an fp32 number per token and head) or ``"vector"`` (k of them).
    Two ``directions`` have states and gates of their own, and each token sees all of its chunk.
    """
    tokens = b * t * h
    gate_bytes = STATE_BYTES * {"none": 0, "constant": 0, "scalar": 1, "vector": k}[gates] * tokens * directions
    states = STATE_BYTES * directions * b * h * -(-t // chunk) * k * v
    keys, values = itemsize * tokens * k, itemsize * tokens * v
    pairs = chunk / 2  # the lower triangle
    forward_flops = 2 * tokens * directions * (pairs * (k + v) + 2 * k * v)
    # the states are written once and read once; backward reads q, k, v, d_o and writes dq, dk, dv
    forward_bytes = 2 * keys + 2 * values + gate_bytes + 2 * states
    backward_bytes = 4 * keys + 3 * values + 2 * gate_bytes + 3 * states
    backward_flops = 2 * tokens * directions * (pairs * (3 * k + 2 * v) + 4 * k * v)
    return Work(forward_bytes, forward_flops, forward_bytes + backward_bytes, forward_flops + backward_flops)


def delta(b: int, t: int, h: int, k: int, v: int, itemsize: int, *, gates: str = "none", chunk: int = CHUNK) -> Work:
    """The delta rule: as linear attention, and in each chunk a triangular system whose solution replaces the values."""
    plain = linear(b, t, h, k, v, itemsize, gates=gates, chunk=chunk)
    system = 2 * b * t * h * (chunk / 2 * (2 * k + v) + k * v)  # k k', its inverse times k and v, and the correction
    extra = itemsize * b * t * h * (k + v)
    return Work(
        plain.forward_bytes + extra,
        plain.forward_flops + system,
        plain.both_bytes + 3 * extra,
        plain.both_flops + 3 * system,
    )


def softmax(b: int, t: int, h: int, d: int, itemsize: int, *, visible: float) -> Work:
    """Attention of t queries; each sees ``visible`` keys on average. Partial outputs are fp32."""
    rows = b * t * h * d
    product = 2 * b * t * h * visible * d
    forward = 3 * rows * itemsize + rows * STATE_BYTES
    return Work(forward, 2 * product, 2 * forward + 4 * rows * STATE_BYTES, 7 * product)


def diagonal(b: int, t: int, d: int, n: int, itemsize: int) -> Work:
    """A diagonal scan of d x n states, element by element: no matrix products, memory alone counts."""
    states = STATE_BYTES * b * d * n * -(-t // CHUNK)
    forward = itemsize * b * t * (3 * d + 2 * n) + 2 * states
    return Work(forward, 0.0, 3 * forward, 0.0)


def recurrent(b: int, t: int, h: int, d: int, gates: int, states: int, itemsize: int) -> Work:
    """Steps of a recurrent cell, whose product by a matrix takes what a step waits for, and not this time."""
    rows, matrix = STATE_BYTES * b * t * h * d, itemsize * h * gates * d * d
    product = 2 * b * t * h * gates * d * d
    forward = rows * (gates + states) + matrix
    return Work(forward, product, forward + rows * (2 * gates + states + 1) + 2 * matrix, 3 * product)
