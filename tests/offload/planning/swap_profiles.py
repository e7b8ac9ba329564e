"""Random layers and machines to plan for: any sizes and speeds, hosts and devices that bind or do not."""

import math
import random

from seqpar.offload.planning.profile import LayerProfile, Machine, SavedTensor


def random_problem(seed):
    """A layer of up to a dozen tensors on a machine where both the uniform share and the program have a plan."""
    draw = random.Random(seed)
    saved = [SavedTensor("input", 2.0 ** draw.uniform(8, 14), 0.0, must_swap=True)]
    for number in range(draw.randint(1, 10)):
        seconds = 0.0 if draw.random() < 0.1 else 10 ** draw.uniform(-9, -6.3)
        saved.append(SavedTensor(f"t{number}", 2.0 ** draw.uniform(8, 15), seconds, elementwise=draw.random() < 0.3))
    attention = SavedTensor("attention", 2.0 ** draw.uniform(8, 14), 1e-6, must_swap=True)
    saved.insert(draw.randint(1, len(saved)), attention)
    tokens, layers = draw.randint(1, 200_000), draw.randint(1, 80)
    forward = tokens * 10 ** draw.uniform(-7, -5)
    profile = LayerProfile(
        tuple(saved), forward, forward * draw.uniform(1, 3), tokens, layers,
        forward * draw.random(), 0.0, draw.choice([0.0, 1e9]),
    )  # fmt: skip
    return profile, _machine(draw, profile)


def _machine(draw, profile):
    away = max(0, profile.layers - 2)
    always = sum(tensor.bytes_per_token for tensor in profile.saved if tensor.must_swap) * profile.tokens
    host = math.inf if draw.random() < 0.2 else away * (always + draw.random() * profile.layer_bytes)
    pinned = draw.choice(["exact", "power_of_two"])
    if pinned == "power_of_two" and 0 < host < math.inf:
        host = 2.0 ** math.ceil(math.log2(host))
    room = draw.choice([0.0, 0.0, away * draw.random()]) * profile.layer_bytes
    device = math.inf if draw.random() < 0.2 else profile.resident_bytes + 2 * profile.layer_bytes + room
    bandwidth = 10 ** draw.uniform(9, 11)
    return Machine(bandwidth, bandwidth * draw.uniform(0.5, 2), 8 * host, device, 8, math.inf, pinned)


def tiny(seed):
    """Three tensors of a few bytes and slow copies, so that all rows bind now and then."""
    draw = random.Random(seed)
    saved = (
        SavedTensor("input", float(draw.randint(1, 3)), 0.0, must_swap=True),
        SavedTensor("wide", float(draw.randint(2, 8)), draw.uniform(0.01, 1)),
        SavedTensor("narrow", float(draw.randint(1, 4)), draw.uniform(0.01, 1), elementwise=True),
    )
    profile = LayerProfile(saved, 10.0, 20.0, 10, draw.randint(3, 6))
    away = profile.layers - 2
    always = 10 * saved[0].bytes_per_token
    host = away * (always + draw.uniform(0, 1) * profile.layer_bytes)
    device = 2 * profile.layer_bytes + draw.choice([0, 1]) * draw.uniform(0, 1) * away * profile.layer_bytes
    return profile, Machine(draw.uniform(1, 8), draw.uniform(1, 8), host, device)
