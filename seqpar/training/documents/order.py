"""The order of documents in an epoch: a permutation that is computed where it is asked for, and never held.

A Feistel network over the smallest even number of bits that holds all numbers, walked until a number is inside: the
same on every machine and with every version of numpy, so that a run that is resumed elsewhere goes on in its order.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8


def shuffled(places: NDArray[np.int64], num: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Which of ``num`` documents stand at these places of an epoch's order.

    Law: over all places from 0 to ``num - 1`` each document comes once, for every seed and epoch. Work is linear in the
    number of places asked for.
    """
    half = np.uint64(max(1, -(-(num - 1).bit_length() // 2)))
    keys = [_key(seed, epoch, number) for number in range(_ROUNDS)]
    found = places.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():  # a place is inside, so its way comes back inside; on average once in at most four steps
        found[outside] = _moved(found[outside], half, keys)
        outside = found >= np.uint64(num)
    return found.astype(np.int64)


def _moved(numbers: NDArray[np.uint64], half: np.uint64, keys: list[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = numbers >> half, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << half) | right


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, epoch: int, number: int) -> np.uint64:
    text = f"{seed} {epoch} {number}".encode()
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
